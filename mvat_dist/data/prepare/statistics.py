"""What a packed corpus holds: hours of each source, and how levels, SNRs and lengths spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.pool import parallel_map
from mvat_dist.data.prepare.corpora import collection
from mvat_dist.data.shards.format import Kind, load_index
from mvat_dist.data.shards.reader import ShardSet, subset_names

Values = npt.NDArray[np.float32]


@dataclass
class Source:
    """What one folder of the corpus gave to a subset."""

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
        return len(set[str]().union(*(one.groups for one in self.sources.values())))


@dataclass(frozen=True)
class _Job:
    folder: Path
    manifest: dict[str, Any]
    """Of the subset, with one shard only."""


def collect(corpus: Path, workers: int) -> list[Statistics]:
    """Statistics of every subset; reads the indices and each utterance's JSON, no audio.

    Raises:
        UserError: the folder is no packed corpus.
        ShardError: a shard is damaged.
    """
    subsets = {corpus / name: ShardSet.open(corpus / name) for name in subset_names(corpus)}
    jobs = [
        _Job(folder, subset.manifest | {"shards": [shard], "utterances": shard["utterances"]})
        for folder, subset in subsets.items()
        for shard in subset.manifest["shards"]
    ]
    sources: dict[str, dict[str, Source]] = {subset.name: {} for subset in subsets.values()}
    with parallel_map(workers) as run:
        tallies = tqdm(run(_tally, jobs), "reading", len(jobs), unit="shard")
        for job, tally in zip(jobs, tallies, strict=True):
            _add(sources[job.manifest["subset"]], tally)
    return [_statistics(subset, sources[subset.name]) for subset in subsets.values()]


def _tally(job: _Job) -> dict[str, Source]:
    shard = job.manifest["shards"][0]
    index = load_index(job.folder / shard["name"], job.manifest["kind"], job.manifest.get("codec", "flac"))
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
        sum(int(shard.get("bytes", 0)) for shard in subset.manifest["shards"]),
        (rows["samples"] / np.float32(SAMPLE_RATE)).astype(np.float32),
        cast(Values, rows["level_dbfs"]),
        cast(Values, rows["snr_db"] if subset.kind == "pairs" else np.empty(0, np.float32)),
        dict(sorted(sources.items(), key=lambda item: (-item[1].samples, item[0]))),
    )


def subset_table(statistics: Sequence[Statistics]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: one subset each, medians with the 5th and 95th percentile."""
    header = ["subset", "kind", "codec", "utterances", "groups", "hours", "MB"]
    header += ["length s", "level dBFS", "SNR dB"]
    rows = [
        [
            *(one.name, one.kind, one.codec, len(one.seconds), one.groups),
            *(f"{one.hours:.3f}", f"{one.bytes / 1e6:.1f}"),
            *(_range(values) for values in (one.seconds, one.level_dbfs, one.snr_db)),
        ]
        for one in statistics
    ]
    return header, rows


def source_table(statistics: Sequence[Statistics], most: int) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: the `most` longest sources of each subset, and the others together."""
    rows: list[list[Any]] = []
    for one in statistics:
        for name, part in longest(one, most).items():
            share = 100 * part.hours / one.hours if one.hours else 0.0
            rows.append(
                [one.name, name, part.utterances, len(part.groups), f"{part.hours:.3f}", f"{share:.1f}"]
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
