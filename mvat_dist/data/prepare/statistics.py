"""Statistics of a packed corpus, as tables and a picture: hours, and how levels, SNRs and lengths spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.pool import parallel_map
from mvat_dist.data.prepare.corpora import collection
from mvat_dist.data.shards.format import Kind, audio_layout, load_index
from mvat_dist.data.shards.manifest import SubsetManifest, subset_names
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.errors import UserError
from mvat_dist.io import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Values = npt.NDArray[np.float32]


@dataclass
class Source:
    """The part of a subset that comes from one folder of the corpus."""

    utterances: int = 0
    samples: int = 0
    groups: set[str] = field(default_factory=set)
    """Speakers or recordings."""

    @property
    def hours(self) -> float:
        """Duration."""
        return self.samples / SAMPLE_RATE / 3600


@dataclass(frozen=True)
class Statistics:
    """One subset."""

    name: str
    kind: Kind
    codec: str
    bytes: int
    """Of its tars."""
    seconds: Values
    """(N,) lengths."""
    level_dbfs: Values
    """(N,) RMS, of the noisy signal where there are two."""
    snr_db: Values
    """(N,) of pairs; empty for sources."""
    sources: dict[str, Source]
    """Folder of the corpus (of mixtures, that of the speech) -> its part, the longest first."""

    @property
    def hours(self) -> float:
        """Duration, of one signal where there are two."""
        return float(self.seconds.sum(dtype=np.float64)) / 3600

    @property
    def groups(self) -> int:
        """Speakers or recordings, as far as the names of the files tell them apart."""
        return len(set[str]().union(*(source.groups for source in self.sources.values())))


@dataclass(frozen=True)
class _Job:
    folder: Path
    manifest: SubsetManifest
    """Of the subset, with one shard only."""


def collect(corpus: Path, workers: int) -> list[Statistics]:
    """Statistics of every subset; reads the indices and each utterance's JSON, no audio.

    Raises:
        UserError: the folder is no packed corpus.
        ShardError: a shard is damaged.
    """
    subsets = {corpus / name: ShardSet.open(corpus / name) for name in subset_names(corpus)}
    jobs = [
        _Job(folder, replace(subset.manifest, shards=(shard,), utterances=shard.rows))
        for folder, subset in subsets.items()
        for shard in subset.shards
    ]
    sources: dict[str, dict[str, Source]] = {subset.name: {} for subset in subsets.values()}
    with parallel_map(workers) as run:
        tallies = tqdm(run(_tally, jobs), "reading", len(jobs), unit="shard")
        for job, tally in zip(jobs, tallies, strict=True):
            _add(sources[job.manifest.subset], tally)
    return [_statistics(subset, sources[subset.name]) for subset in subsets.values()]


def _tally(job: _Job) -> dict[str, Source]:
    shard = job.manifest.shards[0]
    index = load_index(job.folder / shard.name, audio_layout(job.manifest.kind, job.manifest.codec))
    subset = ShardSet(job.folder, job.manifest, [index])
    tally: dict[str, Source] = {}
    for position, samples in enumerate(subset.samples.tolist()):
        meta = subset.meta(position)
        part = tally.setdefault(_origin(meta), Source())
        part.utterances += 1
        part.samples += samples
        part.groups.add(str(meta.get("group", "")))
    return tally


def _origin(meta: dict[str, Any]) -> str:
    """Where an utterance comes from: its only source, or the first of two, which is the speech."""
    sources = meta.get("source")
    first = next(iter(sources.values()), None) if isinstance(sources, dict) else None
    return collection(str(first["path"])) if isinstance(first, dict) and "path" in first else "unknown"


def _add(into: dict[str, Source], tally: dict[str, Source]) -> None:
    for name, part in tally.items():
        known = into.setdefault(name, Source())
        known.utterances += part.utterances
        known.samples += part.samples
        known.groups |= part.groups


def _statistics(subset: ShardSet, sources: dict[str, Source]) -> Statistics:
    rows = subset.rows
    return Statistics(
        subset.name,
        subset.kind,
        subset.codec,
        sum(shard.bytes or 0 for shard in subset.shards),
        (rows["samples"] / np.float32(SAMPLE_RATE)).astype(np.float32),
        cast(Values, rows["level_dbfs"]),
        cast(Values, rows["snr_db"] if subset.kind == "pairs" else np.empty(0, np.float32)),
        dict(sorted(sources.items(), key=lambda item: (-item[1].samples, item[0]))),
    )


def subset_table(statistics: Sequence[Statistics]) -> tuple[list[str], list[list[Any]]]:
    """Header and one row per subset: medians with the 5th and 95th percentile."""
    header = ["subset", "kind", "codec", "utterances", "groups", "hours", "MB"]
    header += ["length s", "level dBFS", "SNR dB"]
    rows = [
        [
            *(subset.name, subset.kind, subset.codec, len(subset.seconds), subset.groups),
            *(f"{subset.hours:.3f}", f"{subset.bytes / 1e6:.1f}"),
            *(_range(values) for values in (subset.seconds, subset.level_dbfs, subset.snr_db)),
        ]
        for subset in statistics
    ]
    return header, rows


def source_table(statistics: Sequence[Statistics], most: int) -> tuple[list[str], list[list[Any]]]:
    """Header and one row for each of the `most` longest sources of a subset, and one for its others."""
    rows: list[list[Any]] = []
    for subset in statistics:
        for name, part in longest(subset, most).items():
            share = 100 * part.hours / subset.hours if subset.hours else 0.0
            rows.append(
                [subset.name, name, part.utterances, len(part.groups), f"{part.hours:.3f}", f"{share:.1f}"]
            )
    return ["subset", "source", "utterances", "groups", "hours", "% of subset"], rows


def longest(statistics: Statistics, most: int) -> dict[str, Source]:
    """The `most` longest sources of a subset, and one entry for all others."""
    names = list(statistics.sources)
    most = len(names) if len(names) == most + 1 else most  # "1 other" would take the same room
    shown = {name: statistics.sources[name] for name in names[:most]}
    if rest := names[most:]:
        others: dict[str, Source] = {}
        for name in rest:
            _add(others, {"": statistics.sources[name]})
        shown[f"{len(rest)} others"] = others[""]
    return shown


def _range(values: Values) -> str:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "-"
    low, middle, high = np.quantile(finite, [0.05, 0.5, 0.95])
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


FORMATS = ("png", "svg", "pdf")

_SOURCES = 5
"""Most sources of one subset in the picture."""
_TICK_TEXT = 40
_BINS = 45
_COLUMNS: tuple[tuple[str, str, float, tuple[float, float], Callable[[Statistics], Values]], ...] = (
    ("SNR", "dB", 1.0, (-20.0, 50.0), lambda subset: subset.snr_db),
    ("level (RMS)", "dBFS", 1.0, (-70.0, 0.0), lambda subset: subset.level_dbfs),
    ("length", "s", 0.5, (0.0, 60.0), lambda subset: subset.seconds),
)
"""Name, unit, narrowest bin, limits (what lies beyond counts at the edge), values."""


def check_picture(path: Path) -> None:
    """Refuse, before anything is read, a picture that could not be written.

    Raises:
        UserError: another format.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise UserError(f"--out {path}: a picture ends in .{', .'.join(FORMATS)}")


def draw(statistics: Sequence[Statistics], title: str, path: Path) -> None:
    """Draw hours of each source, and how SNR, level and length spread in each subset; written atomically.

    The format is that of the name of `path`.
    """
    from matplotlib.figure import Figure  # takes a third of a second, which `pack` need not pay

    bars = sum(len(longest(subset, _SOURCES)) for subset in statistics)
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
    for number, subset in enumerate(statistics):
        for name, part in longest(subset, _SOURCES).items():
            bar = axes.barh(len(names), part.hours, color=f"C{number}", height=0.75)
            axes.bar_label(bar, [f" {_duration(part.hours)}, {part.utterances:,} utterances"], fontsize=8.5)
            text = f"{subset.name}: {name.rsplit('/', 1)[-1]}"
            names.append(text if len(text) <= _TICK_TEXT else text[: _TICK_TEXT - 1] + "…")
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.02)
    axes.set_title("hours of each source", loc="left", fontsize=11)
    axes.set_xlabel("hours")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_histograms(figure: SubFigure, statistics: Sequence[Statistics]) -> None:
    """One row per subset, because overlaid histograms hide each other."""
    grid = figure.subplots(len(statistics), len(_COLUMNS), sharex="col", squeeze=False)
    for column, (name, unit, width, limits, values) in enumerate(_COLUMNS):
        clipped = [np.clip(all_[np.isfinite(all_)], *limits) for all_ in map(values, statistics)]
        edges = _edges(clipped, width)
        for row, finite in enumerate(clipped):
            _draw_histogram(grid[row, column], finite, edges, f"C{row}", unit)
        grid[0, column].set_title(f"{name}: share of the utterances", loc="left", fontsize=11)
        grid[-1, column].set_xlabel(unit)
    for row, subset in enumerate(statistics):
        label = f"{subset.name}\n{_duration(subset.hours)}"
        grid[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9.5, color=f"C{row}")


def _edges(groups: Sequence[Values], width: float) -> Values:
    """Edges of at most about `_BINS` bins that cover all values."""
    filled = [values for values in groups if values.size]
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
