"""Segments: a function of their place alone, and mixtures that their recipes explain."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.loader import TrainingData
from mvat_dist.data.mixing import reverb
from mvat_dist.data.mixing.dynamic import FADE, GAP
from mvat_dist.data.mixing.premixed import segment_grid
from mvat_dist.data.mixing.sampler import CounterRandom
from tests.tiny_corpus import write_sources
from tests.training_corpus import (
    LENGTH,
    PAIRS,
    SEGMENT,
    UTTERANCES,
    pairs,
    same,
    sources,
    stored,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tiny") / "packed corpus")


@pytest.mark.parametrize("config", [sources, pairs])
def test_an_item_depends_on_its_place_alone(corpus, config):
    data = TrainingData(config(corpus, tempo_probability=0.5, remix_probability=0.5), seed=3)
    places = [(epoch, position) for epoch in (0, 1) for position in range(0, len(data), 2)]
    first = {place: data.item(*place) for place in places}
    twin = copy.deepcopy(data)  # as pickling does
    for place in reversed(places):
        assert same(first[place], twin.item(*place))
        assert same(first[place], data.item(*place))
    for segment in first.values():
        assert segment.noisy.shape == segment.clean.shape == (LENGTH,)
        assert segment.noisy.dtype == segment.clean.dtype == np.float32
        assert np.isfinite(segment.noisy).all()
        assert json.loads(json.dumps(segment.recipe)) == segment.recipe
    other = TrainingData(data.config, seed=4)
    assert not any(same(first[place], other.item(*place)) for place in places)
    assert not same(data.item(0, 0), data.item(1, 0))


def test_sources_visit_every_utterance_once_an_epoch(corpus):
    data = TrainingData(sources(corpus), seed=0)
    assert data.mode == "dynamic"
    for epoch in (0, 5):
        first = [data.item(epoch, at).recipe["speech"][0]["key"] for at in range(len(data))]
        assert sorted(first) == sorted(data.iterated.keys)
        assert len(first) == UTTERANCES


def rebuild(corpus: Path, subset: str, parts: list[dict], gap: int) -> np.ndarray:
    """A side of the mixture before levels, from the recipe."""
    audio = np.zeros(LENGTH)
    at = 0
    for number, part in enumerate(parts):
        piece = stored(corpus, subset, part["key"])[part["start"] : part["start"] + part["frames"]].copy()
        fade = min(FADE, piece.size)
        if number > 0:
            piece[:fade] *= np.arange(fade) / fade
        if number < len(parts) - 1:
            piece[-fade:] *= np.arange(fade)[::-1] / fade
        audio[at : at + piece.size] = piece
        at += piece.size + gap
    assert at >= LENGTH
    return audio


def test_the_recipe_explains_the_mixture(corpus):
    data = TrainingData(sources(corpus, tempo_probability=0.0, reverb_probability=0.5), seed=1)
    reverberant = joined = 0
    for position in range(len(data)):
        segment = data.item(2, position)
        recipe = segment.recipe
        assert (recipe["epoch"], recipe["position"]) == (2, position)
        speech = rebuild(corpus, "train_clean", recipe["speech"], GAP)
        noise = rebuild(corpus, "train_noise", recipe["noise"], 0)
        if recipe["rir"]:
            speech = np.convolve(speech, stored(corpus, "train_rir", recipe["rir"]))[32 : 32 + LENGTH]
        np.testing.assert_allclose(segment.clean, recipe["speech_gain"] * speech, atol=2e-6)
        expected = recipe["speech_gain"] * speech + recipe["noise_gain"] * noise
        np.testing.assert_allclose(segment.noisy, expected, atol=3e-6)

        added = segment.noisy.astype(np.float64) - segment.clean
        ratio = 10 * np.log10((segment.clean.astype(np.float64) ** 2).sum() / (added**2).sum())
        assert ratio == pytest.approx(recipe["snr_db"], abs=0.01)
        assert -5 <= recipe["snr_db"] <= 20
        level = 20 * np.log10(np.sqrt(np.mean(segment.noisy.astype(np.float64) ** 2)) / recipe["peak_gain"])
        assert level == pytest.approx(recipe["level_dbfs"], abs=1e-3)
        assert -35 <= recipe["level_dbfs"] <= -15
        assert np.abs(segment.noisy).max() <= 0.99
        assert recipe["silent"] == []
        reverberant += bool(recipe["rir"])
        joined += len(recipe["speech"]) > 1
    assert 5 < reverberant < 24
    assert joined > 3


def test_synthetic_rooms_need_none_of_the_corpus_and_are_in_the_recipe(corpus):
    plain = sources(corpus, tempo_probability=0.0, reverb_probability=1.0)
    data = TrainingData(replace(plain, synthetic_rooms=1.0), seed=1)
    seconds = []
    for position in range(len(data)):
        segment = data.item(0, position)
        room = reverb.SyntheticRoom(**segment.recipe["rir"])
        speech = rebuild(corpus, "train_clean", segment.recipe["speech"], GAP)
        wet = np.convolve(speech, room.impulse_response())[:LENGTH]
        np.testing.assert_allclose(segment.clean, segment.recipe["speech_gain"] * wet, atol=2e-6)
        seconds.append(room.t60)
    assert 0.2 <= min(seconds) < 0.4 < 0.8 < max(seconds) <= 1.0
    some = TrainingData(replace(plain, synthetic_rooms=0.5), seed=1)
    kinds = {type(some.item(0, position).recipe["rir"]) for position in range(len(some))}
    assert kinds == {str, dict}


def drawn_by_hand(
    draws: CounterRandom, config: DataConfig, is_synthetic: Callable[[CounterRandom], bool]
) -> dict:
    """What a recipe says of room, ratio and level, by the numbers drawn when the code was written."""
    draws.fraction(), draws.fraction()  # tempo: whether, and how much
    rir = None
    if draws.fraction() < config.reverb_probability:
        if is_synthetic(draws):
            t60, drr_db = 0.2 + 0.8 * draws.fraction(), -3.0 + 15.0 * draws.fraction()
            rir = {"t60": t60, "drr_db": drr_db, "seed": draws.integer(2**32)}
        else:
            rir = f"r{draws.integer(2)}"
    return {
        "rir": rir,
        "snr_db": draws.uniform(*config.snr_db),
        "level_dbfs": draws.uniform(*config.level_dbfs),
    }


@pytest.mark.parametrize(
    ("share", "is_synthetic"),
    [(0.0, lambda _: False), (0.5, lambda draws: draws.fraction() < 0.5), (1.0, lambda _: True)],
)
def test_a_room_takes_as_many_numbers_as_in_the_runs_of_yesterday(corpus, share, is_synthetic):
    """Segments without synthetic rooms are those from before there were any: nothing more is drawn."""
    config = sources(corpus, tempo_probability=0.0, reverb_probability=0.6, synthetic_rooms=share)
    data = TrainingData(config, seed=7)
    found = []
    for position in range(len(data)):
        recipe = data.item(1, position).recipe
        expected = drawn_by_hand(CounterRandom(7, 1, position), config, is_synthetic)
        assert {name: recipe[name] for name in expected} == expected
        found.append(type(recipe["rir"]))
    kinds = {0.0: {str}, 0.5: {str, dict}, 1.0: {dict}}
    assert set(found) == kinds[share] | {type(None)}


def test_tempo_changes_the_speech_and_not_the_noise(corpus):
    plain = sources(corpus, tempo_probability=0.0, reverb_probability=0.0)
    faster = replace(plain, tempo_probability=1.0, tempo_range=(1.2, 1.2))
    segment = TrainingData(faster, seed=0).item(0, 0)
    assert segment.recipe["tempo"] == 1.2
    noise = rebuild(corpus, "train_noise", segment.recipe["noise"], 0)
    np.testing.assert_allclose(segment.noisy - segment.clean, segment.recipe["noise_gain"] * noise, atol=3e-6)
    used = sum(part["frames"] for part in segment.recipe["speech"])
    assert used + GAP * (len(segment.recipe["speech"]) - 1) > 1.1 * LENGTH
    assert TrainingData(plain, seed=0).item(0, 0).recipe["tempo"] == 1.0


def test_silent_stretches_are_drawn_again_and_then_reported(tmp_path):
    random = np.random.default_rng(0)
    mostly_silent = np.zeros(20_000)
    mostly_silent[:9000] = 0.1
    write_sources(tmp_path, "train_clean", {"quiet": np.zeros(9000), "half": mostly_silent})
    write_sources(tmp_path, "train_noise", {"n": 0.1 * random.standard_normal(9000)})
    data = TrainingData(sources(tmp_path, reverb_probability=0.0, tempo_probability=0.0), seed=0)
    found = {"quiet": 0, "half": 0}
    for epoch in range(40):
        for position in range(2):
            segment = data.item(epoch, position)
            key, silent = segment.recipe["speech"][0]["key"], segment.recipe["silent"]
            found[key] += silent == ["speech"]
            assert (segment.recipe["snr_db"] is None) == (silent == ["speech"])
            assert np.isfinite(segment.noisy).all()
            assert segment.clean.any() == (key == "half" and not silent)
    # 3000 of 12,001 crops of "half" are silent: five in a row are rare.
    assert found["quiet"] == 40
    assert found["half"] <= 3


def test_pairs_are_cut_together_and_padded_at_the_end(corpus):
    data = TrainingData(pairs(corpus), seed=0)
    assert len(data) == PAIRS
    seen = set()
    for position in range(PAIRS):
        segment = data.item(0, position)
        key, start, frames = (segment.recipe[name] for name in ("key", "start", "frames"))
        for signal_, side in ((segment.clean, "clean"), (segment.noisy, "noisy")):
            whole = stored(corpus, "train_pairs", key, f"{side}.flac")
            np.testing.assert_array_equal(signal_[:frames], whole[start : start + frames].astype(np.float32))
            assert not signal_[frames:].any()
            assert frames == min(LENGTH, whole.size)
        seen.add(key)
    assert seen == set(data.iterated.keys)
    starts = {data.item(epoch, 0).recipe["start"] for epoch in range(30)}
    assert len(starts) > 5


@given(
    samples=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    length=st.integers(1, 900),
    stride=st.integers(1, 1200),
)
def test_the_grid_is_the_plain_loop(samples, length, stride):
    expected = []
    for utterance, size in enumerate(samples):
        start = 0
        while start + length < size:
            expected.append([utterance, start])
            start += stride
        expected.append([utterance, max(0, size - length)])
    assert segment_grid(np.array(samples), length, stride).tolist() == expected


def test_a_grid_visits_each_of_its_places_once_an_epoch(corpus):
    data = TrainingData(pairs(corpus, stride_seconds=SEGMENT / 4), seed=0)
    expected = segment_grid(data.iterated.samples, LENGTH, LENGTH // 4)
    recipes = [data.item(1, position).recipe for position in range(len(data))]
    places = {(recipe["key"], recipe["start"]) for recipe in recipes}
    assert places == {(data.iterated.keys[utterance], start) for utterance, start in expected.tolist()}
    assert len(places) == len(data) > PAIRS
    # A faster tempo needs more audio than a segment: it is taken from before the last place, not from beyond.
    faster = replace(data.config, tempo_probability=1.0, tempo_range=(1.3, 1.3))
    recipe = max((TrainingData(faster, 0).item(0, at).recipe for at in range(20)), key=lambda r: r["start"])
    assert recipe["frames"] > LENGTH
    assert (
        recipe["start"] + recipe["frames"] <= stored(corpus, "train_pairs", recipe["key"], "clean.flac").size
    )


def test_remix_takes_the_noise_of_another_pair(corpus):
    data = TrainingData(pairs(corpus, remix_probability=1.0), seed=0)
    plain = TrainingData(pairs(corpus), seed=0)
    for position in range(PAIRS):
        segment = data.item(0, position)
        remix = segment.recipe["remix"]
        assert remix["key"] != segment.recipe["key"]
        noisy, clean = (stored(corpus, "train_pairs", remix["key"], f"{s}.flac") for s in ("noisy", "clean"))
        noise = (noisy - clean)[remix["start"] : remix["start"] + remix["frames"]]
        repeated = np.tile(noise, LENGTH // noise.size + 1)[:LENGTH]
        np.testing.assert_allclose(segment.noisy - segment.clean, repeated, atol=1e-6)
        assert segment.recipe["peak_gain"] == 1.0
        np.testing.assert_array_equal(segment.clean, plain.item(0, position).clean)


def test_gain_is_common_and_does_not_clip(corpus):
    plain = TrainingData(pairs(corpus), seed=0).item(0, 3)
    quieter = TrainingData(pairs(corpus, gain_db=(-6.0, -6.0)), seed=0).item(0, 3)
    np.testing.assert_allclose(quieter.noisy, plain.noisy * 10 ** (-6 / 20), rtol=1e-5)
    np.testing.assert_allclose(quieter.clean, plain.clean * 10 ** (-6 / 20), rtol=1e-5)
    loud = TrainingData(pairs(corpus, gain_db=(30.0, 30.0)), seed=0).item(0, 3)
    assert 0.98 < np.abs(loud.noisy).max() <= 0.99
    ratio = np.abs(loud.noisy).max() / np.abs(plain.noisy).max()
    np.testing.assert_allclose(loud.clean, plain.clean * ratio, rtol=1e-4, atol=1e-7)


def test_tempo_keeps_pairs_additive(corpus):
    config = pairs(corpus, tempo_probability=1.0, tempo_range=(0.85, 0.85))
    segment = TrainingData(config, seed=0).item(0, 1)
    assert segment.recipe["tempo"] == 0.85
    assert segment.recipe["frames"] < LENGTH
    # The noise is white: it would not stay at its level, were the two spliced at different places.
    noise = (segment.noisy - segment.clean)[: segment.recipe["frames"]]
    assert noise.std() == pytest.approx(0.03, rel=0.2)
