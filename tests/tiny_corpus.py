"""Write packed corpora of given waveforms, without the packing command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mvat_dist.data.shards.codecs import Codec, encode
from mvat_dist.data.shards.format import Kind, Sample, extension, index_path, shard_name, write_shard
from mvat_dist.data.shards.reader import FORMAT, MANIFEST
from mvat_dist.io import sha256

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
        write_shard(folder / shard_name(number), kind, samples, codec)
        rows.append(
            {
                "name": shard_name(number),
                "utterances": len(samples),
                "samples": sum(one.samples for one in samples),
                "bytes": (folder / shard_name(number)).stat().st_size,
                "sha256": sha256(folder / shard_name(number)),
                "index_sha256": sha256(index_path(folder / shard_name(number))),
            }
        )
    manifest = {"format": FORMAT, "subset": subset, "kind": kind, "codec": codec, "shards": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    above = corpus / MANIFEST
    subsets = json.loads(above.read_text())["subsets"] if above.exists() else []
    above.write_text(json.dumps({"format": FORMAT, "subsets": [*subsets, subset]}))
    return folder
