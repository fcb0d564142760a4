"""How long a training stream takes to go on at 90 % of an epoch of 100,000 utterances.

    python benchmarks/resume.py
    python benchmarks/resume.py --utterances 20000 --workers 0

A loader that keeps no place by arithmetic must make every segment before that place again and throw it
away. That replay is computed from segments made in the same run; the ratio of the two is the result.

The corpus is built for the purpose: real shards with real audio, whose indices name every utterance many
times under different keys. So opening it costs what 100,000 utterances cost, and building it does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.loader import BatchStream, TrainingData, batches
from mvat_dist.data.shards.codecs import encode
from mvat_dist.data.shards.format import FORMAT, audio_layout, index_path, shard_name
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.data.shards.writer import Sample, write_shard
from mvat_dist.io import sha256

SHARDS, STORED = 32, 4
BATCH, MICRO_BATCH = 32, 4


def main() -> None:
    """Build, measure, print."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="resume benchmark ") as place:
        corpus = Path(place)
        _write_subset(corpus, "train_clean", arguments.utterances, seconds=6.0)
        _write_subset(corpus, "train_noise", arguments.utterances // 10, seconds=8.0)
        _write_subset(corpus, "train_rir", 1000, seconds=0.5)
        (corpus / MANIFEST).write_text(
            json.dumps(
                {
                    "format": FORMAT,
                    "subsets": {
                        name: {"kind": "sources"} for name in ("train_clean", "train_noise", "train_rir")
                    },
                }
            )
        )
        config = DataConfig(train=str(corpus))
        step = round(0.9 * arguments.utterances / BATCH)

        saved = _open(config, arguments.workers)
        saved.load_state_dict({**saved.state_dict(), "step": step})
        state = saved.state_dict()

        resumed = _seconds_to_resume(config, 0, state)
        print(
            f"go on at segment {step * BATCH:,} of {arguments.utterances:,}, first batch of {BATCH} in hand:"
        )
        print(f"  reading in the process            {resumed:8.2f} s")
        if arguments.workers:
            beside = _seconds_to_resume(config, arguments.workers, state)
            print(f"  with {arguments.workers} new reader processes       {beside:8.2f} s")

        seconds = _seconds_per_segment(TrainingData(config, seed=0), arguments.measured)
        replay = seconds * step * BATCH
        print(f"replay by decoding, {1000 * seconds:.2f} ms a segment (mean of {arguments.measured}):")
        print(f"  one core                          {replay:8.1f} s")
        print(f"replay / resume                     {replay / resumed:8.0f}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time to resume a stream at 90 %% of an epoch, against a replay by decoding.",
        epilog="example: python benchmarks/resume.py --utterances 100000 --workers 2",
    )
    parser.add_argument("--utterances", type=int, default=100_000, help="utterances of clean speech")
    parser.add_argument("--workers", type=int, default=2, help="reader processes; 0 leaves them out")
    parser.add_argument("--measured", type=int, default=400, help="segments made to compute the replay")
    return parser.parse_args()


def _open(config: DataConfig, workers: int) -> BatchStream:
    return batches(
        TrainingData(config, seed=0),
        batch=BATCH,
        micro_batch=MICRO_BATCH,
        rank=0,
        world_size=1,
        first_step=0,
        steps=10**6,
        workers=workers,
    )


def _seconds_to_resume(config: DataConfig, workers: int, state: dict[str, Any]) -> float:
    """Until the first batch of a new stream that goes on at `state`."""
    began = time.perf_counter()
    stream = _open(config, workers)
    stream.load_state_dict(state)
    next(stream)
    return time.perf_counter() - began


def _seconds_per_segment(data: TrainingData, count: int) -> float:
    began = time.perf_counter()
    for position in range(count):
        data.item(0, position)
    return (time.perf_counter() - began) / count


def _write_subset(corpus: Path, name: str, utterances: int, seconds: float) -> None:
    """`utterances` in `SHARDS` shards that store `STORED` recordings each."""
    random = np.random.default_rng(len(name))
    folder = corpus / name
    folder.mkdir()
    rows = []
    for number, share in enumerate(np.array_split(np.arange(utterances), SHARDS)):
        shard = folder / shard_name(number)
        write_shard(
            shard,
            audio_layout("sources"),
            [_recording(random, f"stored_{at}", seconds) for at in range(STORED)],
        )
        stored = np.load(index_path(shard), allow_pickle=False)
        # The last row stays the last member of the tar.
        index = np.resize(stored[::-1], share.size)[::-1].copy()
        index["key"] = [f"{name}_{utterance:09d}".encode() for utterance in share]
        np.save(index_path(shard), index, allow_pickle=False)
        rows.append(
            {
                "name": shard.name,
                "rows": len(index),
                "samples": int(index["samples"].sum()),
                "index_sha256": sha256(index_path(shard)),
            }
        )
    manifest = {"format": FORMAT, "subset": name, "kind": "sources", "codec": "flac", "shards": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _recording(random: np.random.Generator, key: str, seconds: float) -> Sample:
    """Noise that falls off towards high frequencies, as speech does: FLAC gets as much to do."""
    samples = round(seconds * SAMPLE_RATE)
    signal = np.convolve(random.standard_normal(samples), 0.9 ** np.arange(60), "same")
    pcm = (np.clip(0.05 * signal, -1, 1) * 32767).astype(np.int16)
    return Sample(key, {"flac": encode(pcm, "flac"), "json": b"{}"}, samples, -25.0, float("nan"))


if __name__ == "__main__":
    main()
