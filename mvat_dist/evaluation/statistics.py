"""Means, 95 % intervals and paired differences of score rows, and the clips that could not be scored.

A row is a flat dict that is one line of JSONL: ``index``, ``key``, ``model``, ``duration_s``,
``snr_db`` (None where unknown), one value per metric (None where it failed) and ``failure``: the reason
by metric, or None where all have a value. `mvat_dist.evaluate` puts ``subset`` before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
Verdict = Literal["better", "worse", "no clear difference"]

NOISY = "noisy"
"""Name of the unprocessed input among the models."""

BUCKET_DB = 5.0
"""Width of the buckets of the input's SNR."""

RESAMPLES = 2000
"""Draws of the bootstrap and of the sign-flip test: the ends of an interval then vary by a few percent of its
width."""

SIGNIFICANT = 0.05

_BATCH_VALUES = 1_000_000
"""Values drawn at once: all resamples of a large test set would take gigabytes."""


@dataclass(frozen=True)
class Statistics:
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
    """Mean of `values` and its 95 % bootstrap interval over clips: (mean, low, high).

    The interval says how far the mean would move with other clips of the same kind, not with other seeds of
    the training. A single value has none (None): nothing says how much others would differ from it. Equal
    values and `seed` give equal intervals.

    The interval is the percentile one (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
    chapter 13), which unlike BCa is defined where all clips score the same.
    """
    from scipy import stats  # here, because it takes a second, and `--help` needs none of it

    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if array.size == 1:
        return mean, None, None
    interval = stats.bootstrap(
        (array,),
        np.mean,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=_batch(array.size),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return mean, float(interval.low), float(interval.high)


def _batch(size: int) -> int:
    return max(1, _BATCH_VALUES // size)


@dataclass(frozen=True)
class Difference:
    """How much more one model scores than another, on the clips that both have a value for."""

    mean: float | None
    """None where there is no such clip."""
    low: float | None
    high: float | None
    """95 % bootstrap interval of the mean difference; None where there are fewer than two clips."""
    p: float | None
    """Two-sided p-value of the sign-flip test: how often chance alone makes a difference as large. Exact
    where the clips are so few that all signs can be tried."""
    clips: int
    verdict: Verdict = "no clear difference"
    """Better or worse where the interval excludes 0 and p is below `SIGNIFICANT`: the interval of a handful
    of clips alone is too narrow."""


def compare(rows: Iterable[Row], model: str, reference: str, metric: str) -> Difference:
    """`model` less `reference` in `metric`, clip by clip: `paired` on the clips that both have."""
    scores: dict[str, dict[int, float]] = {model: {}, reference: {}}
    for row in rows:
        if row["model"] in scores and row[metric] is not None:
            scores[row["model"]][row["index"]] = row[metric]
    ours, theirs = scores[model], scores[reference]
    return paired([ours[index] - theirs[index] for index in sorted(ours.keys() & theirs.keys())])


def paired(values: Sequence[float]) -> Difference:
    """The mean of differences, one per clip, with its interval and p-value.

    The bootstrap draws the same clips for both sides, so what makes a clip hard for both cancels. The p-value
    is that of Fisher's randomisation test, which flips the sign of every difference: all combinations where
    they are at most `RESAMPLES`, else as many random ones. Neither corrects for making many comparisons.
    """
    differences = np.asarray(values, np.float64)
    if not differences.size:
        return Difference(None, None, None, None, 0)
    mean, low, high = mean_interval(differences.tolist())
    p = _sign_flip_p(differences)
    return Difference(mean, low, high, p, differences.size, _verdict(low, high, p))


def _verdict(low: float | None, high: float | None, p: float) -> Verdict:
    if low is None or high is None or low <= 0 <= high or p >= SIGNIFICANT:
        return "no clear difference"
    return "better" if low > 0 else "worse"


def _sign_flip_p(differences: npt.NDArray[np.float64]) -> float:
    from scipy import stats

    if differences.size == 1:
        return 1.0  # either sign is as large; SciPy asks for two values
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_batch(differences.size),
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


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


def statistics_by_model(rows: Iterable[Row], metrics: Sequence[str]) -> dict[str, dict[str, Statistics]]:
    """``{model: {metric: Statistics}}``, models in the order of their first row."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    return {
        model: {metric: _statistics(model_rows, metric) for metric in metrics}
        for model, model_rows in by_model.items()
    }


def _statistics(rows: Sequence[Row], metric: str) -> Statistics:
    values = [row[metric] for row in rows if row[metric] is not None]
    failed = Counter(row["failure"][metric] for row in rows if row[metric] is None)
    mean, low, high = mean_interval(values) if values else (None, None, None)
    return Statistics(mean, low, high, len(values), dict(failed))
