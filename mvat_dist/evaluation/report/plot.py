"""Draw one plot with matplotlib, as an SVG inside the page that takes the page's colours and font."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

STYLES = 8
"""Number of series styles; shapes and dashes tell them apart without colour."""

_MARKERS = ("o", "s", "D", "^", "v", "P", "h", "X")
_DASHES = ("-", (0, (6, 3)), "-", (0, (2, 2)), "-.", (0, (4, 2)), (0, (10, 4)), ":")
_LONGEST_NAME = 34
"""Letters of a series' name."""

# Stand-ins, which become the variables of the page's style sheet: it has one set of colours for light and one
# for dark.
_INK, _MUTED, _LINE, _GROUND = "#000001", "#000002", "#000003", "#000004"
_SERIES = tuple(f"#0001{number:02x}" for number in range(STYLES))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _GROUND: "ground"} | {
    colour: f"s{number}" for number, colour in enumerate(_SERIES)
}

_INCHES = (5.3, 3.8)
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names may have dollar signs
    "font.size": 10,
    "legend.fontsize": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.xmargin": 0.07,
    "axes.ymargin": 0.08,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Point:
    """A value with its interval, where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    ringed: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one kind, drawn in one of `STYLES` styles; None is the colour of the text."""

    name: str
    points: Sequence[Point]
    style: int | None
    joined: bool = False
    dots: bool = True
    """On every point, or on the last one alone."""


@dataclass(frozen=True)
class Axis:
    """What is drawn along an axis, with the unit and which direction is better."""

    title: str
    log: bool = False
    names: Sequence[str] = ()
    """Categories at 0, 1, 2 ...; empty for a number."""


@dataclass(frozen=True)
class Plot:
    """One plot, with at least one point."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = ()
    """Horizontal lines: name and height."""
    notes: Sequence[tuple[float, str]] = ()
    """Names above positions on the x axis."""
    offset: float = 0.0
    """Points (1/72 inch) between series over the same number: their intervals would hide each other."""


def svg(plot: Plot) -> str:
    """The plot as an ``<svg>`` element; equal plots give equal text."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # Its identifiers begin with a hash, which has to differ from plot to plot of a page.
    salt = hashlib.sha256(repr(plot).encode("utf-8", "backslashreplace")).hexdigest()
    with style.context({**_STYLE, "svg.hashsalt": salt}, after_reset=True):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        lines = [_draw_series(axes, plot, number, series) for number, series in enumerate(plot.series)]
        names = [_cut(series.name) for series in plot.series]
        for name, height in plot.levels:
            lines.append(
                axes.axhline(height, color=_MUTED, linestyle=(0, (5, 4)), linewidth=1, clip_on=False)
            )
            names.append(name)
        _draw_axes(axes, plot)
        _draw_notes(axes, plot)
        columns = 2 if len(plot.series) + len(plot.levels) < 5 else 3
        if max(len(series.name) for series in plot.series) > 16:
            columns = 2
        # Given the names, because matplotlib by itself leaves out those that begin with "_".
        figure.legend(lines, names, loc="outside lower left", ncols=columns, handlelength=2.4)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inlined(drawn.getvalue(), _described(plot))


def _draw_series(axes: Axes, plot: Plot, number: int, series: Series) -> Line2D:
    """Draw a series with its intervals and rings; the line that stands for it in the legend."""
    colour = _INK if series.style is None else _SERIES[series.style % STYLES]
    dash: Any = "-" if series.style is None else _DASHES[series.style % STYLES]
    place = (number + 0.5) / len(plot.series) - 0.5
    shift = 0.6 * place if plot.x.names else 0.0
    x = [point.x + shift for point in series.points]
    (line,) = axes.plot(
        x,
        [point.y for point in series.points],
        color=colour,
        linestyle=dash if series.joined else "none",
        marker="*" if series.style is None else _MARKERS[series.style % STYLES],
        markersize=10 if series.style is None else None,
        markeredgecolor=_GROUND,
        markeredgewidth=0.7,
        markevery=None if series.dots else [len(x) - 1],
        zorder=3,
        gid=f"series-{number}",
    )
    lines = [line]
    for at, point in zip(x, series.points, strict=True):
        if point.low is not None and point.high is not None:
            ends = [point.low, point.high]
            lines += axes.plot(
                [at, at], ends, color=colour, linewidth=1.3, zorder=2, gid=f"interval-{number}"
            )
        if point.ringed:
            lines += axes.plot(
                at, point.y, "o", color=_INK, markersize=14, markerfacecolor="none", gid="ring"
            )
    for drawn in lines:
        drawn.set_clip_on(False)
        if plot.offset:  # once the limits of the axes know the values
            drawn.set_transform(_offset(axes, plot.offset * len(plot.series) * place))
    return line


def _offset(axes: Axes, points: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    return axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)


def _draw_axes(axes: Axes, plot: Plot) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xlabel(plot.x.title)
    axes.set_ylabel(plot.y.title)
    for axis, described in ((axes.xaxis, plot.x), (axes.yaxis, plot.y)):
        if described.names:
            axis.set_ticks(range(len(described.names)), [_cut(name) for name in described.names])
            axes.set_xlim(-0.5, len(described.names) - 0.5)
            continue
        if described.log:
            axes.set_xscale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        else:
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for grid_line in axes.yaxis.get_gridlines():
        grid_line.set_clip_on(False)


def _draw_notes(axes: Axes, plot: Plot) -> None:
    """Names above their places on the x axis, moved apart where they would overlap."""
    if not plot.notes:
        return
    values = [value for value, _ in plot.notes]
    to_fraction = axes.transData + axes.transAxes.inverted()
    places = [float(to_fraction.transform((value, axes.get_ylim()[0]))[0]) for value in values]
    for value, place, (_, name) in zip(values, spread(places, 0.05, 0.0, 1.0), plot.notes, strict=True):
        axes.axvline(value, color=_LINE, linewidth=0.8, zorder=0, clip_on=False)
        axes.annotate(
            _cut(name),
            (value, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(place, 1.05),
            textcoords="axes fraction",
            rotation=40,
            rotation_mode="anchor",
            fontsize=9,
            color=_MUTED,
            arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        )


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, in the same order and near the given ones, from `low` to `high`.

    Too many for the room overlap evenly.
    """
    if not positions:
        return []
    gap = min(gap, (high - low) / max(1, len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [0.0] * len(positions)
    floor = low
    for index in order:
        placed[index] = max(positions[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _described(plot: Plot) -> str:
    """The plot in words, for who does not see it."""
    lines = []
    for series in plot.series:
        first, last = series.points[0], series.points[-1]
        points = f"{len(series.points)} points from {_short(first.y)} to {_short(last.y)}"
        lines.append(f"{series.name}: {points if len(series.points) > 1 else _short(first.y)}")
    lines += [f"{name}: {_short(height)}" for name, height in plot.levels]
    return f"{plot.title}. {plot.y.title} against {plot.x.title}. {'; '.join(lines)}."


def _inlined(drawn: str, description: str) -> str:
    """matplotlib's file as an element of the page."""
    text = drawn[drawn.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)  # it would be that of the page
    body = re.sub(r'<g id="([^"]+)"', r'<g class="\1"', body)  # the same in every plot
    body = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", body)
    body = re.sub(r"font-family: [^\";]*; ", "", body)  # the page has one
    head = f'<svg class="plot" viewBox="{box[1]}" role="img" aria-label="{escape(description)}">'
    return f"{head}{body.strip()}"
