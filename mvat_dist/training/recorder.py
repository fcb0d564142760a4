"""What rank 0 writes down of a run: rows of training and validation, examples, a table of the fleet."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from mvat_dist.config.schema import Config
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.evaluation.statistics import Statistics
from mvat_dist.runs import environment
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import Row
from mvat_dist.runs.tracker import Tracker, cost, described
from mvat_dist.runs.wandb_rows import Extras
from mvat_dist.training.examples import Examples
from mvat_dist.training.setup import Inputs
from mvat_dist.training.students import Student


class Record:
    """The record of one start of a run; made on rank 0 only."""

    def __init__(
        self, config: Config, run: RunDir, ranks: Ranks, fleet: Sequence[Student], inputs: Inputs
    ) -> None:
        """Go on with the histories from where each student is."""
        self._config, self._run = config, run
        environment.record(run.environment, ranks)
        self._sizes = {student.name: student.size for student in fleet}
        for name in self._sizes:
            run.student(name).mkdir(parents=True, exist_ok=True)
        self._tracker = Tracker(run.path, {name: run.history(name) for name in self._sizes})
        # Before its first step a student may have been validated: it is again.
        self._tracker.rewind({student.name: student.progress.steps or -1 for student in fleet})
        self._scores = {name: _last_validation(self._tracker.rows(name)) for name in self._sizes}
        restarts = run.read_status().get("restarts", 0)
        self._tracker.connect(config.track, described(run, config), restarts)
        self._examples: Examples | None = None
        if config.track.examples:
            self._examples = Examples(run, inputs.clips, config.track.examples, inputs.teacher)

    def trained(self, step: int, rows: Mapping[str, Row]) -> None:
        """One row of training per student."""
        for name, row in rows.items():
            self._tracker.log(name, step, **row)

    def validated(
        self, step: int, rows: Mapping[str, Row], networks: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        """One row of validation per student, with what the `networks`, in eval mode, make of the examples."""
        for name, row in rows.items():
            self._scores[name] = {"step": step, **row}
        for name, row in rows.items():
            extras = self._examples.of(name, networks[name], device) if self._examples else Extras()
            if name == next(iter(rows)):
                extras = replace(extras, tables={"fleet": self.table()})
            self._tracker.log(name, step, extras, **row)

    def improved(self, student: Student, file: Path) -> None:
        """The weights in `file` are the student's best so far."""
        if self._config.track.artifacts:
            self._tracker.artifact(
                student.name,
                file,
                {
                    "step": student.progress.steps,
                    "student": student.name,
                    "size": asdict(student.size),
                    self._config.valid.best: student.progress.best,
                    **cost(student.size),
                },
            )

    def table(self) -> list[Row]:
        """What each student costs and what it has reached: its scores at its last validation."""
        keys = list(dict.fromkeys(key for scores in self._scores.values() for key in scores))
        return [
            {"student": name, **cost(size), **{key: self._scores[name].get(key) for key in keys}}
            for name, size in self._sizes.items()
        ]

    def finish(self, exit_code: int) -> None:
        """Close the record."""
        self._tracker.finish(exit_code)


def _last_validation(rows: Sequence[Row]) -> Row:
    scored = (row for row in reversed(rows) if any(key.startswith("valid/") for key in row))
    return next(scored, {})


def validation_row(summaries: Mapping[str, Statistics]) -> Row:
    """Mean, ends of its 95 % interval and failures, by metric; higher is better but for the last."""
    row: Row = {}
    for metric, found in summaries.items():
        row[f"valid/{metric}"] = found.mean
        row |= {f"valid/{metric}_low": found.low, f"valid/{metric}_high": found.high}
        row[f"valid/{metric}_failed"] = sum(found.failed.values())
    return row


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most that this process has had at once so far, in GB: of RAM, and of the GPU for tensors."""
    found = {"rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        found["cuda_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found
