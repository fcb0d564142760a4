"""A group of two tiny students on two ranks, and the law that every disturbed run of it has to keep."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mvat_dist.runs import lock
from mvat_dist.runs.folder import RunDir
from tests.faults.processes import Training
from tests.tiny_corpus import write_pairs, write_sources
from tests.waiting import until

STEPS = 14
SAVE_EVERY = 4
"""Checkpoints of steps 4, 8, 12 and 14."""

STUDENTS = ("tiny", "mini")
OPTIONS = (
    "--sizes={tiny: {kind: small, hidden: 4, depth: 2}, mini: {kind: base, hidden: 6, depth: 2}}",
    f"--student={','.join(STUDENTS)}",
    "--distil.method=none",
    "--data.segment_seconds=0.25",
    "--data.workers=1",
    # Augmentation and accumulation; one-cycle is the default schedule.
    "--data.tempo_probability=0.5",
    "--data.reverb_probability=0.5",
    "--data.bandwidth_probability=0.3",
    "--data.codec_probability=0.3",
    "--data.codecs=mu-law",
    "--train.batch=8",
    "--train.micro_batch=2",
    f"--train.steps={STEPS}",
    f"--train.save_every={SAVE_EVERY}",
    "--train.validate_every=1000",
    "--valid.clips=1",
    "--valid.best=si_sdr",
    "--track.every=1",
    "--track.examples=0",
)
# What a row says of the machine, not of the learning.
TIMING = ("audio_seconds_per_second", "joules", "time", "memory")


def write_corpus(folder: Path) -> Path:
    """A second of tones and noise per utterance, with a room."""
    generator = np.random.default_rng(0)
    axis = np.arange(16_000) / 16_000
    tones = [0.2 * np.sin(2 * np.pi * generator.uniform(100, 300) * axis) for _ in range(13)]
    write_sources(folder, "train_clean", {f"c{i:02d}": tone for i, tone in enumerate(tones[:12])}, shards=12)
    write_sources(folder, "train_noise", {"n0": 0.1 * generator.standard_normal(32_000)})
    room = 0.05 * generator.standard_normal(900) * np.exp(-np.arange(900) / 200)
    room[32] = 0.9
    write_sources(folder, "train_rir", {"r0": room})
    write_pairs(folder, "valid", {"v0": (tones[12] + 0.03 * generator.standard_normal(16_000), tones[12])})
    return folder


@dataclass
class Bench:
    """A place for runs of the tiny students: their corpus, and the run that nothing disturbs."""

    folder: Path
    options: Sequence[str] = OPTIONS

    @cached_property
    def corpus(self) -> Path:
        return write_corpus(self.folder / "tiny corpus")

    @cached_property
    def undisturbed(self) -> RunDir:
        run = RunDir(self.folder / "my runs" / "undisturbed")
        self.start(run).ended(0)
        assert steps(run, STUDENTS[0]) == list(range(1, run.read_status()["steps"] + 1))
        return run

    def start(
        self, run: RunDir, *more: str, processes: int = 2, variables: dict[str, str] | None = None
    ) -> Training:
        """Start or go on with a run, in processes of this machine, as a user does; W&B off unless told."""
        command = [sys.executable, "-m", "mvat_dist.submit", "--cluster=local", f"--nodes={processes}"]
        place = [f"--data.train={self.corpus}", f"--runs={run.path.parent}", f"--name={run.path.name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **(variables or {})}
        return Training(run, [*command, *self.options, *place, *more], environment, processes)


def history(run: RunDir, student: str) -> list[dict[str, Any]]:
    """What a student's record says, without what differs between two runs of the same."""
    rows = [json.loads(line) for line in run.history(student).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def steps(run: RunDir, student: str) -> list[int]:
    """The steps of which the record holds a loss."""
    return [row["step"] for row in history(run, student) if "loss" in row]


def weights(run: RunDir, student: str, which: Any) -> dict[str, bytes]:
    """Of a student, as bytes: NaN and signed zeros count too."""
    return {name: tensor.tobytes() for name, tensor in load_file(run.weights(student, which)).items()}


def assert_same(run: RunDir, undisturbed: RunDir) -> None:
    """A disturbed run is finished as the undisturbed one: weights bit for bit, every row once."""
    status = run.read_status()
    assert status["state"] == "finished", status
    assert status["step"] == undisturbed.read_status()["step"]
    for student in STUDENTS:
        assert history(run, student) == history(undisturbed, student), student
        for which in ("last", "best"):
            assert weights(run, student, which) == weights(undisturbed, student, which), (student, which)
    assert checkpoints(run)[-1] == checkpoints(undisturbed)[-1]
    # Its last act, after all that is checked above.
    until(lambda: lock.holder(run.path) is None, 60, "the lock of a finished run is not released")
    assert not list(run.path.rglob(".*.tmp"))


def checkpoints(run: RunDir) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(
        int(path.name.removeprefix("step-"))
        for path in run.checkpoints.glob("step-*")
        if (path / "manifest.json").exists()
    )
