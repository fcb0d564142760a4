"""What training data is refused, with one clear line, and which mode a corpus offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.data.loader import TrainingData
from mvat_dist.data.mixing.checks import check_readers
from mvat_dist.errors import UserError
from tests.tiny_corpus import write_pairs, write_sources
from tests.training_corpus import (
    sources,
    tone,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tiny") / "packed corpus")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_db": (5.0, -5.0)}, "lower bound first"),
        ({"level_dbfs": (-15.0, -35.0)}, "lower bound first"),
        ({"level_dbfs": (-15.0, 3.0)}, "full scale"),
        ({"tempo_range": (1.1, 0.9)}, "lower bound first"),
        ({"tempo_range": (0.0, 1.0)}, "between 0.5 and 2"),
        ({"gain_db": (float("nan"), 0.0)}, "lower bound first"),
        ({"reverb_probability": 1.5}, "probability"),
        ({"made_up_rooms": -0.1}, "made_up_rooms"),
        ({"tempo_probability": -0.1}, "probability"),
        ({"segment_seconds": 0.0}, "above 0"),
        ({"segment_seconds": 3600.0}, "longer than all speech"),
        ({"segment_seconds": 1.0, "mode": "pairs"}, "longer than the longest pair"),
        ({"segment_seconds": float("inf")}, "segment_seconds inf: must be finite"),
        ({"segment_seconds": float("nan")}, "segment_seconds nan: must be finite"),
        ({"snr_db": (-float("inf"), 5.0)}, "finite"),
        ({"stride_seconds": -1.0}, "0 or above"),
        ({"stride_seconds": 1e-5, "mode": "pairs"}, "shorter than one sample"),
        ({"stride_seconds": float("inf"), "mode": "pairs"}, "stride_seconds inf: must be finite"),
        ({"stride_seconds": float("nan"), "mode": "pairs"}, "stride_seconds nan: must be finite"),
        ({"stride_seconds": 1.0}, r"stride_seconds 1: .*--data\.mode pairs"),
        ({"stride_seconds": 1.0, "mode": "sources"}, r"stride_seconds 1: .*--data\.mode pairs"),
        ({"workers": -1}, "0 or above"),
        ({"train": "no/such/folder"}, "no such folder.*mvat_dist.pack"),
    ],
)
def test_mistakes_are_one_clear_line(corpus, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        TrainingData(sources(corpus, **changes), seed=0)
    assert "\n" not in str(raised.value)


def test_a_seed_out_of_range(corpus):
    with pytest.raises(UserError, match=r"seed -1"):
        TrainingData(sources(corpus), seed=-1)


def test_a_folder_that_is_not_packed(tmp_path):
    (tmp_path / "clean_fullband").mkdir()
    with pytest.raises(UserError, match=r"python -m mvat_dist.pack"):
        TrainingData(sources(tmp_path), seed=0)


def test_what_a_corpus_offers_decides_the_mode(tmp_path, corpus):
    assert TrainingData(sources(corpus), 0).mode == "sources"
    speech = {"a": tone(np.random.default_rng(0), 8000)}
    write_sources(tmp_path, "train_clean", speech)
    with pytest.raises(UserError, match=r"neither train_clean with train_noise nor train_pairs"):
        TrainingData(sources(tmp_path), 0)
    with pytest.raises(UserError, match=r"--data.mode pairs needs train_pairs"):
        TrainingData(sources(tmp_path, mode="pairs"), 0)
    write_pairs(tmp_path, "train_pairs", {"a": (speech["a"], speech["a"])})
    assert TrainingData(sources(tmp_path), 0).mode == "pairs"
    write_sources(tmp_path, "train_noise", speech)
    with pytest.raises(UserError, match=r"--data.reverb_probability 0"):
        TrainingData(sources(tmp_path), 0)
    assert TrainingData(sources(tmp_path, reverb_probability=0.0), 0).mode == "sources"
    assert TrainingData(sources(tmp_path, made_up_rooms=1.0), 0).mode == "sources"


def test_an_empty_subset(tmp_path):
    write_sources(tmp_path, "train_clean", {})
    write_sources(tmp_path, "train_noise", {})
    with pytest.raises(UserError, match=r"holds no utterances"):
        TrainingData(sources(tmp_path), 0)


def test_fewer_shards_than_readers(corpus):
    config = sources(corpus)
    check_readers(replace(config, workers=0), world_size=5)
    check_readers(replace(config, workers=5), world_size=1)
    with pytest.raises(UserError, match=r"5 shards for 6 readers \(3 ranks x 2 workers\).*min-shards"):
        check_readers(replace(config, workers=2), world_size=3)


def test_too_little_noise(tmp_path):
    random = np.random.default_rng(0)
    write_sources(tmp_path, "train_clean", {"a": tone(random, 9000)})
    write_sources(tmp_path, "train_noise", {"n0": tone(random, 3000), "n1": tone(random, 1000)})
    with pytest.raises(UserError, match=r"longer than all noise of .*train_noise together \(0\.25 s\)"):
        TrainingData(sources(tmp_path, reverb_probability=0.0), 0)
