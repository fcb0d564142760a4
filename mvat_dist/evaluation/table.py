"""The results table: labels, digits and layout of scores, intervals, differences, costs and failures.

Evaluations, model cards and reports write their scores with these functions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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

ALL = "all"
"""Name of the bucket with every clip."""

MISSING = "-"
"""What stands in place of a value that there is none of."""

LEGEND = """\
↑ higher is better, ↓ lower is better; the best of a column is bold. Means over the clips that have a score,
with 95 % bootstrap intervals over clips in brackets (a single clip has none); n where some clips have none.
Differences are means over the clips that both have a score for, with 95 % paired-bootstrap intervals and the
p-value of a sign-flip test: better or worse where the interval excludes 0 and p is below 0.05.
RTF: processing time over audio duration on one CPU thread.
"""


class Estimate(Protocol):
    """A mean and its interval, of scores or of differences."""

    @property
    def mean(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


def label(metric: str) -> str:
    """Heading of a metric's column: ``PESQ-WB (MOS) ↑``."""
    unit = METRICS[metric].unit
    return METRICS[metric].label + (f" ({unit})" if unit else "") + " ↑"


def score_text(estimate: Estimate | None, metric: str) -> str:
    """A score and its interval: ``2.31 [2.25, 2.37]``."""
    digits = METRICS[metric].decimals
    return _with_interval(estimate, lambda value: _minus(f"{value:.{digits}f}"))


def change_text(value: float, metric: str) -> str:
    """A difference, with one more digit than a score: ``+0.083``, ``−0.004``."""
    return _minus(f"{value:+.{METRICS[metric].decimals + 1}f}")


def difference_text(estimate: Estimate, metric: str) -> str:
    """A difference and its interval: ``+0.083 [+0.031, +0.135]``."""
    return _with_interval(estimate, lambda value: change_text(value, metric))


def _with_interval(estimate: Estimate | None, written: Callable[[float], str]) -> str:
    if estimate is None or estimate.mean is None:
        return MISSING
    if estimate.low is None or estimate.high is None:
        return written(estimate.mean)
    return f"{written(estimate.mean)} [{written(estimate.low)}, {written(estimate.high)}]"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | None = None
    """By which the best of a column is found; None where it does not take part."""


Best = Callable[[Iterable[float]], float]
"""`max` where higher is better, `min` where lower is."""


def markdown(
    heads: Sequence[str], rows: Sequence[Sequence[Cell]], best: Mapping[int, Best] | None = None
) -> str:
    """A table of Markdown.

    Args:
        heads: headings of the columns.
        rows: their cells.
        best: columns of which the best value is bold, where there are different ones.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    for number, choose in (best or {}).items():
        values = [cell.value for cell in columns[number] if cell.value is not None] if columns else []
        if len(set(values)) > 1:
            columns[number] = [
                _bold(cell) if cell.value == choose(values) else cell for cell in columns[number]
            ]
    lines = [[cell.text for cell in row] for row in zip(*columns, strict=True)]
    # Not parsed: tabulate would take the last zero of a mean.
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def _bold(cell: Cell) -> Cell:
    """The mean in bold, without its interval."""
    mean, *interval = cell.text.split(" ", 1)
    return replace(cell, text=" ".join([f"**{mean}**", *interval]))


@dataclass(frozen=True)
class Section:
    """The scores on one test set: what ``scores.json`` holds of it."""

    clips: int
    seconds: float
    """Duration of its clips."""
    scores: dict[str, dict[str, Statistics]]
    """``{model: {metric: Statistics}}``."""
    buckets: dict[str, dict[str, dict[str, Statistics]]]
    """The same by SNR of the input."""
    reference: str | None
    """What the networks are compared with, one of them or `NOISY`; None where there is nothing to compare."""
    differences: dict[str, dict[str, Difference]]
    """``{model: {metric: model less reference}}``."""


def section(rows: list[Row], metrics: Sequence[str], reference: str | None) -> Section:
    """Means, buckets and differences of the `rows` of one test set."""
    models = [
        model for model in dict.fromkeys(row["model"] for row in rows) if model not in (NOISY, reference)
    ]
    differences = {
        model: {metric: compare(rows, model, reference, metric) for metric in metrics}
        for model in models
        if reference is not None
    }
    return Section(
        clips=len({row["index"] for row in rows}),
        seconds=float(sum(row["duration_s"] or 0 for row in rows if row["model"] == NOISY)),
        scores=statistics_by_model(rows, metrics),
        buckets={bucket: statistics_by_model(part, metrics) for bucket, part in by_snr(rows).items()},
        reference=reference if differences else None,
        differences=differences,
    )


def sections_csv(sections: Mapping[str, Section]) -> str:
    """One line for each test set, bucket, model and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subset", "bucket", "model", "metric", "mean", "low", "high", "clips", "failed"])
    for subset, scored in sections.items():
        for bucket, scores in {ALL: scored.scores, **scored.buckets}.items():
            for model, by_metric in scores.items():
                for metric, known in by_metric.items():
                    failed = sum(known.failed.values())
                    writer.writerow(
                        [
                            subset,
                            bucket,
                            model,
                            metric,
                            known.mean,
                            known.low,
                            known.high,
                            known.clips,
                            failed,
                        ]
                    )
    return text.getvalue()


def section_markdown(
    name: str,
    scored: Section,
    names: Mapping[str, str],
    costs: Mapping[str, Cost],
) -> str:
    """The tables of one test set for a reader.

    Args:
        name: of the test set.
        scored: its scores; the first metric is shown by SNR too.
        names: the network's own name by the model's name in the rows.
        costs: by the model's name in the rows.
    """
    labels = {model: _label(model, names) for model in scored.scores}
    parts = [
        f"## {name}: {scored.clips} clips, {scored.seconds:.0f} s\n",
        score_table(scored.scores, labels, costs),
    ]
    if lines := [*failures(scored.scores, scored.clips)]:
        parts += ["", *lines]
    parts.append("")
    if scored.buckets:
        parts.append(_by_snr(scored, labels))
    if scored.differences:
        parts.append(_differences(scored, labels))
    return "\n".join(parts)


def score_table(
    scores: Mapping[str, Mapping[str, Statistics]],
    labels: Mapping[str, str] | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> str:
    """One row for each model, one column for each metric, the best of a column in bold.

    Args:
        scores: ``{model: {metric: Statistics}}``, the same metrics of all.
        labels: what the models are called, where not by their names.
        costs: by model; without it there are no columns of costs.
    """
    metrics = [*next(iter(scores.values()), {})]
    heads = ["network", *map(label, metrics)]
    best: dict[int, Best] = {1 + number: max for number in range(len(metrics))}
    rows = [
        [
            Cell(labels[model] if labels else model),
            *(_score_cell(known, metric) for metric, known in by_metric.items()),
        ]
        for model, by_metric in scores.items()
    ]
    if costs is not None:
        best |= {len(heads) + number: min for number in range(3)}
        heads += ["parameters (M) ↓", f"GMAC at {COST_SECONDS:g} s ↓", "RTF ↓"]
        rows = [[*row, *_cost_cells(costs.get(model))] for model, row in zip(scores, rows, strict=True)]
    return markdown(heads, rows, best)


def failures(scores: Mapping[str, Mapping[str, Statistics]], clips: int) -> Iterator[str]:
    """A line for each reason, count and choice of metrics; models that have all three in common share it."""
    models: dict[tuple[str, int, tuple[str, ...]], list[str]] = {}
    for model, by_metric in scores.items():
        unscored: dict[tuple[str, int], list[str]] = {}
        for metric, known in by_metric.items():
            for reason_count in known.failed.items():
                unscored.setdefault(reason_count, []).append(METRICS[metric].label)
        for (reason, count), labels in unscored.items():
            models.setdefault((reason, count, tuple(labels)), []).append(model)
    for (reason, count, metrics), names in models.items():
        yield f"- {reason}: {count} of {clips} clips without {', '.join(metrics)} of {', '.join(names)}"


def _by_snr(scored: Section, labels: Mapping[str, str]) -> str:
    metric = next(iter(next(iter(scored.scores.values()))))
    counts = [next(iter(scores.values()))[metric] for scores in scored.buckets.values()]
    heads = [
        f"{bucket} ({known.clips + sum(known.failed.values())} clips)"
        for bucket, known in zip(scored.buckets, counts, strict=True)
    ]
    rows = [
        [Cell(text), *(_score_cell(scores[model][metric], metric) for scores in scored.buckets.values())]
        for model, text in labels.items()
    ]
    best: dict[int, Best] = {1 + number: max for number in range(len(heads))}
    return f"{label(metric)} by SNR of the input:\n\n{markdown(['network', *heads], rows, best)}\n"


def _differences(scored: Section, labels: Mapping[str, str]) -> str:
    rows = [
        [Cell(labels[model]), *(Cell(_tested(known, metric)) for metric, known in by_metric.items())]
        for model, by_metric in scored.differences.items()
    ]
    heads = ["network", *map(label, next(iter(scored.differences.values())))]
    return f"Differences from {labels[str(scored.reference)]}:\n\n{markdown(heads, rows)}\n"


def _tested(known: Difference, metric: str) -> str:
    """A difference with its verdict and p-value."""
    text = difference_text(known, metric)
    return text if known.p is None else f"{text} {known.verdict}, p={known.p:.3g}"


def _score_cell(known: Statistics, metric: str) -> Cell:
    text = score_text(known, metric)
    return Cell(f"{text} n={known.clips}" if known.failed and known.clips else text, known.mean)


def _cost_cells(cost: Cost | None) -> list[Cell]:
    if cost is None:
        return [Cell(MISSING)] * 3
    # A classical filter has neither weights nor matrices to multiply.
    counts = [
        Cell(f"{value:.2f}", value) if value else Cell(MISSING)
        for value in (cost.parameters / 1e6, cost.gmac_at_4_s)
    ]
    return [*counts, Cell(f"{cost.real_time_factor:.3f}", cost.real_time_factor)]


def _label(model: str, names: Mapping[str, str]) -> str:
    """The name in the rows, and the network's own where that is another: ``teacher (manner-b)``."""
    own_name = names.get(model, model)
    return model if model.endswith(own_name) else f"{model} ({own_name})"
