"""The grid trains what is missing, and nothing twice; every run is what its method says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mvat_dist import experiment
from mvat_dist.config.sizes import Size
from mvat_dist.errors import EXIT_BUSY, UserError
from mvat_dist.models import weights
from mvat_dist.models.manner import build
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.lock import RunLock
from tests.conftest import REPOSITORY
from tests.tiny_corpus import write_pairs, write_sources

METHODS = {"none": {"distil.method": "none"}, "mvat, no global": {"distil.beta_global": 0}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a corpus, a teacher and a grid of two methods and two seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    time = np.arange(8000) / 16_000
    voice = {f"c{i}": 0.2 * np.sin(2 * np.pi * (150 + 20 * i) * time) for i in range(4)}
    noise = 0.05 * np.random.default_rng(0).standard_normal(8000)
    write_sources(tmp_path / "corpus", "train_clean", voice)
    write_sources(tmp_path / "corpus", "train_noise", {"n0": noise})
    write_pairs(tmp_path / "corpus", "valid", {"v0": (voice["c0"] + noise, voice["c0"])})
    size = Size("base", hidden=6, depth=2)
    torch.manual_seed(0)
    weights.save(tmp_path / "teacher.safetensors", build(size).state_dict(), name="t", size=size, step=1)
    common = {
        "sizes": {"tiny": {"kind": "base", "hidden": 6, "depth": 2}},
        "data": {"train": "corpus", "segment_seconds": 0.25, "workers": 0, "reverb_probability": 0},
        "train": {"steps": 2, "batch": 2, "micro_batch": 2},
        "valid": {"clips": 1, "best": "si_sdr"},
        "track": {"examples": 0},
    }
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(common))
    write_grid(tmp_path)
    return tmp_path


def write_grid(folder: Path, **changes: object) -> Path:
    grid = {
        "teacher": "teacher.safetensors",
        "config": "common.yaml",
        "students": "tiny",
        "seeds": [0, 1],
        "methods": METHODS,
    }
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(grid | changes))
    return file


def run(*options: str) -> None:
    experiment.main(["grid.yaml", "--out", "an experiment", "--cluster", "local", *options])


def configuration(name: str) -> dict:
    return yaml.safe_load(Path(f"an experiment/runs/{name}/config.yaml").read_text())


def test_the_grid_is_trained_scored_and_reported_and_goes_on_where_it_was(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_grid(place, seeds=[0])
    run()
    report = Path("an experiment/report")
    first = {file: file.read_bytes() for file in report.iterdir()}
    assert first
    alone, distilled = configuration("none-seed0"), configuration("mvat, no global-seed0")
    assert alone["distil"]["method"] == "none"
    assert (distilled["distil"]["method"], distilled["distil"]["beta_global"]) == ("mvat", 0)

    written = Path("an experiment/runs/none-seed0/students/tiny/last/model.safetensors").stat().st_mtime_ns
    write_grid(place, baselines=["log-mmse"])
    capfd.readouterr()
    run()
    assert "4 runs below" in (output := capfd.readouterr().out)
    assert "2 of them finished" in output
    assert [configuration(f"none-seed{seed}")["seed"] for seed in (0, 1)] == [0, 1]
    again = Path("an experiment/runs/none-seed0/students/tiny/last/model.safetensors").stat().st_mtime_ns
    assert again == written
    assert {file: file.read_bytes() for file in report.iterdir()} != first
    assert "\n| log-mmse " not in (first[report / "report.md"]).decode()
    assert "\n| log-mmse " in (report / "report.md").read_text()


def test_a_run_that_fails_does_not_hold_up_the_others(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = {"distil.method": "none", "optim.lr": 1e30, "train.max_skipped": 1, "train.rollbacks": 0}
    write_grid(place, seeds=[0], methods={"broken": broken, "none": {"distil.method": "none"}})
    with pytest.raises(SystemExit) as stopped:
        run("--train.steps", "8")
    assert stopped.value.code == 1
    assert "failed: broken-seed0" in capfd.readouterr().out
    assert RunDir(place / "an experiment" / "runs" / "none-seed0").read_status()["state"] == "finished"
    page = Path("an experiment/report/report.md").read_text()
    assert "none-seed0" in page
    assert "broken-seed0" not in page


def test_a_run_in_other_hands_is_left_to_them(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Or the next run would be trained beside it, on the same cores."""
    write_grid(place, seeds=[0])
    runs = place / "an experiment" / "runs"
    others = RunLock(runs / "mvat, no global-seed0", "train")  # the grid's first
    assert others.acquire() is None
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == EXIT_BUSY
    assert "mvat, no global-seed0 is being trained" in capfd.readouterr().out
    assert not list(runs.rglob("checkpoints"))
    others.release()


def test_a_dry_run_writes_nothing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = set(place.iterdir())
    run("--dry-run")
    assert set(place.iterdir()) == files
    output = capfd.readouterr().out
    assert output.count("not started") == 4
    assert "mvat, no global-seed1" in output


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"methods": {}}, [], "at least one method"),
        ({"seeds": []}, [], "at least one"),
        ({"seeds": [0, 0]}, [], "same name"),
        ({"seeds": ["one"]}, [], "seeds"),
        ({"seed": 1}, [], "seed.*keys: teacher, methods"),
        ({"methods": {"odd": {"distil.betaglobal": 0}}}, [], "beta_global"),
        ({"teacher": "nowhere"}, [], "no such teacher: "),
        ({"metrics": "pesq_wbb"}, [], "pesq_wb"),
        ({"baselines": ["wiener"]}, [], "scored in the end: no model at wiener"),
        ({"baselines": ["teacher=wiener"]}, [], "baselines: teacher is a network of the grid"),
        ({"test": "nowhere"}, [], "scored in the end: no such .*nowhere"),
        ({"test": "nowhere"}, ["--dry-run"], "scored in the end: no such .*nowhere"),
        ({}, ["--out", "grid.yaml"], "grid.yaml is a file: give a folder"),
        ({}, ["--name", "mine"], "same name"),
        ({}, ["--train.bach", "4"], "train.batch"),
    ],
)
def test_a_mistake_is_refused_before_anything_starts(
    place: Path, changes: dict, options: list[str], named: str
) -> None:
    write_grid(place, **changes)
    with pytest.raises(UserError, match=named):
        run(*options)
    assert not Path("an experiment").exists()


def test_the_grid_of_the_study_is_a_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    grid = experiment.read(REPOSITORY / "configs" / "study" / "grid.yaml")
    cells = experiment.cells(grid, tmp_path, [])
    assert len({cell.run.path for cell in cells}) == len(grid.methods) * len(grid.seeds)
    assert {cell.config.train.init for cell in cells} == {str(REPOSITORY / "runs" / "small-first")}


def test_the_papers_grid_has_every_comparison_of_the_paper() -> None:
    grid = experiment.read(REPOSITORY / "configs" / "experiment.yaml")
    by_method = [options["distil.method"] for options in grid.methods.values()]
    assert set(by_method) == {"none", "output", "mvat", "mvat+output"}
    off = [set(options) - {"distil.method"} for options in grid.methods.values() if len(options) > 1]
    assert off == [{f"distil.beta_{view}"} for view in ("channel", "global", "local")]
