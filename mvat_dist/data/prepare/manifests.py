"""The records that packing writes: its progress, and the manifests of a corpus and of its subsets."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.prepare.corpora import Listing, Rejection
from mvat_dist.data.prepare.plan import Plan, SubsetPlan
from mvat_dist.data.shards.codecs import Codec
from mvat_dist.data.shards.format import FORMAT, audio_layout, load_index
from mvat_dist.data.shards.manifest import ShardRecord, SubsetManifest, SubsetSummary
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.io import sha256, write_record, write_text

REJECTED = "rejected.jsonl"
"""In the folder of a packed corpus: every file that was left out, and why."""

_ROLES = {"train_clean": "clean", "train_noise": "noise", "train_rir": "rir"}
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_BIN = 5.0
"""Width of a histogram's bins, in seconds or dB."""


@dataclass(frozen=True)
class Packing:
    """What decides the content of a packed corpus; equal ones give equal shards."""

    layout: str
    fingerprint: str
    """Hash of the paths and sizes of the corpus's files."""
    recipe: dict[str, int | float | str]
    format: int = FORMAT


@dataclass(frozen=True)
class PackingProgress(Packing):
    """``packing.json``, the marker of an unfinished corpus."""

    plan: str | None = None
    """Digest of the plan; None until all files are inspected."""
    subsets: list[str] = field(default_factory=list)
    """Folders that the plan fills."""


@dataclass(frozen=True, kw_only=True)
class PackedCorpus(Packing):
    """``manifest.json`` of a packed corpus."""

    corpus: str
    """Folder that was packed."""
    files: dict[str, int]
    """Files: found = packed + held_out + rejected."""
    rejected: dict[str, int]
    """Reason -> files that were left out."""
    notes: list[str]
    """What the user should know before training."""
    subsets: dict[str, SubsetSummary]


@dataclass(frozen=True)
class Spread:
    """How the finite values of a quantity spread over the utterances."""

    quantiles: dict[str, float]
    histogram: dict[str, int]
    """Lower edge of a bin -> utterances."""


@dataclass(frozen=True, kw_only=True)
class PackedSubset(SubsetManifest):
    """``manifest.json`` of a packed subset, with its statistics."""

    hours: float
    seconds: Spread
    level_dbfs: Spread
    snr_db: Spread | None
    """None for sources."""
    source_rates: dict[str, int]
    """Sampling rate of the corpus's files in Hz -> files or pieces of them."""
    source_channels: dict[str, int]
    rejected: dict[str, int]
    sample_rate: int = SAMPLE_RATE


def write_manifests(
    listing: Listing,
    out: Path,
    plan: Plan,
    shards: dict[str, list[ShardRecord]],
    codec: Codec,
    packing: Packing,
) -> PackedCorpus:
    """Write each subset's manifest, the list of rejected files and, last, the manifest of the corpus."""
    summaries = {}
    for subset in plan.subsets:
        manifest = _describe(subset, codec, out / subset.name, shards[subset.name], plan.rejected)
        path = out / subset.name / MANIFEST
        write_record(path, manifest)
        summaries[subset.name] = SubsetSummary(
            kind=manifest.kind,
            utterances=manifest.utterances,
            hours=manifest.hours,
            bytes=manifest.bytes,
            manifest_sha256=sha256(path),
        )
    rows = (json.dumps(dataclasses.asdict(rejection)) + "\n" for rejection in plan.rejected)
    write_text(out / REJECTED, "".join(rows))
    corpus = PackedCorpus(
        layout=packing.layout,
        fingerprint=packing.fingerprint,
        recipe=packing.recipe,
        corpus=str(listing.corpus),
        files=plan.counts,
        rejected=_by_frequency(rejection.reason for rejection in plan.rejected),
        notes=plan.notes,
        subsets=summaries,
    )
    write_record(out / MANIFEST, corpus)
    return corpus


def _describe(
    subset: SubsetPlan,
    codec: Codec,
    folder: Path,
    shards: Sequence[ShardRecord],
    rejected: Sequence[Rejection],
) -> PackedSubset:
    """The manifest of one subset, from its indices and from the plan."""
    layout = audio_layout(subset.kind, codec)
    rows = np.concatenate([load_index(folder / shard.name, layout).rows for shard in shards])
    signals = [
        signal for utterances in subset.shards for utterance in utterances for signal in utterance.signals
    ]
    role = _ROLES.get(subset.name, subset.name)
    return PackedSubset(
        subset=subset.name,
        kind=subset.kind,
        shards=tuple(shards),
        codec=codec,
        utterances=len(rows),
        bytes=sum(shard.bytes or 0 for shard in shards),
        hours=round(int(rows["samples"].sum()) / SAMPLE_RATE / 3600, 4),
        seconds=_spread(rows["samples"] / SAMPLE_RATE),
        level_dbfs=_spread(rows["level_dbfs"]),
        snr_db=_spread(rows["snr_db"]) if subset.kind == "pairs" else None,
        source_rates=_by_value(signal.rate for signal in signals),
        source_channels=_by_value(signal.channels for signal in signals),
        rejected=_by_frequency(rejection.reason for rejection in rejected if rejection.role == role),
    )


def _by_frequency(names: Iterable[str]) -> dict[str, int]:
    """Name -> how often it occurs, the most frequent first."""
    return dict(Counter(names).most_common())


def _by_value(values: Iterable[int]) -> dict[str, int]:
    """Value -> how often it occurs, in increasing order."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _spread(values: npt.NDArray[np.floating[Any]]) -> Spread:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Spread({}, {})
    quantiles = {f"{share:g}": round(float(np.quantile(finite, share)), 2) for share in _QUANTILES}
    bins = Counter((np.floor(finite / _BIN) * _BIN).tolist())
    return Spread(quantiles, {f"{edge:g}": bins[edge] for edge in sorted(bins)})
