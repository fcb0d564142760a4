"""A small corpus, an untrained teacher, and caches of what it says: what tests of the cache share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mvat_dist import cache
from mvat_dist.config import parser
from mvat_dist.config.sizes import Size
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.shards.targets import TeacherCache
from mvat_dist.models import weights as modelfile
from mvat_dist.models.manner import Manner
from tests.tiny_corpus import write_pairs, write_sources

RATE = 16_000
VARIANTS = 2
UTTERANCES = 10
SEGMENTS = ("--data.segment_seconds=0.25", "--data.reverb_probability=0", "--train.micro_batch=1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones and noise to mix, pairs, and held-out pairs."""
    folder = tmp_path_factory.mktemp("a corpus")
    random = np.random.default_rng(1)

    def tone(seconds: float) -> np.ndarray:
        time = np.arange(int(seconds * RATE)) / RATE
        return 0.2 * np.sin(2 * np.pi * random.uniform(100, 900) * time) * np.clip(np.sin(9 * time), 0.1, 1)

    def pair(seconds: float) -> tuple[np.ndarray, np.ndarray]:
        clean = tone(seconds)
        return clean + 0.03 * random.standard_normal(clean.size), clean

    write_sources(folder, "train_clean", {f"c{n}": tone(0.6) for n in range(UTTERANCES)}, shards=4)
    write_sources(folder, "train_noise", {f"n{n}": 0.1 * random.standard_normal(RATE) for n in range(2)})
    write_pairs(folder, "train_pairs", {f"p{n}": pair(0.2 + 0.2 * n) for n in range(5)}, shards=2)
    write_pairs(folder, "valid", {f"v{n}": pair(1.5) for n in range(2)})
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network with a multi-view block at both levels."""
    return write_teacher(tmp_path_factory.mktemp("a teacher") / "model.safetensors", seed=3)


def write_teacher(file: Path, seed: int, scale: float = 1.0) -> Path:
    torch.manual_seed(seed)
    size = Size("base", 6, depth=2)
    weights = {
        key: value * scale if value.is_floating_point() else value
        for key, value in Manner(size).state_dict().items()
    }
    modelfile.save(file, weights, name="mini", size=size, step=0)
    return file


def opened(corpus: Path, *more: str, teacher_cache: TeacherCache | None = None) -> TrainingData:
    """The segments that the caches here are of."""
    fixed = (f"--data.train={corpus}", f"--data.variants={VARIANTS}", *SEGMENTS, "--distil.method=none")
    config = parser.parse([*fixed, *more])
    return TrainingData(config.data, config.seed, teacher_cache)


def options(corpus: Path, teacher: Path, out: Path, *more: str) -> list[str]:
    fixed = f"--data.variants={VARIANTS}"
    return [
        f"--teacher={teacher}",
        f"--data={corpus}",
        f"--out={out}",
        fixed,
        *SEGMENTS,
        "--workers=1",
        *more,
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exact(corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "fp32"
    cache.main(options(corpus, teacher, out, "--codec=fp32", "--output"))
    return out


@pytest.fixture(scope="module")
def compact(corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "compact"
    cache.main(options(corpus, teacher, out, "--output"))
    return out


@pytest.fixture(scope="module")
def compact_maps(corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the teacher's output."""
    out = tmp_path_factory.mktemp("caches") / "maps"
    cache.main(options(corpus, teacher, out))
    return out


def from_cache(folder: Path) -> tuple[str, str]:
    return "--teacher.source=cache", f"--teacher.cache={folder}"
