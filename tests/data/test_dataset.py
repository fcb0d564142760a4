"""Training data that is refused, with one clear line, and the mode that a corpus offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.config import parser
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
        ({"tempo_range": (1.1, 0.9)}, "lower bound first"),
        ({"gain_db": (float("nan"), 0.0)}, "lower bound first"),
        ({"segment_seconds": 1e-5}, "segment_seconds 1e-05: shorter than one sample"),
        ({"segment_seconds": 3600.0}, "longer than all speech"),
        ({"segment_seconds": 1.0, "mode": "premixed"}, "longer than the longest pair"),
        ({"stride_seconds": 1e-5, "mode": "premixed"}, "shorter than one sample"),
        ({"stride_seconds": 1.0}, r"stride_seconds 1: .*--data\.mode premixed"),
        ({"stride_seconds": 1.0, "mode": "dynamic"}, r"stride_seconds 1: .*--data\.mode premixed"),
        ({"bandwidth_hz": (7000.0, 2000.0)}, "lower bound first"),
        ({"codec_probability": 0.5, "codecs": "mp4"}, r"no codec 'mp4'; did you mean .*'mp3'"),
        ({"codec_probability": 0.5, "codecs": " , "}, "codecs is empty"),
        ({"train": "no/such/folder"}, "no such folder.*mvat_dist.pack"),
    ],
)
def test_mistakes_are_one_clear_line(corpus, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        TrainingData(sources(corpus, **changes), seed=0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("level_dbfs=[-15,3]", "full scale"),
        ("tempo_range=[0,1]", "between 0.5 and 2"),
        ("gain_db=[.nan,0]", "finite"),
        ("snr_db=[-.inf,5]", "finite"),
        ("reverb_probability=1.5", "from 0 to 1"),
        ("synthetic_rooms=-0.1", "from 0 to 1"),
        ("tempo_probability=-0.1", "from 0 to 1"),
        ("activity_threshold=1.5", "from 0 to 1"),
        ("codec_probability=2", "from 0 to 1"),
        ("max_bad_samples=.nan", "from 0 to 1"),
        ("bandwidth_hz=[2000,9000]", "100 to 8000 Hz"),
        ("segment_seconds=0", "finite number above 0"),
        ("segment_seconds=.inf", "finite number above 0"),
        ("segment_seconds=.nan", "finite number above 0"),
        ("stride_seconds=-1", "0 or above"),
        ("stride_seconds=.inf", "0 or above"),
        ("stride_seconds=.nan", "0 or above"),
        ("workers=-1", "0 or above"),
        ("variants=-1", "0 or above"),
        ("mode=sources", "mode"),
    ],
)
def test_values_out_of_bounds_are_refused_by_the_parser(option, message):
    with pytest.raises(UserError, match=message) as raised:
        parser.parse([f"--data.{option}", "--distil.method=none"])
    assert option.partition("=")[0] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_seed_out_of_range(corpus):
    with pytest.raises(UserError, match=r"seed -1"):
        TrainingData(sources(corpus), seed=-1)


def test_a_folder_that_is_not_packed(tmp_path):
    (tmp_path / "clean_fullband").mkdir()
    with pytest.raises(UserError, match=r"python -m mvat_dist.pack"):
        TrainingData(sources(tmp_path), seed=0)


def test_what_a_corpus_offers_decides_the_mode(tmp_path, corpus):
    assert TrainingData(sources(corpus), 0).mode == "dynamic"
    speech = {"a": tone(np.random.default_rng(0), 8000)}
    write_sources(tmp_path, "train_clean", speech)
    with pytest.raises(UserError, match=r"neither train_clean with train_noise nor train_pairs"):
        TrainingData(sources(tmp_path), 0)
    with pytest.raises(UserError, match=r"--data.mode premixed needs train_pairs"):
        TrainingData(sources(tmp_path, mode="premixed"), 0)
    write_pairs(tmp_path, "train_pairs", {"a": (speech["a"], speech["a"])})
    assert TrainingData(sources(tmp_path), 0).mode == "premixed"
    write_sources(tmp_path, "train_noise", speech)
    with pytest.raises(UserError, match=r"--data.reverb_probability 0"):
        TrainingData(sources(tmp_path), 0)
    assert TrainingData(sources(tmp_path, reverb_probability=0.0), 0).mode == "dynamic"
    assert TrainingData(sources(tmp_path, synthetic_rooms=1.0), 0).mode == "dynamic"


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
