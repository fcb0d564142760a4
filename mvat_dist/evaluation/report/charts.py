"""Plots as SVG inside the page: text as text, a name at every line, intervals as bars.

Written here because that is little, and because only an SVG in the page takes its colours, its dark
ground and its font; a plotting library would bring its fonts as outlines, and itself as a dependency.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mvat_dist.evaluation.report.style import STYLES

_LEFT, _PLOT, _HEIGHT, _BOTTOM = 58.0, 360.0, 240.0, 46.0
_LETTER = 7.2
"""Width of a letter at 12 px, on average."""
_LONGEST = 34
"""Letters of a label."""
_GAP = 15.0
"""Pixels between the baselines of two labels."""
_DASHES = ("", "7 3", "", "2 3", "9 3 2 3", "4 2", "12 4", "1 3")


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
    """What is drawn along it, with the unit and which direction is better."""

    title: str
    log: bool = False
    names: Sequence[str] = ()
    """Categories at 0, 1, 2 ...; empty for a number."""


@dataclass(frozen=True)
class Chart:
    """One plot."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = ()
    """Horizontal lines: name and height."""
    notes: Sequence[tuple[float, str]] = ()
    """Names above positions on the x axis."""
    apart: float = 0.0
    """Pixels between series over the same number, so that their intervals do not hide each other."""


class _Scale:
    """From values to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], begin: float, end: float) -> None:
        self.axis, self.begin, self.end = axis, begin, end
        if axis.names:
            low, high = -0.5, len(axis.names) - 0.5
        else:
            low, high = min(map(self._of, values)), max(map(self._of, values))
            margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
            low, high = low - margin, high + margin
        self.low, self.high = low, high

    def _of(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[tuple[float, str]]:
        """Where to write what."""
        if self.axis.names:
            return [(self(number), name) for number, name in enumerate(self.axis.names)]
        values = _log_ticks(self.low, self.high) if self.axis.log else _ticks(self.low, self.high)
        return [(self(value), _short(value)) for value in values]


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [value for value in values if low <= math.log10(value) <= high]
    # Within less than a decade the round numbers are not those of a logarithm.
    return inside if len(inside) > 2 else [value for value in _ticks(10**low, 10**high) if value > 0]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


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


def svg(chart: Chart) -> str:
    """The plot, which has at least one point, as an ``<svg>`` element."""
    identity = "plot-" + hashlib.sha256(repr(chart).encode()).hexdigest()[:12]
    top = 24.0 + (0.5 * _LETTER * max((len(_cut(name)) for _, name in chart.notes), default=0))
    names = [one.name for one in chart.series] + [name for name, _ in chart.levels]
    right = 26 + _LETTER * max(len(_cut(name)) for name in names)
    if chart.notes:
        right = max(right, _LETTER * max(len(_cut(name)) for _, name in chart.notes))
    width, height = _LEFT + _PLOT + right, top + _HEIGHT + _BOTTOM
    points = [point for one in chart.series for point in one.points]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None] + [v for _, v in chart.levels]
    x = _Scale(chart.x, [point.x for point in points], _LEFT, _LEFT + _PLOT)
    y = _Scale(chart.y, ys, top + _HEIGHT, top)
    parts = [
        *_frame(chart, x, y, top),
        *(_level(value, y) for _, value in chart.levels),
        *(_series(one, number, chart, x, y) for number, one in enumerate(chart.series)),
        *_labels(chart, x, y, top),
        *_notes(chart, x, top),
    ]
    described = _described(chart)
    return (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-labelledby="{identity}-title {identity}-desc">'
        f'<title id="{identity}-title">{escape(chart.title)}</title>'
        f'<desc id="{identity}-desc">{escape(described)}</desc>' + "".join(parts) + "</svg>"
    )


def _described(chart: Chart) -> str:
    def ends(one: Series) -> str:
        first, last = one.points[0], one.points[-1]
        if len(one.points) == 1:
            return f"{one.name}: {_short(first.y)}"
        return f"{one.name}: {len(one.points)} points from {_short(first.y)} to {_short(last.y)}"

    lines = [ends(one) for one in chart.series] + [f"{name}: {_short(v)}" for name, v in chart.levels]
    return f"{chart.y.title} against {chart.x.title}. " + "; ".join(lines) + "."


def _frame(chart: Chart, x: _Scale, y: _Scale, top: float) -> list[str]:
    bottom, end = top + _HEIGHT, _LEFT + _PLOT
    parts = []
    for place, name in y.ticks():
        parts.append(f'<path class="grid" d="M{_LEFT:.1f} {place:.1f}H{end:.1f}"/>')
        parts.append(_text(_LEFT - 6, place + 4, name, "tick", "end"))
    for place, name in x.ticks():
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom:.1f}v4"/>')
        parts.append(_text(place, bottom + 17, name, "tick", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT:.1f} {top:.1f}V{bottom:.1f}H{end:.1f}"/>')
    parts.append(_text((_LEFT + end) / 2, bottom + 38, chart.x.title, "", "middle"))
    middle = top + _HEIGHT / 2
    turn = f' transform="rotate(-90 14 {middle:.1f})"'
    parts.append(_text(14, middle, chart.y.title, "", "middle", turn))
    return parts


def _level(value: float, y: _Scale) -> str:
    return f'<path class="level" d="M{_LEFT:.1f} {y(value):.1f}H{_LEFT + _PLOT:.1f}"/>'


def _dodge(number: int, chart: Chart) -> float:
    """How far a series stands to the right of its place, so that series stand beside each other."""
    count = len(chart.series)
    room = 0.6 * _PLOT / len(chart.x.names) if chart.x.names else chart.apart * count
    return room * ((number + 0.5) / count - 0.5)


def _series(one: Series, number: int, chart: Chart, x: _Scale, y: _Scale) -> str:
    shift = _dodge(number, chart)
    places = [(x(point.x) + shift, y(point.y), point) for point in one.points]
    parts = []
    if one.joined and len(places) > 1:
        dash = _DASHES[one.style % STYLES] if one.style is not None else ""
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in places)
        parts.append(
            f'<path class="line" d="M{path}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>"
        )
    for px, py, point in places:
        if point.low is not None and point.high is not None:
            parts.append(f'<path class="bar" d="M{px:.1f} {y(point.low):.1f}V{y(point.high):.1f}"/>')
        if point.ringed:
            parts.append(f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="8.5"/>')
        if one.dots or point is one.points[-1]:
            parts.append(_dot(one.style, px, py))
    return f'<g class="{_class(one.style)}">' + "".join(parts) + "</g>"


def _class(style: int | None) -> str:
    return "plain" if style is None else f"s{style % STYLES}"


def _dot(style: int | None, x: float, y: float) -> str:
    shapes = (
        "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        "M-4 -4h8v8h-8z",
        "M0 -5.5L5.5 0L0 5.5L-5.5 0z",
        "M0 -5L5 4H-5z",
        "M0 5L5 -4H-5z",
        "M-1.7 -5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
        "M-5 -2.5L0 -5L5 -2.5V2.5L0 5L-5 2.5z",
        "M-5 -5L0 -2L5 -5L2 0L5 5L0 2L-5 5L-2 0z",
    )
    shape = "M0 -6L1.6 -1.9L6 -1.9L2.5 .8L3.7 5L0 2.4L-3.7 5L-2.5 .8L-6 -1.9L-1.6 -1.9z"
    if style is not None:
        shape = shapes[style % STYLES]
    return f'<path class="dot" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def _labels(chart: Chart, x: _Scale, y: _Scale, top: float) -> list[str]:
    """The name of every series and level at the right, with a leader to where it ends."""
    ends = [
        (x(one.points[-1].x) + _dodge(number, chart), y(one.points[-1].y), one.name, one)
        for number, one in enumerate(chart.series)
    ]
    all_ends = [*ends, *((_LEFT + _PLOT, y(value), name, None) for name, value in chart.levels)]
    placed = spread([end[1] for end in all_ends], _GAP, top, top + _HEIGHT)
    edge = _LEFT + _PLOT
    parts = []
    for (px, py, name, one), place in zip(all_ends, placed, strict=True):
        parts.append(f'<path class="leader" d="M{px + 5:.1f} {py:.1f}L{edge + 6:.1f} {place:.1f}"/>')
        if one is not None:
            parts.append(f'<g class="{_class(one.style)}">{_dot(one.style, edge + 12, place)}</g>')
        parts.append(_text(edge + 21, place + 4, _cut(name), "", "start"))
    return parts


def _notes(chart: Chart, x: _Scale, top: float) -> list[str]:
    places = [x(value) for value, _ in chart.notes]
    parts = []
    for place, shown, (_, name) in zip(
        places, spread(places, 20, _LEFT, _LEFT + _PLOT), chart.notes, strict=True
    ):
        parts.append(
            f'<path class="leader" d="M{place:.1f} {top + _HEIGHT:.1f}V{top:.1f}L{shown:.1f} {top - 8:.1f}"/>'
        )
        turn = f' transform="rotate(-35 {shown:.1f} {top - 11:.1f})"'
        parts.append(_text(shown, top - 11, _cut(name), "tick", "start", turn))
    return parts


def _text(x: float, y: float, text: str, kind: str, anchor: str, more: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind} text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
