"""Write packed corpora of given waveforms, without the packing command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mvat_dist.data.shards import FORMAT, MANIFEST, Kind, Sample, encode_flac, shard_name, write_shard

Waveform = np.ndarray


def pcm(waveform: Waveform) -> np.ndarray:
    """Full scale 1 -> int16."""
    return np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)


def write_sources(corpus: Path, subset: str, audio: Mapping[str, Waveform], shards: int = 1) -> Path:
    """A subset of recordings."""
    members = {key: {"flac": encode_flac(pcm(signal))} for key, signal in audio.items()}
    return _write(corpus, subset, "sources", members, {key: len(s) for key, s in audio.items()}, shards)


def write_pairs(
    corpus: Path, subset: str, pairs: Mapping[str, tuple[Waveform, Waveform]], shards: int = 1
) -> Path:
    """A subset of (noisy, clean)."""
    members = {
        key: {"clean.flac": encode_flac(pcm(clean)), "noisy.flac": encode_flac(pcm(noisy))}
        for key, (noisy, clean) in pairs.items()
    }
    return _write(corpus, subset, "pairs", members, {key: len(p[1]) for key, p in pairs.items()}, shards)


def _write(
    corpus: Path,
    subset: str,
    kind: Kind,
    members: Mapping[str, dict[str, bytes]],
    lengths: Mapping[str, int],
    shards: int,
) -> Path:
    folder = corpus / subset
    folder.mkdir(parents=True)
    rows = []
    for number, keys in enumerate(np.array_split(list(members), shards)):
        samples = [
            Sample(key, members[key] | {"json": b"{}"}, lengths[key], -25.0, float("nan")) for key in keys
        ]
        write_shard(folder / shard_name(number), kind, samples)
        rows.append({"name": shard_name(number), "utterances": len(samples)})
    manifest = {"format": FORMAT, "subset": subset, "kind": kind, "shards": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    above = corpus / MANIFEST
    subsets = json.loads(above.read_text())["subsets"] if above.exists() else []
    above.write_text(json.dumps({"format": FORMAT, "subsets": [*subsets, subset]}))
    return folder
