"""A packed training corpus of a few seconds, and what tests of its stream share."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.loader import TrainingData, batches
from tests.tiny_corpus import write_pairs, write_sources

LENGTH = 8000
SEGMENT = LENGTH / 16_000
UTTERANCES, PAIRS = 29, 13


def tone(random: np.random.Generator, samples: int) -> np.ndarray:
    time = np.arange(samples) / 16_000
    return 0.2 * np.sin(2 * np.pi * random.uniform(100, 900) * time) + 0.01 * random.standard_normal(samples)


def write_corpus(folder: Path) -> Path:
    """Speech, noise, rooms and pairs, some shorter and some longer than a segment."""
    random = np.random.default_rng(5)
    speech = {f"s{n:03d}": tone(random, int(random.integers(700, 9000))) for n in range(UTTERANCES)}
    noise = {f"n{n}": 0.05 * random.standard_normal(size) for n, size in enumerate((1500, 6000, 20_000))}
    rooms = {}
    for n in range(2):
        rooms[f"r{n}"] = 0.05 * random.standard_normal(900) * np.exp(-np.arange(900) / 200)
        rooms[f"r{n}"][32] = 0.9
    pairs = {}
    for n in range(PAIRS):
        clean = tone(random, 1000 + 900 * n)
        pairs[f"p{n:02d}"] = (clean + 0.03 * random.standard_normal(clean.size), clean)
    write_sources(folder, "train_clean", speech, shards=5)
    write_sources(folder, "train_noise", noise)
    write_sources(folder, "train_rir", rooms)
    write_pairs(folder, "train_pairs", pairs, shards=3)
    return folder


def sources(corpus: Path, **changes) -> DataConfig:
    return replace(DataConfig(train=str(corpus), segment_seconds=SEGMENT), **changes)


def pairs(corpus: Path, **changes) -> DataConfig:
    plain = DataConfig(train=str(corpus), segment_seconds=SEGMENT, mode="premixed", tempo_probability=0.0)
    return replace(plain, **changes)


def stored(corpus: Path, subset: str, key: str, extension: str = "flac") -> np.ndarray:
    """An utterance, found with tarfile alone."""
    for shard in sorted((corpus / subset).glob("*.tar")):
        with tarfile.open(shard) as tar:
            if f"{key}.{extension}" in tar.getnames():
                member = tar.extractfile(f"{key}.{extension}")
                return soundfile.read(BytesIO(member.read()), dtype="float64")[0]
    raise KeyError(key)


def same(one, other) -> bool:
    return (
        np.array_equal(one.noisy, other.noisy)
        and np.array_equal(one.clean, other.clean)
        and one.recipe == other.recipe
    )


def taken(data: TrainingData, *, world_size: int, micro_batch: int = 3, workers: int = 0, **place) -> list:
    """The global batches, put together from the ranks: accumulation steps, in each the ranks in turn."""
    arguments = {"batch": 24, "micro_batch": micro_batch, "world_size": world_size, "workers": workers}
    ranks = [list(batches(data, rank=rank, **arguments, **place)) for rank in range(world_size)]
    steps = []
    for step in zip(*ranks, strict=True):
        samples = []
        for turn in zip(*step, strict=True):
            for micro in turn:
                assert micro.noisy.shape == micro.clean.shape == (len(micro.recipes), LENGTH)
                assert len(micro.recipes) <= micro_batch
                samples += zip(micro.noisy.numpy(), micro.clean.numpy(), micro.recipes, strict=True)
        assert len(samples) == 24
        steps.append([(noisy.tobytes(), clean.tobytes(), recipe) for noisy, clean, recipe in samples])
    return steps
