"""Choose what the plots of a report show: cost against quality, the views, the SNR, learning curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mvat_dist.config.sizes import COST_SECONDS
from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report.comparison import ViewLosses, scored_systems
from mvat_dist.evaluation.report.load import Run, number
from mvat_dist.evaluation.report.plot import STYLES, Axis, Plot, Point, Series, svg
from mvat_dist.evaluation.report.scores import Clip, Estimate, System, TestSet
from mvat_dist.evaluation.report.study import Cost, Method, Study
from mvat_dist.evaluation.report.table import Cell, Table
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.evaluation.table import label, score_text

NOISY_STYLE = STYLES - 1
"""The noisy input's style beside methods, of which a comparison has fewer."""

LOSS = "enhance"
"""The part of the loss that every method has, so that the curves of two methods can be compared."""

_CURVE_POINTS = 60
"""Most points of a curve; more are averaged in equal parts."""

_COSTS: dict[str, Callable[[Cost], float | None]] = {
    f"GMAC for {COST_SECONDS:g} s of audio (lower is better)": lambda cost: cost.gmac,
    "parameters in millions (lower is better)": lambda cost: cost.parameters / 1e6,
    "real-time factor on one CPU thread (lower is better)": lambda cost: cost.real_time_factor,
}


@dataclass(frozen=True)
class Figure:
    """A plot and its caption. Its numbers stand in a table nearby, which is what the Markdown twin shows."""

    caption: str
    plot: Plot

    @property
    def svg(self) -> str:
        """The plot, drawn when a template asks for it."""
        return svg(self.plot)


def _short(student: str) -> str:
    """A student's name where there is little room."""
    return student.removeprefix("manner-")


def _point(x: float, estimate: Estimate, *, ringed: bool = False) -> Point:
    return Point(x, estimate.mean, estimate.low, estimate.high, ringed)


@dataclass(frozen=True)
class PricedNetwork:
    """A student or a teacher with its costs and its score."""

    name: str
    method: Method | None
    """None for a teacher."""
    cost: Cost
    score: Estimate

    @property
    def label(self) -> str:
        return f"{self.name}, {self.method.label}" if self.method else self.name


def priced_networks(study: Study, test: TestSet) -> list[PricedNetwork]:
    """Every student and teacher whose cost and score are known."""
    networks = []
    for student, method in scored_systems(study, test):
        score = test.estimate(System(student, method.label), test.primary)
        if score is not None:
            networks.append(PricedNetwork(student, method, study.cost(student), score))
    for system in test.references:
        cost, score = study.teacher_cost(system.name), test.estimate(system, test.primary)
        if cost is not None and score is not None:
            networks.append(PricedNetwork(system.name, None, cost, score))
    return networks


def cost_figures(study: Study, test: TestSet, networks: Sequence[PricedNetwork]) -> list[Figure]:
    """Quality against each of the three costs."""
    figures = [_cost_figure(study, test, networks, title, price_of) for title, price_of in _COSTS.items()]
    return [figure for figure in figures if figure is not None]


def _cost_figure(
    study: Study,
    test: TestSet,
    networks: Sequence[PricedNetwork],
    title: str,
    price_of: Callable[[Cost], float | None],
) -> Figure | None:
    priced = [(price, network) for network in networks if (price := price_of(network.cost)) is not None]
    if not priced:
        return None
    series = []
    for style, method in [*study.main, (None, None)]:
        points = [
            _point(price, network.score, ringed=_on_the_front(price, network, priced))
            for price, network in sorted(priced, key=lambda item: item[0])
            if network.method is method
        ]
        if points:
            series.append(Series(method.label if method else "teacher", points, style))
    names = {_short(network.name): price for price, network in priced if network.method}
    quality = label(test.primary)
    plot = Plot(
        f"{quality} against {title}, {test.name}",
        Axis(title, log=True),
        Axis(quality),
        series,
        notes=[(price, name) for name, price in names.items()],
        offset=4,
    )
    return Figure(f"{quality} against {title}", plot)


def _on_the_front(
    price: float, network: PricedNetwork, priced: Sequence[tuple[float, PricedNetwork]]
) -> bool:
    """Whether no other network is at most as dear and better, or cheaper and as good.

    Only of those that have all clips: one that failed on the hard clips has the higher mean of the others.
    """
    most = max(other.score.clips for _, other in priced)
    mean = network.score.mean
    return network.score.clips == most and not any(
        (other_price <= price and other.score.mean > mean)
        or (other_price < price and other.score.mean >= mean)
        for other_price, other in priced
        if other.score.clips == most
    )


def cost_table(test: TestSet, networks: Sequence[PricedNetwork]) -> Table:
    """The numbers of the plots of cost against quality."""
    rows = []
    for network in networks:
        cost = network.cost
        cells = [
            network.label,
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.gmac:.2f}",
            f"{cost.real_time_factor:.3f}" if cost.real_time_factor else "-",
            score_text(network.score, test.primary),
        ]
        rows.append([Cell(text) for text in cells])
    heads = [
        "network",
        "parameters, millions ↓",
        f"GMAC for {COST_SECONDS:g} s ↓",
        "real-time factor ↓",
        label(test.primary),
    ]
    caption = "Cost and quality. Real-time factor: processing time over duration, one CPU thread"
    return Table(caption, heads, rows)


def view_figure(test: TestSet, losses: ViewLosses) -> Figure:
    """What each student loses without each view."""
    methods = list(dict.fromkeys(method for _, method in losses))
    students = dict.fromkeys(student for student, _ in losses)
    series = [
        Series(
            _short(student),
            [_point(at, losses[student, m]) for at, m in enumerate(methods) if (student, m) in losses],
            style,
        )
        for style, student in enumerate(students)
    ]
    title = f"difference of {label(test.primary)}"
    plot = Plot(
        f"{title} without a view, {test.name}",
        Axis("view that is switched off", names=[" and ".join(method.views_off) for method in methods]),
        Axis(title),
        series,
        levels=[("all views", 0.0)],
    )
    return Figure("What is lost without a view: below 0, the view helps. Bars: 95 % intervals.", plot)


def snr_figures(study: Study, test: TestSet) -> list[Figure]:
    """The scores of each student by the SNR of the noisy input."""
    buckets = test.buckets()
    figures = [_snr_figure(study, test, student, buckets) for student in study.sizes if buckets]
    return [figure for figure in figures if figure is not None]


def _snr_figure(
    study: Study, test: TestSet, student: str, buckets: dict[str, frozenset[Clip]]
) -> Figure | None:
    def series_of(name: str, system: System, style: int | None) -> list[Series]:
        estimates = [test.estimate(system, test.primary, clips) for clips in buckets.values()]
        points = [_point(at, estimate) for at, estimate in enumerate(estimates) if estimate is not None]
        return [Series(name, points, style)] if points else []

    students = [
        series
        for style, method in study.main
        for series in series_of(method.label, System(student, method.label), style)
    ]
    if not students:
        return None
    references = [
        series
        for system in test.references
        for series in series_of(system.name.partition(" (")[0], system, None)
    ]
    title = f"{_short(student)}: {label(test.primary)} by SNR"
    plot = Plot(
        f"{title}, {test.name}",
        Axis("SNR of the noisy input", names=list(buckets)),
        Axis(label(test.primary)),
        [*series_of("noisy input", System(NOISY), NOISY_STYLE), *students, *references],
    )
    return Figure(f"{title}. Bars: 95 % intervals.", plot)


def curve_figures(study: Study) -> list[Figure]:
    """For each student the validation score that picks its best weights, and the loss, by step."""
    metric = study.runs[0].config.valid.best
    panels = (
        (f"valid/{metric}", f"validation {label(metric)}", "higher is better"),
        (LOSS, "enhancement loss ↓", "lower is better"),
    )
    figures = []
    for student in study.sizes:
        for key, quantity, better in panels:
            series = []
            for style, method in study.main:
                points = _mean_curve([_curve(run, student, key) for run in method.runs])
                if points:
                    dots = len(points) <= 15
                    series.append(Series(method.label, points, style, joined=True, dots=dots))
            if series:
                title = f"{_short(student)}: {quantity}"
                plot = Plot(title, Axis("optimiser step"), Axis(quantity), series)
                figures.append(Figure(f"{title}, {better}", plot))
    return figures


def _curve(run: Run, student: str, key: str) -> dict[int, float]:
    """Value by step, in order; a step that was done twice counts as it was last."""
    rows = sorted((row for row in run.histories.get(student, []) if key in row), key=lambda row: row["step"])
    values = {row["step"]: number(row[key]) for row in rows}
    return {step: value for step, value in values.items() if value is not None}


def _mean_curve(curves: Sequence[dict[int, float]]) -> list[Point]:
    """The mean over seeds at the steps that all of them have, and the range that they span."""
    by_seed = [curve for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    if not steps:
        return []
    points = []
    for part in np.array_split(np.array(steps), min(_CURVE_POINTS, len(steps))):
        values = [float(np.mean([curve[int(step)] for step in part])) for curve in by_seed]
        low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
        points.append(Point(float(part.mean()), float(np.mean(values)), low, high))
    return points


def curve_table(study: Study) -> Table | None:
    """The best and the last validation of each run; None where there was none."""
    metric = study.runs[0].config.valid.best
    digits = METRICS[metric].decimals + 1
    rows = []
    for student in study.sizes:
        for method in study.methods:
            for run in method.runs:
                if curve := _curve(run, student, f"valid/{metric}"):
                    best, last = max(curve, key=lambda step: curve[step]), max(curve)
                    cells = [
                        f"{student}, {method.label}",
                        str(run.config.seed),
                        f"{curve[best]:.{digits}f}",
                        str(best),
                        f"{curve[last]:.{digits}f}",
                        str(last),
                    ]
                    rows.append([Cell(text) for text in cells])
    heads = ["student, method", "seed", "best", "at step", "last", "at step"]
    caption = f"Validation {label(metric)}: the best and the last of each run"
    return Table(caption, heads, rows) if rows else None
