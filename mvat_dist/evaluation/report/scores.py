"""Average the scores of every student under every method, and their differences, on each test set.

The clips are the units of every interval, and the scores of a method's seeds are averaged clip by clip before
anything is drawn. Two methods are compared on the clips that all seeds of both have a score for: the mean of
the differences, clip by clip, and its bootstrap interval. So an interval says how far a figure would move
with other clips of the same kind; how far it moves with other seeds is shown beside it, seed by seed. Design
choice: resampling the two or three seeds that one can pay for would promise more than is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from mvat_dist.evaluation import statistics
from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report.load import Evaluation, Run, number
from mvat_dist.evaluation.report.study import TEACHER, Method
from mvat_dist.evaluation.statistics import NOISY, Row, mean_interval, paired

REFERENCE = "reference"


class Clip(NamedTuple):
    """One clip: the same utterance, cut to the same length, in the same noise."""

    key: str
    duration_s: float
    snr_db: float
    """Infinite where unknown: NaN would not be equal to itself."""


class System(NamedTuple):
    """What was scored."""

    name: str
    """A student, `NOISY`, a teacher's label, or the name of another reference, such as a classical filter."""
    method: str = ""
    """Label of a student's method; empty for the noisy input, `REFERENCE` for all that is no student."""

    @property
    def label(self) -> str:
        """``manner-s-0.6gf, mvat``."""
        if self.name == NOISY:
            return "noisy input"
        return self.name if self.method == REFERENCE else f"{self.name}, {self.method}"


@dataclass(frozen=True)
class Estimate:
    """A mean, or a mean difference, with its 95 % interval, which a single clip has none of."""

    mean: float
    low: float | None
    high: float | None
    clips: int
    seeds: tuple[float, ...]
    """The same for each seed alone; for a difference, of the seeds that both sides have, or of all seeds from
    what has none, such as the teacher."""

    sign: int = 0
    """1 or -1 for a difference that is clearly above or below 0 (`statistics.Difference.verdict`)."""


class TestSet:
    """The scores on one test set."""

    __test__ = False  # no test of pytest

    def __init__(self, name: str) -> None:
        self.name = name
        self.clips: dict[Clip, None] = {}
        self._scores: dict[tuple[System, str], dict[int, dict[Clip, float]]] = {}
        """By system and metric: scores by seed and clip."""
        self._rows: dict[System, set[tuple[int, Clip]]] = {}
        self._asked: dict[tuple[System, str], set[int]] = {}
        """By system and metric: the seeds that were evaluated with this metric."""
        # Each figure stands in several places of the page; all are asked for after the last row was added.
        self._means = cache(self._mean_by_clip)
        self.estimate = cache(self._estimate)
        self.difference = cache(self._difference)

    @property
    def metrics(self) -> list[str]:
        """The metrics with at least one score, in the usual order, `primary` first."""
        scored = {metric for _, metric in self._scores}
        return sorted((name for name in METRICS if name in scored), key=lambda name: name != "pesq_wb")

    @property
    def primary(self) -> str:
        """The metric that plots and claims are about."""
        return self.metrics[0]

    @property
    def minutes(self) -> float:
        """Duration of all clips."""
        return sum(clip.duration_s for clip in self.clips) / 60

    @property
    def references(self) -> list[System]:
        """Teachers, and whatever else was scored beside the students."""
        return [system for system in self._rows if system.method == REFERENCE]

    def has(self, system: System) -> bool:
        return system in self._rows

    def add(self, system: System, seed: int, row: Row) -> None:
        """Add one row; an earlier one of the same seed and clip stays."""
        snr = number(row.get("snr_db"))
        clip = Clip(row["key"], number(row.get("duration_s")) or 0.0, math.inf if snr is None else snr)
        if (seed, clip) in self._rows.setdefault(system, set()):
            return
        self._rows[system].add((seed, clip))
        self.clips[clip] = None
        for metric in METRICS:
            if metric in row:
                self._asked.setdefault((system, metric), set()).add(seed)
            value = number(row.get(metric))
            if value is not None:
                self._scores.setdefault((system, metric), {}).setdefault(seed, {})[clip] = value

    def seeds(self, system: System) -> list[int]:
        """The seeds that have rows."""
        return sorted({seed for seed, _ in self._rows.get(system, ())})

    def buckets(self) -> dict[str, frozenset[Clip]]:
        """The clips of each SNR bucket that has some, by the bucket's name."""
        known = [clip for clip in self.clips if math.isfinite(clip.snr_db)]
        buckets = statistics.by_snr({"snr_db": clip.snr_db, "clip": clip} for clip in known)
        return {name: frozenset(row["clip"] for row in rows) for name, rows in buckets.items()}

    def unscored(self, system: System, metric: str, among: frozenset[Clip] | None = None) -> int:
        """Clips, of all or of a bucket, that a seed of `system` lacks; 0 where none was asked for."""
        if (system, metric) not in self._asked:
            return 0
        clips = self.clips.keys() if among is None else among
        return len(clips - self._means(system, metric).keys())

    def _mean_by_clip(self, system: System, metric: str) -> dict[Clip, float]:
        """The mean over seeds of every clip that all of them have a score for."""
        scores = self._scores.get((system, metric), {})
        # Seeds evaluated without this metric are left out; a seed whose clips all failed is not.
        asked = self._asked.get((system, metric), set())
        shared = set.intersection(*(set(scores.get(seed, ())) for seed in asked)) if asked else set()
        return {clip: float(np.mean([by_clip[clip] for by_clip in scores.values()])) for clip in shared}

    def _estimate(self, system: System, metric: str, among: frozenset[Clip] | None = None) -> Estimate | None:
        """The mean of `system`, over all clips or those of a bucket; None where no clip has a score."""
        means = self._means(system, metric)
        clips = _ordered(means if among is None else means.keys() & among)
        if not clips:
            return None
        scores = self._scores[system, metric]
        by_seed = tuple(float(np.mean([scores[seed][clip] for clip in clips])) for seed in sorted(scores))
        return Estimate(*mean_interval([means[clip] for clip in clips]), len(clips), by_seed)

    def _difference(self, system: System, reference: System, metric: str) -> Estimate | None:
        """How much higher `system` scores than `reference`; None where no clip has a score of both."""
        ours, theirs = self._means(system, metric), self._means(reference, metric)
        clips = _ordered(ours.keys() & theirs.keys())
        if not clips:
            return None
        a, b = self._scores[system, metric], self._scores[reference, metric]
        if reference.method in ("", REFERENCE):  # it has no seeds
            b = dict.fromkeys(a, b[0])
        by_seed = tuple(
            float(np.mean([a[seed][clip] - b[seed][clip] for clip in clips]))
            for seed in sorted(a.keys() & b.keys())
        )
        difference = paired([ours[clip] - theirs[clip] for clip in clips])
        assert difference.mean is not None
        sign = {"better": 1, "worse": -1}.get(difference.verdict, 0)
        return Estimate(difference.mean, difference.low, difference.high, difference.clips, by_seed, sign)


def _ordered(clips: Iterable[Clip]) -> list[Clip]:
    """Sort clips: their order decides what a bootstrap draws, and must not depend on that of the runs."""
    return sorted(clips)


def collect(methods: Sequence[Method], problems: list[str]) -> list[TestSet]:
    """Every test set that a run was scored on, by name; what is scored twice is named in `problems`."""
    tests: dict[str, TestSet] = {}
    first_runs: dict[tuple[str, System, int], Run] = {}
    for method in methods:
        for run in method.runs:
            for evaluation in run.evaluations:
                for row in evaluation.rows:
                    name = f"{evaluation.name} / {row['subset']}"
                    system = _system(row["model"], method, run)
                    seed = run.config.seed if system.name in run.sizes else 0
                    first = first_runs.setdefault((name, system, seed), run)
                    if system.method != method.label or first is run:
                        tests.setdefault(name, TestSet(name)).add(system, seed, row)
                _name_duplicates(evaluation, method, run, first_runs, problems)
    return [test for _, test in sorted(tests.items()) if test.metrics]


def _name_duplicates(
    evaluation: Evaluation,
    method: Method,
    run: Run,
    first_runs: dict[tuple[str, System, int], Run],
    problems: list[str],
) -> None:
    """Name the students of `run` that an earlier run of the same method and seed has scores of: only those
    of the first run count."""
    for subset in dict.fromkeys(row["subset"] for row in evaluation.rows):
        for student in run.sizes:
            name = f"{evaluation.name} / {subset}"
            first = first_runs.get((name, System(student, method.label), run.config.seed), run)
            if first is not run:
                problems.append(
                    f"{run.folder.path}: {student} on {name} is left out: it is the same experiment and "
                    f"seed as {first.folder.path}"
                )


def _system(model: str, method: Method, run: Run) -> System:
    if model in run.sizes:
        return System(model, method.label)
    if model == NOISY:
        return System(NOISY)
    return System(run.teacher_label if model == TEACHER else model, REFERENCE)
