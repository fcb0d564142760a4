"""From score rows to means: what each network reached, how sure that is, and what could not be scored.

A row is a flat dict that is one line of JSONL: ``index``, ``key``, ``model``, ``duration_s``,
``snr_db`` (None where unknown), one value per metric (None where it failed) and ``failure``: the reason
by metric, or None where all have a value. `mvat_dist.evaluate` puts ``subset`` before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]

NOISY = "noisy"
"""Name of the unprocessed input among the models."""

BUCKET_DB = 5.0
"""Width of the buckets of the input's SNR."""

RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval then vary by a few percent of its width."""

SIGNIFICANT = 0.05

_DRAWS = 1_000_000


@dataclass(frozen=True)
class Summary:
    """One metric of one model over the clips that have a value. Higher is better."""

    mean: float | None
    """None where no clip could be scored."""
    low: float | None
    high: float | None
    """95 % bootstrap interval of the mean; None where fewer than two clips could be scored."""
    clips: int
    """Clips behind the mean."""
    failed: dict[str, int]
    """Clips without a value, by reason."""


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float | None, float | None]:
    """Mean of `values` and its 95 % percentile bootstrap interval: (mean, low, high).

    A single value has no interval (None): nothing says how much others would differ from it.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. The clips are the
    units: it says how far the mean would move with other clips of the same kind, not with other seeds
    of the training. Deterministic for equal values and `seed`.
    """
    array = np.asarray(values, np.float64)
    if array.size == 1:
        return float(array[0]), None, None
    generator = np.random.default_rng(seed)
    # Many at once, for speed; all at once would take gigabytes for large test sets.
    share = max(1, _DRAWS // len(array))
    means = [
        array[generator.integers(0, len(array), (min(share, RESAMPLES - first), len(array)))].mean(1)
        for first in range(0, RESAMPLES, share)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """How much more one model scores than another, on the clips that both have a value for."""

    mean: float | None
    """None where there is no such clip."""
    low: float | None
    high: float | None
    """95 % bootstrap interval of the mean difference; None where there are fewer than two clips."""
    p: float | None
    """Two-sided p-value of the sign-flip test: how often chance alone makes a difference as large."""
    clips: int

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the interval excludes 0 and p is below `SIGNIFICANT`; else ``no clear
        difference``. The interval alone would be too sure of a handful of clips."""
        if self.low is None or self.high is None or self.p is None:
            return "no clear difference"
        if self.low <= 0 <= self.high or self.p >= SIGNIFICANT:
            return "no clear difference"
        return "better" if self.low > 0 else "worse"


def compare(rows: Iterable[Row], model: str, reference: str, metric: str) -> Difference:
    """`model` less `reference` in `metric`, clip by clip: `paired` on the clips that both have."""
    scores: dict[str, dict[int, float]] = {model: {}, reference: {}}
    for row in rows:
        if row["model"] in scores and row[metric] is not None:
            scores[row["model"]][row["index"]] = row[metric]
    ours, theirs = scores[model], scores[reference]
    return paired([ours[index] - theirs[index] for index in sorted(ours.keys() & theirs.keys())])


def paired(values: Sequence[float]) -> Difference:
    """The mean of differences, one per clip.

    The same clips are drawn for both sides (a paired bootstrap): what makes a clip hard for both cancels.
    The p-value turns the sign of every difference at random, `RESAMPLES` times (Fisher's randomisation
    test). Neither corrects for making many comparisons.
    """
    differences = np.asarray(values, np.float64)
    if not differences.size:
        return Difference(None, None, None, None, 0)
    generator = np.random.default_rng(0)
    share = max(1, _DRAWS // differences.size)
    flipped = np.concatenate(
        [
            generator.choice((-1.0, 1.0), (min(share, RESAMPLES - first), differences.size)) @ differences
            for first in range(0, RESAMPLES, share)
        ]
    )
    # The observed signs are one of the possible draws; rounding must not count it as smaller than itself.
    as_large = np.sum(np.abs(flipped) >= abs(differences.sum()) * (1 - 1e-9))
    p = float((1 + as_large) / (1 + RESAMPLES))
    return Difference(*mean_interval(differences.tolist()), p, differences.size)


def by_snr(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the SNR of their noisy input, in buckets of `BUCKET_DB`, lowest first: ``"5..10 dB"``.

    A bucket holds its lower end. Rows without an SNR are left out.
    """
    buckets: dict[float, list[Row]] = {}
    for row in rows:
        if row["snr_db"] is not None:
            low = row["snr_db"] // BUCKET_DB * BUCKET_DB + 0.0  # 0 is never -0
            buckets.setdefault(low, []).append(row)
    return {f"{low:g}..{low + BUCKET_DB:g} dB": buckets[low] for low in sorted(buckets)}


def summarise(rows: Iterable[Row], metrics: Sequence[str]) -> dict[str, dict[str, Summary]]:
    """``{model: {metric: Summary}}``, models in the order of their first row."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    return {
        model: {metric: _summary(model_rows, metric) for metric in metrics}
        for model, model_rows in by_model.items()
    }


def _summary(rows: Sequence[Row], metric: str) -> Summary:
    values = [row[metric] for row in rows if row[metric] is not None]
    failed = Counter(row["failure"][metric] for row in rows if row[metric] is None)
    mean, low, high = mean_interval(values) if values else (None, None, None)
    return Summary(mean, low, high, len(values), dict(failed))
