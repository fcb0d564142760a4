"""Write packed corpora of given waveforms, without the packing command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mvat_dist.data.shards.codecs import Codec, encode
from mvat_dist.data.shards.format import FORMAT, Kind, audio_layout, extension, shard_name
from mvat_dist.data.shards.manifest import describe_shard
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.data.shards.writer import Sample, write_shard

Waveform = np.ndarray


def pcm(waveform: Waveform) -> np.ndarray:
    """Full scale 1 -> int16."""
    return np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)


def write_sources(
    corpus: Path, subset: str, audio: Mapping[str, Waveform], shards: int = 1, codec: Codec = "flac"
) -> Path:
    """A subset of recordings."""
    members = {key: {extension("audio", codec): encode(pcm(signal), codec)} for key, signal in audio.items()}
    lengths = {key: len(signal) for key, signal in audio.items()}
    return _write(corpus, subset, "sources", members, lengths, shards, codec)


def write_pairs(
    corpus: Path,
    subset: str,
    pairs: Mapping[str, tuple[Waveform, Waveform]],
    shards: int = 1,
    codec: Codec = "flac",
) -> Path:
    """A subset of (noisy, clean)."""
    members = {
        key: {
            extension("clean", codec): encode(pcm(clean), codec),
            extension("noisy", codec): encode(pcm(noisy), codec),
        }
        for key, (noisy, clean) in pairs.items()
    }
    lengths = {key: len(pair[1]) for key, pair in pairs.items()}
    return _write(corpus, subset, "pairs", members, lengths, shards, codec)


def _write(
    corpus: Path,
    subset: str,
    kind: Kind,
    members: Mapping[str, dict[str, bytes]],
    lengths: Mapping[str, int],
    shards: int,
    codec: Codec,
) -> Path:
    folder = corpus / subset
    folder.mkdir(parents=True)
    rows = []
    for number, keys in enumerate(np.array_split(list(members), shards)):
        samples = [
            Sample(key, members[key] | {"json": b"{}"}, lengths[key], -25.0, float("nan")) for key in keys
        ]
        shard = folder / shard_name(number)
        write_shard(shard, audio_layout(kind, codec), samples)
        record = describe_shard(shard, len(samples), sum(sample.samples for sample in samples))
        rows.append(asdict(record))
    manifest = {"format": FORMAT, "subset": subset, "kind": kind, "codec": codec, "shards": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    above = corpus / MANIFEST
    subsets = json.loads(above.read_text())["subsets"] if above.exists() else {}
    above.write_text(json.dumps({"format": FORMAT, "subsets": subsets | {subset: {"kind": kind}}}))
    return folder
