"""One run that goes on with other numbers of ranks and other ZeRO stages, against the undisturbed one.

The global batches and the schedule are those of the step, whoever computes it. With micro-batches of one
size BatchNorm normalises over the same segments, so the losses agree to rounding; its running statistics,
which only validation and users see, are an average over the ranks and differ with their number.
"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mvat_dist.runs.folder import RunDir
from tests.faults.group import OPTIONS, STUDENTS, Bench, history, steps

STEPS = 8
LEGS = ((1, 0, 0), (2, 2, 1), (4, 3, 0), (3, 1, 0))
"""(ranks, ZeRO stage, reader processes of each rank), two steps each."""

LOSS_TOLERANCE = 3e-4
WEIGHT_TOLERANCE = 1e-2
"""Relative: a loss; the 2-norm of the difference of all weights, or of all moments. Measured: 4e-5, 3e-3."""


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tensors(run: RunDir, student: str, what: str) -> dict[str, np.ndarray]:
    """Of the last checkpoint, without BatchNorm's statistics."""
    found = load_file(run.checkpoints / f"step-{STEPS:08d}" / f"{student}.{what}.safetensors")
    return {name: tensor for name, tensor in found.items() if not name.endswith(_STATISTICS)}


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Relative 2-norm of the difference of two sets of tensors."""
    assert one.keys() == other.keys()
    vectors = [np.concatenate([found[key].ravel() for key in sorted(one)]) for found in (one, other)]
    return float(np.linalg.norm(vectors[0] - vectors[1]) / np.linalg.norm(vectors[1]))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    options = (*OPTIONS, "--train.batch=12", "--train.micro_batch=1", f"--train.steps={STEPS}")
    return Bench(tmp_path_factory.mktemp("elastic bench"), (*options, "--data.workers=0"))


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> RunDir:
    """All steps in one process."""
    run = RunDir(bench.folder / "my runs" / "undisturbed")
    bench.start(run, processes=1).ended(0)
    return run


def test_other_ranks_and_zero_stages_go_on_along_the_same_curve(
    bench: Bench, undisturbed: RunDir, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "elastic")
    for number, (ranks, stage, readers) in enumerate(LEGS, start=1):
        options = (f"--engine.zero_stage={stage}", f"--data.workers={readers}")
        training = bench.start(run, *options, processes=ranks)
        if number < len(LEGS):
            training.hold_after(2 * number - 1)
            training.process.terminate()
            training.release()
            training.ended(128 + signal.SIGTERM)
            assert run.read_status()["step"] in {2 * number - 1, 2 * number}
        else:
            training.ended(0)
    for student in STUDENTS:
        assert steps(run, student) == list(range(1, STEPS + 1))
        rows, expected = (history(one, student) for one in (run, undisturbed))
        for row, same in zip(rows, expected, strict=True):
            assert row.get("lr") == same.get("lr")
            if "loss" in row:
                assert row["loss"] == pytest.approx(same["loss"], rel=LOSS_TOLERANCE), row["step"]
        assert run.read_status()["students"][student]["updates"] == STEPS
        for what in ("weights", "optimizer"):
            found, expected = (tensors(one, student, what) for one in (run, undisturbed))
            assert distance(found, expected) < WEIGHT_TOLERANCE, (student, what)
