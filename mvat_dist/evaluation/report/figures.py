"""The plots of scores: cost against quality, the views, the SNR; each with a table of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mvat_dist.evaluation import statistics
from mvat_dist.evaluation.report import methods as grouping
from mvat_dist.evaluation.report.blocks import Block, Cell, Figure, Figures, Fold, Missing, Table, Text
from mvat_dist.evaluation.report.charts import Axis, Chart, Point, Series
from mvat_dist.evaluation.report.comparison import mark, unscored
from mvat_dist.evaluation.report.methods import Method
from mvat_dist.evaluation.report.results import REFERENCE, Clip, Estimate, TestSet, Who
from mvat_dist.evaluation.report.study import COST_SECONDS, Cost, Study, label, shown, signed
from mvat_dist.evaluation.report.style import STYLES
from mvat_dist.evaluation.statistics import NOISY

NOISY_STYLE = STYLES - 1
"""Of a noisy input among methods; a comparison has fewer."""


def short(student: str) -> str:
    """A student's name where there is little room."""
    return student.removeprefix("manner-")


def point(x: float, estimate: Estimate, *, ringed: bool = False) -> Point:
    """A mean and its interval at `x`."""
    return Point(x, estimate.mean, estimate.low, estimate.high, ringed)


def pareto(study: Study, test: TestSet) -> list[Block]:
    """Quality against each of the three costs."""
    networks = _networks(study, test)
    if not networks:
        return [Missing("No plot of cost against quality: no student has a score here.")]
    figures = [
        figure
        for title, cost in _COSTS.items()
        if (figure := _pareto(study, test, networks, title, cost)) is not None
    ]
    noisy = shown(test.estimate(Who(NOISY), test.primary), test.primary)
    text = (
        "Bars are 95 % intervals; methods stand side by side over the same cost. A ring: nothing that has as "
        f"many clips is both cheaper and better. The noisy input has {noisy}. "
        f"{_measured_on(study.machines)}"
    )
    return [Text(text), Figures(figures), Fold("The numbers of these plots", [_cost_table(test, networks)])]


def _measured_on(machines: Sequence[str]) -> str:
    """Whose real-time factors are shown, and whose are not."""
    if not machines:
        return "No real-time factor was measured."
    first, *others = machines
    apart = f"; those of {'; '.join(others)} do not compare with them and are left out" if others else ""
    return f"Real-time factors were measured on: {first}{apart}."


_COSTS: dict[str, Callable[[Cost], float | None]] = {
    f"GMAC for {COST_SECONDS:g} s of audio (lower is better)": lambda cost: cost.gmac,
    "parameters in millions (lower is better)": lambda cost: cost.parameters / 1e6,
    "real-time factor on one CPU thread (lower is better)": lambda cost: cost.real_time_factor,
}

_Network = tuple[str, Method | None, Cost, Estimate]
"""Name, method (None for a teacher), cost, score."""


def _networks(study: Study, test: TestSet) -> list[_Network]:
    found: list[_Network] = []
    for name, method in study.scored(test):
        estimate = test.estimate(Who(name, method.label), test.primary)
        if estimate is not None:
            found.append((name, method, study.cost(name), estimate))
    for who in test.references:
        cost, estimate = study.teacher_cost(who), test.estimate(who, test.primary)
        if cost is not None and estimate is not None:
            found.append((who.name, None, cost, estimate))
    return found


_Priced = tuple[str, Method | None, float, Estimate]
"""Name, method, one of its costs, score."""


def _pareto(
    study: Study,
    test: TestSet,
    networks: Sequence[_Network],
    title: str,
    price_of: Callable[[Cost], float | None],
) -> Figure | None:
    priced: list[_Priced] = [
        (name, method, price, score)
        for name, method, cost, score in networks
        if (price := price_of(cost)) is not None
    ]
    if not priced:
        return None
    series = []
    for number, method in [*study.main, (None, None)]:
        its = sorted((one for one in priced if one[1] is method), key=lambda one: one[2])
        points = [point(one[2], one[3], ringed=_best(one, priced)) for one in its]
        if points:
            series.append(Series(method.label if method else "teacher", points, number))
    notes = {short(name): price for name, method, price, _ in priced if method}
    chart = Chart(
        f"{label(test.primary)} against {title}, {test.name}",
        Axis(title, log=True),
        Axis(label(test.primary)),
        series,
        notes=[(price, name) for name, price in notes.items()],
        apart=5,
    )
    return Figure(f"{label(test.primary)} against {title}", chart)


def _best(one: _Priced, priced: Sequence[_Priced]) -> bool:
    """Whether nothing is at most as dear and better, or cheaper and as good.

    Only of those that have all clips: what failed on the hard ones has the higher mean of the others.
    """
    price, mean = one[2], one[3].mean
    most = max(its[3].clips for its in priced)
    whole = [its for its in priced if its[3].clips == most]
    return one in whole and not any(
        (other <= price and its.mean > mean) or (other < price and its.mean >= mean)
        for _, _, other, its in whole
    )


def _cost_table(test: TestSet, networks: Sequence[_Network]) -> Table:
    rows = [
        [
            Cell(f"{name}, {method.label}" if method else name),
            Cell(f"{cost.parameters / 1e6:.2f}"),
            Cell(f"{cost.gmac:.2f}"),
            Cell(f"{cost.real_time_factor:.3f}" if cost.real_time_factor else "-"),
            Cell(shown(score, test.primary)),
        ]
        for name, method, cost, score in networks
    ]
    heads = [
        "network",
        "parameters, millions ↓",
        f"GMAC for {COST_SECONDS:g} s ↓",
        "real-time factor ↓",
        label(test.primary),
    ]
    caption = "Cost and quality. Real-time factor: processing time over duration, one CPU thread"
    return Table(caption, heads, rows)


def views(study: Study, test: TestSet) -> list[Block]:
    """What is lost without each view."""
    found = {
        (name, method): difference
        for name in study.sizes
        for method in study.methods
        if (difference := _lost(study, test, name, method)) is not None
    }
    if not found:
        return [Missing("No ablation of the views: no run lacks one beside a run with all of them.")]
    ablated = [method for method in study.methods if any(key[1] is method for key in found)]
    students = [name for name in study.sizes if any(key[0] == name for key in found)]
    rows = [
        [Cell(name), *(_difference_cell(found.get((name, method)), test.primary) for method in ablated)]
        for name in students
    ]
    metric = label(test.primary)
    caption = f"{metric}: difference from all views and 95 % interval; ▼: the view helps"
    told = "What is lost without a view: below 0, the view helps. Bars: 95 % intervals."
    return [
        Figures([Figure(told, _views_chart(test, students, ablated, found))]),
        Table(caption, ["student", *(method.label for method in ablated)], rows),
    ]


def _lost(study: Study, test: TestSet, student: str, method: Method) -> Estimate | None:
    """How much `method`, which lacks a view, differs from the same with all of them."""
    full = grouping.with_all_views(method, study.methods) if method.views_off else None
    if full is None:
        return None
    return test.difference(Who(student, method.label), Who(student, full.label), test.primary)


def _views_chart(
    test: TestSet,
    students: Sequence[str],
    ablated: Sequence[Method],
    found: dict[tuple[str, Method], Estimate],
) -> Chart:
    series = [
        Series(
            short(name),
            [point(at, found[name, method]) for at, method in enumerate(ablated) if (name, method) in found],
            number,
        )
        for number, name in enumerate(students)
    ]
    title = f"difference of {label(test.primary)}"
    names = [" and ".join(method.views_off) for method in ablated]
    return Chart(
        f"{title} without a view, {test.name}",
        Axis("view that is switched off", names=names),
        Axis(title),
        series,
        levels=[("all views", 0.0)],
    )


def _difference_cell(difference: Estimate | None, metric: str) -> Cell:
    return Cell(signed(difference, metric) if difference else "-", mark=mark(difference))


def by_snr(study: Study, test: TestSet) -> list[Block]:
    """The scores by the SNR of the noisy input."""
    buckets = _buckets(test)
    if not buckets:
        return [Missing("No scores by SNR: the SNR of the clips is not known.")]
    whos = [Who(NOISY), *test.references, *(Who(name, m.label) for name, m in study.scored(test))]
    found = {
        who: {name: test.estimate(who, test.primary, clips) for name, clips in buckets.items()}
        for who in whos
    }
    figures = [_snr_figure(study, test, name, found) for name in study.sizes]
    heads = [f"{name}, {len(clips)} clips" for name, clips in buckets.items()]
    rows = [
        [Cell(_named(who))]
        + [
            Cell(shown(found[who][name], test.primary), unscored(test, who, test.primary, clips))
            for name, clips in buckets.items()
        ]
        for who in whos
    ]
    caption = f"{label(test.primary)} by the SNR of the noisy input: mean and 95 % interval"
    return [
        Figures([figure for figure in figures if figure is not None]),
        Fold("The numbers of these plots", [Table(caption, ["network", *heads], rows)]),
    ]


def _named(who: Who) -> str:
    if who.name == NOISY:
        return "noisy input"
    return f"{who.name}, {who.method}" if who.method != REFERENCE else who.name


def _buckets(test: TestSet) -> dict[str, frozenset[Clip]]:
    """The clips of each SNR bucket that has some."""
    known = [clip for clip in test.clips if math.isfinite(clip.snr_db)]
    found = statistics.by_snr({"snr_db": clip.snr_db, "clip": clip} for clip in known)
    return {name: frozenset(row["clip"] for row in rows) for name, rows in found.items()}


def _snr_figure(
    study: Study, test: TestSet, student: str, found: dict[Who, dict[str, Estimate | None]]
) -> Figure | None:
    rows: list[tuple[str, Who, int | None]] = [
        (method.label, Who(student, method.label), number) for number, method in study.main
    ]
    rows += [(who.name.partition(" (")[0], who, None) for who in test.references]
    series = []
    for name, who, style in rows:
        estimates = list(found.get(who, {}).values())
        points = [point(at, one) for at, one in enumerate(estimates) if one is not None]
        if points:
            series.append(Series(name, points, style))
    if all(one.style is None for one in series):
        return None
    names = list(found[Who(NOISY)])
    noisy = [point(at, one) for at, one in enumerate(found[Who(NOISY)].values()) if one is not None]
    if noisy:
        series.insert(0, Series("noisy input", noisy, NOISY_STYLE))
    title = f"{short(student)}: {label(test.primary)} by SNR"
    return Figure(
        f"{title}. Bars: 95 % intervals.",
        Chart(
            f"{title}, {test.name}",
            Axis("SNR of the noisy input", names=names),
            Axis(label(test.primary)),
            series,
        ),
    )
