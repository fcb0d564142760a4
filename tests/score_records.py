"""A ``scores.json`` as evaluations write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mvat_dist.evaluation.score_record import Inputs, Scores
from mvat_dist.evaluation.statistics import Statistics
from mvat_dist.evaluation.table import Section
from mvat_dist.io import write_record


def score(mean: float | None, margin: float | None = None) -> Statistics:
    """A mean over nine clips with an interval of `margin` to both sides."""
    low, high = (None, None) if mean is None or margin is None else (mean - margin, mean + margin)
    return Statistics(mean, low, high, 0 if mean is None else 9, {})


def write_scores(
    file: Path,
    scores: Mapping[str, Mapping[str, dict[str, Statistics]]],
    networks: Mapping[str, str],
    data: str = "/shards",
) -> None:
    """Write the record of an evaluation of the best weights.

    Args:
        file: what to write.
        scores: ``{test set: {model: {metric: Statistics}}}``.
        networks: fingerprints by name.
        data: where the clips came from.
    """
    sections = {
        name: Section(9, 27.0, dict(by_model), buckets={}, reference=None, differences={})
        for name, by_model in scores.items()
    }
    write_record(
        file,
        Scores(
            models=["a run"],
            weights="best",
            limit=0,
            max_seconds=0.0,
            data=data,
            time="2026-11-22T20:15:00+0100",
            machine="here",
            reference=None,
            fingerprint="0" * 64,
            inputs=Inputs(dict(networks), dict.fromkeys(scores, "1" * 64), [], {}, "cpu"),
            metrics={},
            networks={},
            sections=sections,
        ),
    )
