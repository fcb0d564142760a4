"""The tables of an evaluation: ``scores.json``, ``scores.csv``, ``scores.md``. Fields: docs/metrics.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from mvat_dist.config.sizes import COST_SECONDS
from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.real_time_factor import Cost
from mvat_dist.evaluation.statistics import (
    NOISY,
    Difference,
    Row,
    Statistics,
    by_snr,
    compare,
    statistics_by_model,
)

FORMAT = "mvat_dist.scores.1"
ALL = "all"
"""Name of the bucket with every clip."""

LEGEND = """\
↑ higher is better, ↓ lower is better. Means over the clips that have a score, with 95 % bootstrap
intervals over clips in brackets (a single clip has none); n where some clips have none. Differences are
means over the clips that both have a score for, with 95 % paired-bootstrap intervals and the p-value of a
sign-flip test: better or worse where the interval excludes 0 and p is below 0.05.
RTF: processing time over audio duration on one CPU thread.
"""


@dataclass(frozen=True)
class Section:
    """The scores on one test set."""

    name: str
    rows: list[Row]
    summaries: dict[str, dict[str, Statistics]]
    """``{model: {metric: Statistics}}``."""
    buckets: dict[str, dict[str, dict[str, Statistics]]]
    """The same by SNR of the input."""
    reference: str | None
    """What the networks are compared with, one of them or `NOISY`; None where there is nothing to compare."""
    differences: dict[str, dict[str, Difference]]
    """``{model: {metric: model less reference}}``."""

    @property
    def clips(self) -> int:
        return len({row["index"] for row in self.rows})

    @property
    def seconds(self) -> float:
        """Duration of its clips."""
        return float(sum(row["duration_s"] or 0 for row in self.rows if row["model"] == NOISY))


def section(name: str, rows: list[Row], metrics: Sequence[str], reference: str | None) -> Section:
    """Means, buckets and differences of the `rows` of one test set."""
    others = [
        model for model in dict.fromkeys(row["model"] for row in rows) if model not in (NOISY, reference)
    ]
    differences = {
        model: {metric: compare(rows, model, reference, metric) for metric in metrics}
        for model in others
        if reference is not None
    }
    buckets = {bucket: statistics_by_model(its, metrics) for bucket, its in by_snr(rows).items()}
    compared = reference if differences else None
    return Section(name, rows, statistics_by_model(rows, metrics), buckets, compared, differences)


def record(one: Section) -> dict[str, Any]:
    """What ``scores.json`` says of a test set."""
    return {
        "clips": one.clips,
        "seconds": one.seconds,
        "scores": _plain(one.summaries),
        "buckets": {bucket: _plain(scores) for bucket, scores in one.buckets.items()},
        "reference": one.reference,
        "differences": {
            model: {
                metric: {**asdict(found), "verdict": found.verdict} for metric, found in by_metric.items()
            }
            for model, by_metric in one.differences.items()
        },
    }


def _plain(scores: Mapping[str, Mapping[str, Statistics]]) -> dict[str, dict[str, Any]]:
    return {
        model: {metric: asdict(summary) for metric, summary in by_metric.items()}
        for model, by_metric in scores.items()
    }


def table_csv(sections: Sequence[Section]) -> str:
    """One line for each test set, bucket, model and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subset", "bucket", "model", "metric", "mean", "low", "high", "clips", "failed"])
    for one in sections:
        for bucket, scores in {ALL: one.summaries, **one.buckets}.items():
            for model, by_metric in scores.items():
                for metric, its in by_metric.items():
                    failed = sum(its.failed.values())
                    writer.writerow(
                        [one.name, bucket, model, metric, its.mean, its.low, its.high, its.clips, failed]
                    )
    return text.getvalue()


def table_markdown(
    one: Section, names: Mapping[str, str], costs: Mapping[str, Cost], metrics: Sequence[str]
) -> str:
    """The tables of one test set for a reader.

    Args:
        names: the network's own name by the model's name in the rows.
        costs: by the model's name in the rows.
        metrics: the columns; the first one is shown by SNR too.
    """
    labels = {model: _label(model, names) for model in one.summaries}
    heads = ["network", *map(_heading, metrics), "parameters M ↓", f"GMAC at {COST_SECONDS:g} s ↓", "RTF ↓"]
    lines = [
        [
            labels[model],
            *(_cell(scores[name], METRICS[name].decimals) for name in metrics),
            *_cost_cells(costs.get(model)),
        ]
        for model, scores in one.summaries.items()
    ]
    title = f"## {one.name}: {one.clips} clips, {one.seconds:.0f} s\n"
    failures = [*_failures(one, metrics)]
    parts = [title, _table(lines, heads), *([""] if failures else []), *failures, ""]
    if one.buckets:
        parts += [_by_snr(one, labels, metrics[0])]
    if one.differences:
        parts += [_differences(one, labels, metrics)]
    return "\n".join(parts)


def _failures(one: Section, metrics: Sequence[str]) -> Iterator[str]:
    """A line for each reason, count and choice of metrics; models that have all three in common share it."""
    models: dict[tuple[str, int, tuple[str, ...]], list[str]] = {}
    for model, scores in one.summaries.items():
        labels: dict[tuple[str, int], list[str]] = {}
        for name in metrics:
            for failure in scores[name].failed.items():
                labels.setdefault(failure, []).append(METRICS[name].label)
        for (reason, count), unscored in labels.items():
            models.setdefault((reason, count, tuple(unscored)), []).append(model)
    for (reason, count, metrics_of), who in models.items():
        yield f"- {reason}: {count} of {one.clips} clips without {', '.join(metrics_of)} of {', '.join(who)}"


def _by_snr(one: Section, labels: Mapping[str, str], metric: str) -> str:
    lines = [
        [label, *(_cell(scores[model][metric], METRICS[metric].decimals) for scores in one.buckets.values())]
        for model, label in labels.items()
    ]
    counts = [next(iter(scores.values()))[metric] for scores in one.buckets.values()]
    heads = [
        f"{bucket} ({its.clips + sum(its.failed.values())} clips)"
        for bucket, its in zip(one.buckets, counts, strict=True)
    ]
    return f"{_heading(metric)} by SNR of the input:\n\n{_table(lines, ['network', *heads])}\n"


def _differences(one: Section, labels: Mapping[str, str], metrics: Sequence[str]) -> str:
    lines = [
        [labels[model], *(_change(found[metric], METRICS[metric].decimals) for metric in metrics)]
        for model, found in one.differences.items()
    ]
    reference = labels[str(one.reference)]
    return f"Differences from {reference}:\n\n{_table(lines, ['network', *map(_heading, metrics)])}\n"


def _table(lines: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def _heading(metric: str) -> str:
    return f"{METRICS[metric].label} {METRICS[metric].unit}".strip() + " ↑"


def _label(model: str, names: Mapping[str, str]) -> str:
    """The name in the rows, and the network's own where that is another: ``teacher (manner-b)``."""
    own = names.get(model, model)
    return model if model.endswith(own) else f"{model} ({own})"


def _cell(summary: Statistics, decimals: int) -> str:
    if summary.mean is None:
        return "-"
    shown = f"{summary.mean:.{decimals}f}"
    if summary.low is not None and summary.high is not None:
        shown += f" [{summary.low:.{decimals}f}, {summary.high:.{decimals}f}]"
    return f"{shown} n={summary.clips}" if summary.failed else shown


def _change(found: Difference, decimals: int) -> str:
    if found.mean is None:
        return "-"
    digits = decimals + 1
    shown = f"{found.mean:+.{digits}f}"
    if found.low is not None and found.high is not None:
        shown += f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{shown} {found.verdict}, p={found.p:.3g}"


def _cost_cells(known: Cost | None) -> list[str]:
    if known is None:
        return ["-"] * 3
    # A classical filter has neither weights nor matrices to multiply.
    counts = [f"{one:.2f}" if one else "-" for one in (known.parameters / 1e6, known.gmac_at_4_s)]
    return [*counts, f"{known.real_time_factor:.3f}"]
