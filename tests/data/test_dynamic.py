"""Mixing as the DNS synthesizer does, seen through whole segments of a packed corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.data.loader import TrainingData
from mvat_dist.data.mixing.augment import limit_bandwidth, through_codec
from mvat_dist.data.mixing.mix import active_noise_samples, active_share
from tests.tiny_corpus import write_sources
from tests.training_corpus import pairs, sources, stored, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tiny") / "packed corpus")


def segments(corpus: Path, count: int = 29, **changes) -> list:
    data = TrainingData(sources(corpus, **{"tempo_probability": 0.0, **changes}), seed=2)
    return [data.item(0, position) for position in range(count)]


@pytest.fixture(scope="module")
def gappy(tmp_path_factory) -> Path:
    """One second of sound, three of almost nothing: half-second crops are active or are not."""
    folder = tmp_path_factory.mktemp("gappy")
    random = np.random.default_rng(0)
    speech = {}
    for n in range(6):
        speech[f"s{n}"] = 1e-3 * random.standard_normal(64_000)
        speech[f"s{n}"][16_000 * (n % 4) : 16_000 * (n % 4 + 1)] *= 100.0
    noise = 0.05 * random.standard_normal(64_000)
    noise[::3] = 0
    noise[8000:40_000] *= 1e-3
    write_sources(folder, "train_clean", speech)
    write_sources(folder, "train_noise", {"n0": noise})
    return folder


def test_stretches_below_the_activity_threshold_are_drawn_again(gappy):
    plain = {"tempo_probability": 0.0, "reverb_probability": 0.0, "segment_seconds": 2.0}
    free, strict = (
        TrainingData(sources(gappy, activity_threshold=threshold, **plain), seed=1)
        for threshold in (0.0, 0.4)
    )
    below = {True: 0, False: 0}
    for place in [(epoch, position) for epoch in range(20) for position in range(6)]:
        for data, is_strict in ((free, False), (strict, True)):
            recipe = data.item(*place).recipe
            (part,) = recipe["speech"]
            speech = stored(gappy, "train_clean", part["key"])[part["start"] : part["start"] + part["frames"]]
            share = active_share(speech.astype(np.float32))
            assert recipe["activity"] == (pytest.approx(share) if is_strict else None)
            below[is_strict] += share < 0.4
    # Of 120 crops; five chances each. The utterance itself always has its turn.
    assert below[False] > 40
    assert below[True] < below[False] / 4
    assert sorted(strict.item(3, at).recipe["speech"][0]["key"] for at in range(6)) == strict.iterated.keys


def test_the_ratio_over_active_noise(gappy):
    plain = {"tempo_probability": 0.0, "reverb_probability": 0.0, "segment_seconds": 3.0}
    for position in range(6):
        whole = TrainingData(sources(gappy, **plain), seed=1).item(0, position)
        active = TrainingData(sources(gappy, snr_kind="active", **plain), seed=1).item(0, position)
        assert whole.recipe["snr_kind"] == "whole"
        assert active.recipe["snr_kind"] == "active"
        added = active.noisy.astype(np.float64) - active.clean
        measured = active_noise_samples(active.clean, added.astype(np.float32))
        ratio = np.sum(active.clean[measured].astype(np.float64) ** 2) / np.sum(added[measured] ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(active.recipe["snr_db"], abs=0.05)
        assert active.recipe["snr_db"] == whole.recipe["snr_db"]


def test_the_target_may_leave_the_room_behind(corpus):
    kinds = {kind: segments(corpus, reverb_target=kind) for kind in ("reverberant", "early", "dry")}
    rooms = 0
    for wet, early, dry in zip(*kinds.values(), strict=True):
        recipe = wet.recipe
        assert (recipe["target"], early.recipe["target"], dry.recipe["target"]) == tuple(kinds)
        if recipe["rir"] is None:
            for other in (early, dry):
                np.testing.assert_array_equal(other.clean, wet.clean)
                np.testing.assert_array_equal(other.noisy, wet.noisy)
            continue
        rooms += 1
        for other in (early, dry):
            # The same input but for the common gain, which looks at the target's peak, too.
            scale = other.recipe["peak_gain"] / recipe["peak_gain"]
            np.testing.assert_allclose(other.noisy, scale * wet.noisy, rtol=1e-4, atol=1e-6)
        room = stored(corpus, "train_rir", recipe["rir"])
        # Put back into the room, the dry target is the reverberant one.
        again = np.convolve(dry.clean.astype(np.float64), room / room[32])[32 : 32 + dry.clean.size]
        scale = dry.recipe["speech_gain"] / recipe["speech_gain"]
        np.testing.assert_allclose(again, scale * wet.clean, atol=1e-4 * np.abs(again).max() + 1e-6)
        # Rooms of 900 samples: early ends 832 after the start.
        part = np.convolve(dry.clean.astype(np.float64), room[:832] / room[32])[32 : 32 + dry.clean.size]
        scale = dry.recipe["speech_gain"] / early.recipe["speech_gain"]
        np.testing.assert_allclose(part, scale * early.clean, atol=1e-4 * np.abs(part).max() + 1e-6)
    assert 3 < rooms < 20


@pytest.mark.parametrize("config", [sources, pairs])
def test_the_channel_changes_the_noisy_side_alone(corpus, config):
    plain = config(corpus)
    changes = {"bandwidth_probability": 0.6, "codec_probability": 0.6, "codecs": "mu-law,gsm"}
    clear, transmitted = TrainingData(plain, 4), TrainingData(replace(plain, **changes), 4)
    seen = set()
    for position in range(13):
        before, after = clear.item(0, position), transmitted.item(0, position)
        np.testing.assert_array_equal(after.clean, before.clean)
        edge, codec = after.recipe["bandwidth_hz"], after.recipe["codec"]
        expected = before.noisy if edge is None else limit_bandwidth(before.noisy, edge)
        expected = expected if codec is None else through_codec(expected, codec)
        np.testing.assert_array_equal(after.noisy, np.clip(expected, -1, 1))
        same = ("bandwidth_hz", "codec", "segment")
        assert {k: v for k, v in after.recipe.items() if k not in same} == {
            k: v for k, v in before.recipe.items() if k not in same
        }
        seen.add((edge is not None, codec))
    assert len(seen) >= 4
