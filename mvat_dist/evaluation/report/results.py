"""Scores of every student under every method, and what they differ by, on each test set.

The clips are the units of every interval, and the scores of a method's seeds are averaged clip by clip
before anything is drawn. Two methods are compared on the clips that all seeds of both have a score for:
the mean of the differences, clip by clip, and its bootstrap interval. So an interval says how far a
figure would move with other clips of the same kind; how far it moves with other seeds is shown beside
it, seed by seed. Design choice: with the two or three seeds that one can pay for, resampling the seeds
would pretend to know more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report.methods import Method
from mvat_dist.evaluation.report.runs import Evaluation, Run, number
from mvat_dist.evaluation.statistics import NOISY, Row, mean_interval, paired

TEACHER = "teacher"
"""As `mvat_dist.evaluate` calls it."""
REFERENCE = "reference"


class Clip(NamedTuple):
    """One clip: the same utterance, cut to the same length, in the same noise."""

    key: str
    duration_s: float
    snr_db: float
    """Infinite where unknown: NaN would not be equal to itself."""


class Who(NamedTuple):
    """What was scored."""

    name: str
    """A student, `NOISY`, the teacher's name, or that of another reference, such as a classical filter."""
    method: str = ""
    """Label of a student's method; empty for the noisy input, `REFERENCE` for what the students are not."""


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


Scores = dict[int, dict[Clip, float]]
"""By seed and clip."""


class TestSet:
    """The scores on one test set."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clips: dict[Clip, None] = {}
        self._scores: dict[tuple[Who, str], Scores] = {}
        self._rows: dict[Who, set[tuple[int, Clip]]] = {}
        self._asked: dict[tuple[Who, str], set[int]] = {}
        # Each figure stands in several places of the page.
        self.estimate = cache(self._estimate)
        self.difference = cache(self._difference)

    @property
    def metrics(self) -> list[str]:
        """The metrics with at least one score, in the usual order."""
        found = {metric for _, metric in self._scores}
        return [name for name in METRICS if name in found]

    @property
    def primary(self) -> str:
        """The metric that plots and claims are about."""
        return "pesq_wb" if "pesq_wb" in self.metrics else self.metrics[0]

    @property
    def seconds(self) -> float:
        """Duration of all clips."""
        return sum(clip.duration_s for clip in self.clips)

    @property
    def references(self) -> list[Who]:
        """Teachers, and whatever else was scored beside the students."""
        return [who for who in self._rows if who.method == REFERENCE]

    def has(self, who: Who) -> bool:
        return who in self._rows

    def add(self, who: Who, seed: int, row: Row) -> None:
        """One row; what was known of the same seed and clip stays."""
        snr = number(row.get("snr_db"))
        clip = Clip(row["key"], number(row.get("duration_s")) or 0.0, math.inf if snr is None else snr)
        if (seed, clip) in self._rows.setdefault(who, set()):
            return
        self._rows[who].add((seed, clip))
        self.clips[clip] = None
        for metric in METRICS:
            if metric in row:
                self._asked.setdefault((who, metric), set()).add(seed)
            value = number(row.get(metric))
            if value is not None:
                self._scores.setdefault((who, metric), {}).setdefault(seed, {})[clip] = value

    def seeds(self, who: Who) -> list[int]:
        """The seeds that have rows."""
        return sorted({seed for seed, _ in self._rows.get(who, ())})

    def _means(self, who: Who, metric: str) -> dict[Clip, float]:
        """The mean over seeds of every clip that all of them have a score for."""
        scores = self._scores.get((who, metric), {})
        # A seed that was evaluated without this metric does not count; one whose clips all failed does.
        asked = self._asked.get((who, metric), set())
        shared = set.intersection(*(set(scores.get(seed, ())) for seed in asked)) if asked else set()
        return {clip: float(np.mean([its[clip] for its in scores.values()])) for clip in shared}

    def unscored(self, who: Who, metric: str, among: frozenset[Clip] | None = None) -> int:
        """Clips, of all or of a bucket, that a seed of `who` has no score for; 0 where none was asked for."""
        if (who, metric) not in self._asked:
            return 0
        clips = self.clips.keys() if among is None else among
        return len(clips - self._means(who, metric).keys())

    def _estimate(self, who: Who, metric: str, among: frozenset[Clip] | None = None) -> Estimate | None:
        """The mean of `who`, over all clips or those of a bucket; None where no clip has a score."""
        means = self._means(who, metric)
        chosen = _ordered(means if among is None else means.keys() & among)
        if not chosen:
            return None
        seeds = self._scores[who, metric]
        alone = tuple(float(np.mean([seeds[seed][clip] for clip in chosen])) for seed in sorted(seeds))
        return Estimate(*mean_interval([means[clip] for clip in chosen]), len(chosen), alone)

    def _difference(self, who: Who, reference: Who, metric: str) -> Estimate | None:
        """How much higher `who` scores than `reference`; None where no clip has a score of both."""
        ours, theirs = self._means(who, metric), self._means(reference, metric)
        chosen = _ordered(ours.keys() & theirs.keys())
        if not chosen:
            return None
        a, b = self._scores[who, metric], self._scores[reference, metric]
        seedless = reference.method in ("", REFERENCE)
        beside = dict.fromkeys(a, b[0]) if seedless else b
        alone = tuple(
            float(np.mean([a[seed][clip] - beside[seed][clip] for clip in chosen]))
            for seed in sorted(a.keys() & beside)
        )
        found = paired([ours[clip] - theirs[clip] for clip in chosen])
        assert found.mean is not None
        sign = {"better": 1, "worse": -1}.get(found.verdict, 0)
        return Estimate(found.mean, found.low, found.high, found.clips, alone, sign)


def _ordered(clips: Iterable[Clip]) -> list[Clip]:
    """The order decides what a bootstrap draws: it must not depend on the order of the runs."""
    return sorted(clips)


def collect(methods: Sequence[Method], problems: list[str]) -> list[TestSet]:
    """Every test set that a run was scored on, by name; what is scored twice is named in `problems`."""
    sets: dict[str, TestSet] = {}
    taken: dict[tuple[str, Who, int], Run] = {}
    for method in methods:
        for run in method.runs:
            for evaluation in run.evaluations:
                for row in evaluation.rows:
                    name = f"{evaluation.name} / {row['subset']}"
                    who = _who(row["model"], method, run)
                    seed = run.config.seed if who.name in run.sizes else 0
                    first = taken.setdefault((name, who, seed), run)
                    if who.method != method.label or first is run:
                        sets.setdefault(name, TestSet(name)).add(who, seed, row)
                _name_twins(evaluation, method, run, taken, problems)
    return [one for _, one in sorted(sets.items()) if one.metrics]


def _name_twins(
    evaluation: Evaluation,
    method: Method,
    run: Run,
    taken: dict[tuple[str, Who, int], Run],
    problems: list[str],
) -> None:
    """Two runs of the same method, student and seed: the second counts for nothing, and that is said."""
    for subset in dict.fromkeys(row["subset"] for row in evaluation.rows):
        for name in run.sizes:
            key = (f"{evaluation.name} / {subset}", Who(name, method.label), run.config.seed)
            if (first := taken.get(key, run)) is not run:
                problems.append(
                    f"{run.path}: {name} on {key[0]} is left out: it is the same experiment and seed as "
                    f"{first.path}"
                )


def _who(model: str, method: Method, run: Run) -> Who:
    if model in run.sizes:
        return Who(model, method.label)
    if model == NOISY:
        return Who(NOISY)
    return Who(teacher_name(run.teacher) if model == TEACHER else model, REFERENCE)


def teacher_name(teacher: dict[str, Any] | None) -> str:
    """``teacher NAME``, with the start of its fingerprint: two of one name are two teachers."""
    known = teacher or {}
    name, fingerprint = str(known.get("name") or "unknown"), str(known.get("sha256") or "")
    return f"teacher {name}" + (f" ({fingerprint[:8]})" if fingerprint else "")
