"""The record of a fleet: one JSONL history per student, and W&B's copy of it.

The histories are the truth and need nothing. Nothing that goes wrong in W&B comes out of `Tracker`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvat_dist.config import parser
from mvat_dist.config import sizes as students
from mvat_dist.config.schema import SAMPLE_RATE, Config, TrackConfig
from mvat_dist.config.sizes import COST_SECONDS, Size
from mvat_dist.io import read_json
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History, Row
from mvat_dist.runs.wandb_rows import Extras
from mvat_dist.runs.wandb_sync import Mirror


class Tracker:
    """Writes the histories of a fleet; made on rank 0 only."""

    def __init__(self, folder: Path, histories: dict[str, Path]) -> None:
        self._histories = {name: History(path) for name, path in histories.items()}
        self._folder = folder
        self._mirror: Mirror | None = None

    def rewind(self, steps: Mapping[str, int]) -> None:
        """Start or go on from each student's step: later rows are forgotten."""
        for name, history in self._histories.items():
            history.rewind(steps[name])

    def connect(self, config: TrackConfig, about: Mapping[str, dict[str, Any]], restarts: int = 0) -> None:
        """Have W&B copy the histories from now on, unless it is switched off.

        Args:
            config: whether and where.
            about: what W&B shows as each run's configuration, by student.
            restarts: how often the run was started before this start.
        """
        self._mirror = Mirror(RunDir(self._folder), self._histories, config, about, restarts)
        self._mirror.start()

    def rows(self, name: str) -> list[Row]:
        """All rows of a student so far."""
        return self._histories[name].rows()

    def log(self, name: str, step: int, extras: Extras | None = None, **row: Any) -> None:
        """Append one row to a student's record; `extras` are for W&B alone."""
        row = {"step": step, **row}
        self._histories[name].append(row)
        if self._mirror:
            self._mirror.log(name, row, extras)

    def artifact(self, name: str, file: Path, about: dict[str, Any]) -> None:
        """Offer a student's best weights to W&B."""
        if self._mirror:
            self._mirror.artifact(name, file, about)

    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B runs; within a minute, and within seconds where Slurm has stopped the run."""
        if self._mirror:
            self._mirror.finish(exit_code)


def described(run: RunDir, config: Config) -> dict[str, dict[str, Any]]:
    """What W&B shows as the configuration of each student's run, by student."""
    shared = {**parser.as_dict(config), "environment": read_json(run.environment)}
    sizes = students.select(config.student, config.sizes)
    return {name: {**shared, "student_name": name, **cost(size)} for name, size in sizes.items()}


def cost(size: Size) -> dict[str, float]:
    """What a student of this size costs to run; lower is better."""
    macs = students.macs(size, round(COST_SECONDS * SAMPLE_RATE))
    return {"parameters_m": students.parameters(size) / 1e6, "gmac_4s": macs / 1e9}
