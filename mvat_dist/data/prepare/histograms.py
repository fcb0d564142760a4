"""A picture of a packed corpus: hours of each source, and how SNR, level and length spread in each subset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mvat_dist.data.prepare.statistics import Statistics, Values, longest
from mvat_dist.errors import UserError
from mvat_dist.io import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

FORMATS = ("png", "svg", "pdf")

_SOURCES = 5
"""Most sources of one subset in the picture."""
_TICK_TEXT = 40
_BINS = 45
_COLUMNS: tuple[tuple[str, str, float, tuple[float, float], Callable[[Statistics], Values]], ...] = (
    ("SNR", "dB", 1.0, (-20.0, 50.0), lambda one: one.snr_db),
    ("level (RMS)", "dBFS", 1.0, (-70.0, 0.0), lambda one: one.level_dbfs),
    ("length", "s", 0.5, (0.0, 60.0), lambda one: one.seconds),
)
"""Name, unit, narrowest bin, limits (what lies beyond counts at the edge), values."""


def check_picture(path: Path) -> None:
    """Refuse, before anything is read, a picture that could not be written.

    Raises:
        UserError: another format, or no matplotlib.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise UserError(f"--out {path}: a picture ends in {', '.join('.' + one for one in FORMATS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("the picture needs matplotlib: pip install 'mvat_dist[plots]'") from error


def draw(statistics: Sequence[Statistics], title: str, path: Path) -> None:
    """Write the picture atomically, in the format that the name of `path` asks for."""
    from matplotlib.figure import Figure

    bars = sum(len(longest(one, _SOURCES)) for one in statistics)
    heights = [0.9 + 0.25 * bars, 0.9 + 0.75 * len(statistics)]
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_hours(above.subplots(), statistics)
    _draw_histograms(below, statistics)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=140)


def _draw_hours(axes: Axes, statistics: Sequence[Statistics]) -> None:
    """One bar for each source, in the colour of its subset."""
    names: list[str] = []
    for number, one in enumerate(statistics):
        for name, part in longest(one, _SOURCES).items():
            bar = axes.barh(len(names), part.hours, color=f"C{number}", height=0.75)
            axes.bar_label(bar, [f" {_duration(part.hours)}, {part.utterances:,} utterances"], fontsize=8.5)
            text = f"{one.name}: {name.rsplit('/', 1)[-1]}"
            names.append(text if len(text) <= _TICK_TEXT else text[: _TICK_TEXT - 1] + "…")
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.02)
    axes.set_title("hours of each source", loc="left", fontsize=11)
    axes.set_xlabel("hours")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_histograms(figure: SubFigure, statistics: Sequence[Statistics]) -> None:
    """A row for each subset: overlaid, the histograms of many subsets hide each other."""
    grid = figure.subplots(len(statistics), len(_COLUMNS), sharex="col", squeeze=False)
    for column, (name, unit, width, limits, values) in enumerate(_COLUMNS):
        shown = [np.clip(all_[np.isfinite(all_)], *limits) for all_ in map(values, statistics)]
        edges = _edges(shown, width)
        for row, one in enumerate(shown):
            _draw_histogram(grid[row, column], one, edges, f"C{row}", unit)
        grid[0, column].set_title(f"{name}: share of the utterances", loc="left", fontsize=11)
        grid[-1, column].set_xlabel(unit)
    for row, subset in enumerate(statistics):
        label = f"{subset.name}\n{_duration(subset.hours)}"
        grid[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9.5, color=f"C{row}")


def _edges(shown: Sequence[Values], width: float) -> Values:
    """Edges of at most about `_BINS` bins that hold all values."""
    filled = [values for values in shown if values.size]
    if not filled:
        return np.array([0.0, 1.0], np.float32)
    low = np.floor(min(values.min() for values in filled) / width) * width
    high = max(values.max() for values in filled)
    step = width * max(1, int(np.ceil((high - low) / width / _BINS)))
    return np.arange(low, high + 1.001 * step, step, dtype=np.float32)


def _draw_histogram(axes: Axes, values: Values, edges: Values, colour: str, unit: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks([])
    if not values.size:
        axes.text(0.5, 0.4, "not mixed yet", ha="center", color="0.6", transform=axes.transAxes, fontsize=8.5)
        return
    counts, _ = np.histogram(values, edges)
    axes.stairs(counts / values.size, edges, color=colour, fill=True, alpha=0.75)
    axes.set_ylim(0, 1.5 * counts.max() / values.size)
    median = float(np.median(values))
    axes.axvline(median, color="0.2", linewidth=1, linestyle=":")
    note = f"median {median:.1f} {unit}"
    axes.text(1, 1, note, ha="right", va="top", transform=axes.transAxes, fontsize=8.5, color="0.2")


def _duration(hours: float) -> str:
    if hours >= 10:
        return f"{hours:,.0f} h"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
