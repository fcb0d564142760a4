"""What a group of students counts, and what ends a student."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from mvat_dist.training.students import MetricAccumulator
from tests.commands.test_train import (
    LOSSES_ONLY,
    command,
    corpus,  # noqa: F401 (a fixture)
    environment,
    runs,  # noqa: F401
    teacher,  # noqa: F401
    train,
)


def test_the_accumulator_weighs_every_segment_alike() -> None:
    """Means of unequal micro-batches are the mean over their segments, however they were cut into steps."""
    values = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metrics = MetricAccumulator(["loss", "twice"], torch.device("cpu"))
    for step in (values[:2], values[2:7], values[7:]):
        for part in step.split(3):
            metrics.add({"loss": part.mean(), "twice": 2 * part.mean(), "other": part.sum()}, len(part))
        metrics.close_step()
    row = metrics.compute_and_reset()
    assert row == pytest.approx({"loss": float(values.mean()), "twice": 2 * float(values.mean())})
    assert all(math.isnan(mean) for mean in metrics.compute_and_reset().values())


def test_a_student_that_never_recovers_is_given_up(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    diverging = [
        "--optim.lr=1e30",
        "--optim.schedule=constant",
        "--optim.clip_norm=0",
        "--train.max_skipped=2",
        "--train.rollbacks=0",
    ]
    argv = command(corpus, tmp_path, "diverging", ["--student=tiny", "--distil.method=none", *diverging])
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "given up after 2 steps in a row with a non-finite gradient" in done.stderr
    status = json.loads((tmp_path / "diverging" / "STATUS").read_text())
    assert status["state"] == "failed"
    tiny = status["students"]["tiny"]
    assert (tiny["updates"], tiny["skipped"], tiny["given_up"]) == (1, 2, True)


def test_differentiable_pesq_counts_from_its_time_on(corpus: Path, runs: Path) -> None:  # noqa: F811
    loss = ("--loss.pesq=0.5", "--loss.pesq_after=0.5", "--distil.method=none")
    run = train(corpus, runs, "pesq-later", "--student=tiny", *loss, *LOSSES_ONLY)
    lines = (run / "students" / "tiny" / "history.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    for row, counts in zip(rows, (False, False, True, True), strict=True):
        assert (row["pesq"] is not None) == counts
        assert row["loss"] == pytest.approx(row["enhance"] + (0.5 * row["pesq"] if counts else 0), rel=1e-6)


def test_a_teacher_that_has_faded_is_not_asked(corpus: Path, runs: Path, teacher: Path) -> None:  # noqa: F811
    distil = ("--distil.method=mvat+output", "--distil.fade_by=0.5")
    run = train(corpus, runs, "faded", "--student=tiny", f"--teacher={teacher}", *distil, *LOSSES_ONLY)
    lines = (run / "students" / "tiny" / "history.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    for row, active in zip(rows, (True, True, False, False), strict=True):
        assert ("teacher" in row["time"]) == active
        assert (row["mvat"] is not None) == (row["output"] is not None) == active
        assert (row["loss"] > row["enhance"]) == active
        assert active or row["loss"] == row["enhance"]
