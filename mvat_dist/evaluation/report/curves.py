"""How the runs learnt: validation scores and the enhancement loss over the steps, seeds averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report.blocks import (
    Block,
    Cell,
    Figure,
    Figures,
    Fold,
    Missing,
    Section,
    Table,
    Text,
)
from mvat_dist.evaluation.report.charts import Axis, Chart, Point, Series
from mvat_dist.evaluation.report.figures import short
from mvat_dist.evaluation.report.runs import Run, number
from mvat_dist.evaluation.report.study import Study, label

LOSS = "enhance"
"""The part of the loss that every method has, so that the curves of two methods can be compared."""

_MOST = 60
"""Points of a curve; more are averaged in equal parts."""

Curve = list[tuple[int, float]]


def section(study: Study) -> Section:
    """The curves of every student, and where they ended."""
    title = "Learning curves"
    figures = [figure for name in study.sizes for figure in _figures(study, name)]
    if not figures:
        return Section(title, [Missing("No learning curves: no run has a record yet.")])
    text = (
        "For each student the score on validation clips that picks its best weights, then the enhancement "
        "loss in training, which all methods have in common. Seeds are averaged; bars span them."
    )
    blocks: list[Block] = [Text(text), Figures(figures)]
    if (table := _table(study)) is not None:
        blocks.append(Fold("The numbers of these plots", [table]))
    return Section(title, blocks)


def _figures(study: Study, student: str) -> list[Figure]:
    metric = study.runs[0].config.valid.best
    panels = (
        (f"valid/{metric}", f"validation {label(metric)}", "higher is better"),
        (LOSS, "enhancement loss ↓", "lower is better"),
    )
    found = []
    for key, what, better in panels:
        series = []
        for style, method in study.main:
            points = _points([_curve(run, student, key) for run in method.runs])
            if points:
                series.append(Series(method.label, points, style, joined=True, dots=len(points) <= 15))
        if series:
            title = f"{short(student)}: {what}"
            found.append(
                Figure(f"{title}, {better}", Chart(title, Axis("optimiser step"), Axis(what), series))
            )
    return found


def _curve(run: Run, student: str, key: str) -> Curve:
    """(step, value) of every row that has the value; a step that was done twice counts as it was last."""
    values = {row["step"]: number(row.get(key)) for row in run.histories.get(student, []) if key in row}
    return [(step, value) for step, value in sorted(values.items()) if value is not None]


def _points(curves: Sequence[Curve]) -> list[Point]:
    """The mean over seeds at the steps that all of them have, and the range that they span."""
    known = [dict(curve) for curve in curves if curve]
    if not known:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in known)))
    points = []
    for part in np.array_split(np.array(steps), min(_MOST, len(steps))) if steps else []:
        values = [float(np.mean([curve[int(step)] for step in part])) for curve in known]
        spanned = (min(values), max(values)) if len(values) > 1 else (None, None)
        points.append(Point(float(part.mean()), float(np.mean(values)), *spanned))
    return points


def _table(study: Study) -> Table | None:
    metric = study.runs[0].config.valid.best
    digits = METRICS[metric].decimals + 1
    rows = []
    for name in study.sizes:
        for method in study.methods:
            curves = [(run, _curve(run, name, f"valid/{metric}")) for run in method.runs]
            for run, curve in curves:
                if curve:
                    rows.append(_row(f"{name}, {method.label}", run, curve, digits))
    heads = ["student, method", "seed", "best", "at step", "last", "at step"]
    caption = f"Validation {label(metric)}: the best and the last of each run"
    return Table(caption, heads, rows) if rows else None


def _row(name: str, run: Run, curve: Curve, digits: int) -> list[Cell]:
    best, last = max(curve, key=lambda one: one[1]), curve[-1]
    return [
        Cell(name),
        Cell(str(run.config.seed)),
        Cell(f"{best[1]:.{digits}f}"),
        Cell(f"{best[0]}"),
        Cell(f"{last[1]:.{digits}f}"),
        Cell(f"{last[0]}"),
    ]
