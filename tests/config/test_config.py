"""The configuration: every shipped file loads, overrides win, mistakes are answered with the right name."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvat_dist.config import parser
from mvat_dist.errors import UserError
from mvat_dist.runs import folder

SHIPPED = Path(__file__).parent.parent.parent / "configs"
OF_OTHERS = {SHIPPED / f"{name}.yaml" for name in ("sweep", "experiment", "study/grid")}
"""Files of other kinds: tests/launch/test_sweep_file.py, tests/commands/test_experiment.py."""
CONFIGS = sorted(set(SHIPPED.rglob("*.yaml")) - OF_OTHERS)
ALONE = ["--distil.method", "none"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_files_load(file: Path) -> None:
    config = parser.parse(["--config", str(file), "--teacher", "somewhere"])
    again = parser.to_yaml(config)
    assert again


def test_precedence_and_types(tmp_path: Path) -> None:
    file = tmp_path / "my config.yaml"
    file.write_text("distil: {method: none}\noptim: {lr: 2e-4}\ndata: {snr_db: [0, 5]}\n")
    config = parser.parse(["--config", str(file), "--optim.lr=5e-05", "--engine.zero_stage", "2"])
    assert config.optim.lr == 5e-5
    assert config.data.snr_db == (0.0, 5.0)
    assert config.engine.zero_stage == 2
    assert config.optim.weight_decay == 0.0


def _types(value: Any) -> Iterator[type]:
    """Of every value in a configuration."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _types(inner)
    else:
        yield type(value)


def test_numbers_are_plain() -> None:
    """A pickle of another type would need jsonargparse, and torch.load refuses it."""
    sizes = ["--sizes", "{tiny: {kind: small, hidden: 8}}", "--student", "tiny"]
    config = parser.parse([*ALONE, *sizes, "--optim.lr", "1e-4", "--data.snr_db", "[0,5]"])
    assert type(config.optim.lr) is float
    assert isinstance(config.optim.betas, tuple)
    assert set(_types(config)) <= {int, float, bool, str, type(None)}


def test_resolved_yaml_reads_back(tmp_path: Path) -> None:
    config = parser.parse([*ALONE, "--sizes", "{tiny: {kind: small, hidden: 8}}", "--student", "tiny"])
    file = tmp_path / "config.yaml"
    file.write_text(parser.to_yaml(config))
    assert parser.parse(["--config", str(file)]) == config


@pytest.mark.parametrize("value", [".nan", ".inf", "-1e-3", "0", "null", "fast"])
def test_a_file_is_refused_as_the_command_line_is(tmp_path: Path, value: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"distil: {{method: none}}\noptim: {{lr: {value}}}\n")
    with pytest.raises(UserError, match=r"optim\.lr"):
        parser.parse(["--config", str(file)])


@pytest.mark.parametrize("section", ["optim:", "optim: null", "data: {train: null}"])
def test_an_empty_section_is_refused(tmp_path: Path, section: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"distil: {{method: none}}\n{section}\n")
    with pytest.raises(UserError, match=r"optim|data"):
        parser.parse(["--config", str(file)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--distil.wieght=0.5"], "distil.weight"),
        (["--optim", "{lr: 1, beta: 2}"], "optim.betas"),
        ([*ALONE, "--student", "manner-s-5gf"], "manner-s-5.3gf"),
        ([*ALONE, "--train.steps", "many"], "train.steps"),
        ([*ALONE, "--train.batch", "0"], "above 0"),
        ([*ALONE, "--valid.clips=-5"], "valid.clips -5: must be a whole number, 0 or above"),
        ([*ALONE, "--optim.clip_norm=-1"], "must be a finite number, 0 or above"),
        ([*ALONE, "--optim.lr=.nan"], "--optim.lr: expected a finite number above 0"),
        ([*ALONE, "--optim.lr=.inf"], "--optim.lr: expected a finite number above 0"),
        ([*ALONE, "--optim.lr=null"], "optim.lr"),
        ([*ALONE, "--data.snr_db=[.nan,5]"], "data.snr_db nan: must be a finite number"),
        ([*ALONE, "--data.level_dbfs=[-30,3]"], "at most 0"),
        ([*ALONE, "--data.reverb_probability=2"], "a share from 0 to 1"),
        ([*ALONE, "--optim.betas=[0.9,2]"], "below 1"),
        ([*ALONE, "--seed=-1"], "0 or above"),
        ([*ALONE, "--loss.pesq=-1"], "0 or above"),
        ([*ALONE, "--runs="], "--runs is empty"),
        (["--config", "no/such.yaml", *ALONE], "no/such.yaml"),
        ([], "needs a teacher"),
        ([*ALONE, "--student", "manner-b,manner-b"], "twice"),
        ([*ALONE, "--name", "../elsewhere"], "plain folder name"),
        (
            ["--teacher", "x", "--distil", "{beta_channel: 0, beta_global: 0, beta_local: 0}"],
            "switched off",
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        folder.run_folder(parser.parse(arguments))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_identity_is_the_science() -> None:
    base = parser.parse(ALONE)
    same = parser.parse([*ALONE, "--data.workers", "7", "--runs", "x", "--engine.zero_stage", "1"])
    other = parser.parse([*ALONE, "--optim.lr", "0.01"])
    assert parser.fingerprint(base) == parser.fingerprint(same) != parser.fingerprint(other)
    assert folder.run_name(base).startswith("none-all-")


def test_the_resolved_file_goes_on_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parser.parse([*ALONE, "--data.train", "shards/mine", "--runs", "here"])
    run = folder.RunDir(folder.run_folder(config))
    run.create(config)
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    again = parser.parse(["--config", str(run.config)])
    assert folder.run_folder(again) == run.path
    assert parser.science(again) == parser.science(config)
    assert again.data.train == str(tmp_path / "shards/mine")


def test_a_folder_is_not_shared_by_two_experiments(tmp_path: Path) -> None:
    run = folder.RunDir(tmp_path / "run")
    run.create(parser.parse([*ALONE, "--optim.lr", "0.5"]))
    run.create(parser.parse(ALONE))  # nothing was saved: a corrected start takes its place
    run.checkpoints.mkdir()
    run.create(parser.parse([*ALONE, "--data.workers", "5"]))
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.01"):
        run.create(parser.parse([*ALONE, "--optim.lr", "0.01"]))


def test_the_ground_needs_no_torch() -> None:
    """A login node lists sizes and checks a configuration in a blink."""
    code = (
        "import sys; import mvat_dist.config.parser, mvat_dist.runs.folder, mvat_dist.distributed.ranks;"
        "import mvat_dist.config.sizes;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_options_page_names_the_keys_that_change_no_fingerprint() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "options.md").read_text(encoding="utf-8")
    (keys,) = re.findall(r"left out of the\sfingerprint: ([^;]*?)\. A run", page)
    assert tuple(re.findall(r"`([\w.]+)`", keys)) == parser.UNIMPORTANT
