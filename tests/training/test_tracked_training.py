"""A real training, preempted and resumed, beside a stand-in for W&B's server."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from mvat_dist.config.sizes import SIZES, VIEWS
from mvat_dist.data.clips import Clip, ValidationClips
from mvat_dist.evaluation.spectrogram import spectrogram_png
from mvat_dist.runs.folder import RunDir
from mvat_dist.training.recorder import Examples
from tests.faults.group import STUDENTS, Bench
from tests.wandb_runs import same_rows
from tests.wandb_server import listening


def test_a_preempted_training_is_one_whole_run_per_student(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "bench")
    run = RunDir(tmp_path / "my runs" / "group")
    options = ("--train.steps=9", "--train.validate_every=4", "--data.workers=0")
    options += ("--track.examples=1", "--track.artifacts=true")
    with listening() as server:
        variables = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url}
        training = bench.start(run, *options, processes=1, variables=variables)
        training.hold_after(5)
        training.process.terminate()
        training.release()
        training.ended(128 + signal.SIGTERM)
        assert all(one.preempting for one in server.runs.values())
        bench.start(run, *options, processes=1, variables=variables).ended(0)
        for name in STUDENTS:
            copy = server.run(name)
            same_rows(copy.history, run.history(name))
            assert (copy.group, copy.exit_code, set(copy.tags)) == ("group", 0, {"preempted", "requeued"})
            assert copy.config["train"]["value"]["steps"] == 9
            assert copy.config["environment"]["value"]["packages"]["wandb"]
            best = [one for one in server.artifacts if one.run == copy.name and one.kind == "model"][-1]
            assert best.files["model.safetensors"] == run.weights(name, "best").read_bytes()
            check_rows(run, name)
            sent = {row[key]["path"] for row in copy.history for key in row if key.startswith("examples/00/")}
            assert sent <= set(copy.files)
            assert any(path.endswith(".png") for path in sent)
        tables = [row["students"]["path"] for row in server.run(STUDENTS[0]).history if "students" in row]
        table = json.loads(server.run(STUDENTS[0]).files[tables[-1]])
        assert [row[table["columns"].index("student")] for row in table["data"]] == list(STUDENTS)


def check_rows(run: RunDir, name: str) -> None:
    rows = [json.loads(line) for line in run.history(name).read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 10))
    for row in trained:
        assert row["lr"] >= 0
        assert row["gradient_norm"] > 0
        assert row["audio_seconds_per_second"] > 0
        assert row["memory"]["rss_gb"] > 0.05
        assert sum(row["time"].values()) == pytest.approx(1)
    scored = [row for row in rows if "valid/si_sdr" in row]
    assert [row["step"] for row in scored] == [4, 8, 9]
    for row in scored:
        assert -100 <= row["valid/si_sdr"] <= 100
        assert row["valid/si_sdr_low"] is row["valid/si_sdr_high"] is None  # there is one clip


class _Half(nn.Module):
    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy / 2


class _Teacher:
    def enhance(self, noisy: torch.Tensor) -> torch.Tensor:
        return noisy / 4


def test_examples_are_the_same_clips_as_each_network_hears_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    clips = [
        Clip(f"c{n}", *(0.1 * generator.standard_normal((2, 16_000 * (n + 1))).astype(np.float32)))
        for n in range(6)
    ]
    run = RunDir(tmp_path / "my run")
    examples = Examples(run, clips, 3, _Teacher())  # type: ignore[arg-type]
    first = examples.enhance("a", 4, _Half(), torch.device("cpu"))
    again = examples.enhance("a", 4, _Half(), torch.device("cpu"))
    for extras, expected in ((first, {"noisy", "clean", "teacher", "student"}), (again, {"student"})):
        kinds = {key.rpartition("/")[2] for key in extras.files}
        assert kinds == expected | {f"{one}-spectrogram" for one in expected}
    assert sorted(set(first.captions.values())) == ["c0", "c2", "c4"]
    for key, factor in {"noisy": 1.0, "teacher": 0.25, "student": 0.5}.items():
        audio, rate = soundfile.read(first.files[f"examples/02/{key}"])
        assert rate == 16_000
        np.testing.assert_allclose(audio, factor * clips[4].noisy[: 4 * 16_000], atol=2e-5)
        seen = Path(first.files[f"examples/02/{key}-spectrogram"]).read_bytes()
        assert seen == spectrogram_png(np.float32(factor) * clips[4].noisy[: 4 * 16_000])


def test_a_clip_that_cannot_be_read_is_no_example_and_no_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scoring counts it as a failure; a run that died of it would die of it again at every start."""
    pairs = tmp_path / "pairs"
    for name in ("a", "b"):
        for side in ("noisy", "clean"):
            (pairs / side).mkdir(parents=True, exist_ok=True)
            soundfile.write(pairs / side / f"{name}.wav", np.zeros(8000, np.float32), 16_000)
    (pairs / "noisy" / "a.wav").write_bytes(b"no sound")
    run = RunDir(tmp_path / "a run")
    examples = Examples(run, ValidationClips(str(pairs)), 2, None)
    extras = examples.enhance("tiny", 4, _Half(), torch.device("cpu"))
    assert set(extras.captions.values()) == {"noisy/b.wav"}
    assert "a.wav" in caplog.text
    assert json.loads((run.examples / "examples.json").read_text())["keys"] == ["noisy/b.wav"]


def test_a_base_student_has_a_term_for_each_view_of_each_block() -> None:
    from mvat_dist.config.schema import DistilConfig
    from mvat_dist.losses.objective import Objective

    base = SIZES["manner-b"]
    terms = Objective(DistilConfig(), SIZES["manner-s-5.3gf"], base).terms
    expected = {f"mvat/{side}/{level}/{view}" for side, level in base.blocks() for view in VIEWS}
    assert {term for term in terms if term.startswith("mvat/")} == expected
    assert len(expected) == 24
