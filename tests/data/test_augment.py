"""Tempo, bandwidth and codecs: what changes, what does not, and clean stays aligned with noisy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing import augment
from mvat_dist.data.mixing.augment import CODECS, degrade, limit_bandwidth, through_codec, writable_codecs
from mvat_dist.data.mixing.sampler import CounterRandom
from tests.signals import noise_at, syllables

RATE = 16_000
FACTORS = [0.8, 0.9, 1.05, 1.1, 1.3]


def stretched(signal, length: int, factor: float) -> np.ndarray:
    """`signal` is a function of the time in seconds."""
    time = np.arange(augment.input_length(length, factor)) / RATE
    return augment.change_tempo([signal(time).astype(np.float32)], length, factor)[0]


def strongest_frequency(signal: np.ndarray) -> float:
    """Of the spectrum, in Hz, interpolated between bins (parabola through the log magnitudes)."""
    spectrum = np.log(np.abs(np.fft.rfft(signal * np.hanning(signal.size))) + 1e-12)
    peak = int(np.argmax(spectrum[1:-1])) + 1
    left, middle, right = spectrum[peak - 1 : peak + 2]
    return (peak + 0.5 * (left - right) / (left - 2 * middle + right)) * RATE / signal.size


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 9000), factor=st.floats(0.5, 2.0))
def test_the_length_is_exact_and_little_more_than_needed_is_read(length, factor):
    needed = augment.input_length(length, factor)
    assert needed <= factor * length + augment.FRAME + augment.HOP + augment.SEARCH
    signal = np.random.default_rng(length).standard_normal(needed).astype(np.float32)
    result = augment.change_tempo([signal], length, factor)[0]
    assert result.shape == (length,)
    assert result.dtype == np.float32


def test_factor_one_is_the_identity():
    signal = np.random.default_rng(1).standard_normal(augment.input_length(5000, 1.0)).astype(np.float32)
    points = augment.splice_points(signal, 5000, 1.0)
    np.testing.assert_allclose(augment.splice(signal, points, 5000), signal[:5000], atol=1e-6)
    np.testing.assert_array_equal(augment.change_tempo([signal], 5000, 1.0)[0], signal[:5000])


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("pitch", [80.0, 220.0, 1000.0])
def test_pitch_and_level_of_a_tone_are_kept(pitch, factor):
    result = stretched(lambda time: 0.5 * np.sin(2 * np.pi * pitch * time), 2 * RATE, factor)
    assert strongest_frequency(result) == pytest.approx(pitch, abs=0.5)
    assert np.sqrt(np.mean(result**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize("factor", FACTORS)
def test_the_rhythm_of_a_tone_follows_the_factor(factor):
    def beating(time):
        return (1 + np.cos(2 * np.pi * 4.0 * time)) * np.sin(2 * np.pi * 300.0 * time)

    envelope = np.abs(stretched(beating, 4 * RATE, factor))
    assert strongest_frequency(envelope - envelope.mean()) == pytest.approx(4.0 * factor, abs=0.05)


@pytest.mark.parametrize("factor", FACTORS)
def test_clicks_come_sooner_or_later(factor):
    starts = np.arange(800, 4 * RATE, 4000)

    def clicks(time):
        decay = np.exp(-np.arange(200) / 30) * np.sin(np.arange(200))
        signal = np.zeros(time.size + 200)
        for start in starts[starts < time.size]:
            signal[start : start + 200] += decay
        return signal[: time.size]

    result = np.abs(stretched(clicks, 2 * RATE, factor))
    for start in starts[starts / factor < 2 * RATE - 800]:
        expected = start / factor
        near = result[max(0, round(expected) - 700) : round(expected) + 700]
        found = max(0, round(expected) - 700) + int(np.argmax(near))
        # Out of step by the search range and half a frame at most.
        assert abs(found - expected) <= augment.SEARCH + augment.HOP
        assert near.max() > 0.2  # weaker where a splice falls onto it, never lost


@pytest.mark.parametrize("factor", FACTORS)
def test_clean_and_noise_stay_additive_and_aligned(factor):
    random = np.random.default_rng(3)
    needed = augment.input_length(12_000, factor)
    clean = np.sin(np.arange(needed) * 0.05).astype(np.float32)
    noise = 0.3 * random.standard_normal(needed).astype(np.float32)
    stretched_clean, stretched_noisy, stretched_noise = augment.change_tempo(
        [clean, clean + noise, noise], 12_000, factor
    )
    np.testing.assert_allclose(stretched_noisy, stretched_clean + stretched_noise, atol=2e-6)


def test_silence_stays_in_step():
    needed = augment.input_length(20_000, 1.25)
    points = augment.splice_points(np.zeros(needed, np.float32), 20_000, 1.25)
    due = np.round(np.arange(points.size) * augment.HOP * 1.25)
    assert np.abs(points - due).max() <= augment.SEARCH


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(0.5, 2.0), seed=st.integers(0, 99))
def test_frames_stay_near_their_due_position_and_inside_the_input(factor, seed):
    length = 8000
    needed = augment.input_length(length, factor)
    signal = np.random.default_rng(seed).standard_normal(needed).astype(np.float32)
    points = augment.splice_points(signal, length, factor)
    due = np.round(np.arange(points.size) * augment.HOP * factor)
    assert np.abs(points - due).max() <= augment.SEARCH
    assert points.min() >= 0
    assert points.max() + augment.FRAME <= needed


SPEECH = syllables(2.0)
NOISY = SPEECH + noise_at(SPEECH, 10.0)

codecs = pytest.mark.parametrize(
    "codec",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name not in writable_codecs(), reason="not in this libsndfile")
        )
        for name in CODECS
    ],
)


def lag(received: np.ndarray, sent: np.ndarray) -> float:
    """Delay of `received` in samples, between samples by a parabola through the correlation's peak."""
    likeness = correlate(received.astype(np.float64), sent.astype(np.float64), method="fft")
    peak = int(np.argmax(likeness))
    left, middle, right = likeness[peak - 1 : peak + 2]
    return peak - (sent.size - 1) + 0.5 * (left - right) / (left - 2 * middle + right)


def similarity(received: np.ndarray, sent: np.ndarray) -> float:
    return float(np.corrcoef(received, sent)[0, 1])


@codecs
def test_a_codec_loses_something_and_stays_in_step(codec):
    received = through_codec(NOISY, codec)
    assert received.shape == NOISY.shape
    assert received.dtype == np.float32
    assert abs(lag(received, NOISY)) < 0.2
    assert 0.8 < similarity(received, NOISY) < 0.9999
    # The end is there, too: a codec's delay that was only cut off would leave silence.
    assert similarity(received[-3200:-1600], NOISY[-3200:-1600]) > 0.7
    np.testing.assert_array_equal(through_codec(NOISY, codec), received)


@codecs
@pytest.mark.parametrize("samples", [1, 160, 3001, 40_007])
def test_a_codec_keeps_any_length(codec, samples):
    signal = np.resize(NOISY, samples)
    assert through_codec(signal, codec).shape == (samples,)


@settings(max_examples=40)
@given(edge=st.floats(500, 7900), samples=st.integers(4000, 20_000))
def test_a_limited_band_ends_at_its_edge(edge, samples):
    white = (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)
    narrow = limit_bandwidth(white, edge)
    assert narrow.shape == white.shape
    assert narrow.dtype == np.float32
    window = np.hanning(samples)
    before, after = (np.abs(np.fft.rfft(signal * window)) ** 2 for signal in (white, narrow))
    frequency = np.fft.rfftfreq(samples, 1 / 16_000)
    passed, stopped = frequency < 0.85 * edge, frequency > 1.02 * edge
    assert after[passed].sum() == pytest.approx(before[passed].sum(), rel=0.02)
    assert after[stopped].sum() <= 1e-4 * max(before[stopped].sum(), before[passed].sum())
    # In step: what is left of the pass band is the signal itself.
    spectrum = np.fft.rfft(white * window) * np.conj(np.fft.rfft(narrow * window))
    assert abs(np.angle(spectrum[passed].sum())) < 0.01


def test_the_recipe_says_what_was_done():
    plain = DataConfig()
    untouched, recipe = degrade(NOISY, plain, CounterRandom(0, 0, 0))
    assert untouched is NOISY
    assert recipe == {"bandwidth_hz": None, "codec": None}
    both = replace(
        plain,
        bandwidth_probability=1.0,
        bandwidth_hz=(3000.0, 3500.0),
        codec_probability=1.0,
        codecs="mu-law",
    )
    received, recipe = degrade(NOISY, both, CounterRandom(0, 0, 0))
    assert 3000 <= recipe["bandwidth_hz"] <= 3500
    assert recipe["codec"] == "mu-law"
    np.testing.assert_array_equal(
        received, through_codec(limit_bandwidth(NOISY, recipe["bandwidth_hz"]), "mu-law")
    )
    some = replace(plain, codec_probability=0.5, codecs="mu-law, gsm")
    drawn = [degrade(NOISY[:800], some, CounterRandom(0, 0, place))[1]["codec"] for place in range(200)]
    assert {name: drawn.count(name) > 25 for name in ("mu-law", "gsm")} == {"mu-law": True, "gsm": True}
    assert 70 < drawn.count(None) < 130


def test_a_loud_signal_stays_within_full_scale():
    loud = (0.99 * np.sign(NOISY)).astype(np.float32)
    config = replace(DataConfig(), bandwidth_probability=1.0)
    received, _ = degrade(loud, config, CounterRandom(0, 0, 0))
    assert np.abs(limit_bandwidth(loud, 4000.0)).max() > 1.0
    assert np.abs(received).max() <= 1.0
