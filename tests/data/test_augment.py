"""Tempo changes, pitch does not, and clean stays aligned with noisy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat_dist.data.mixing import augment

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
