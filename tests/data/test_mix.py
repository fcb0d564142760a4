"""Levels and ratios against closed forms, activity against the plain loops of its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat_dist.data.mixing import mix
from tests.signals import syllables

RANDOM = np.random.default_rng(0)


def noise(samples: int, scale: float = 0.1) -> np.ndarray:
    return (scale * RANDOM.standard_normal(samples)).astype(np.float32)


def decibels(ratio: float) -> float:
    return 10 * np.log10(ratio)


def power(signal: np.ndarray) -> float:
    return float(np.mean(signal.astype(np.float64) ** 2))


@settings(deadline=None, max_examples=60)
@given(
    snr_db=st.floats(-20, 40),
    level=st.floats(-60, -15),
    speech_scale=st.floats(1e-3, 1),
    noise_scale=st.floats(1e-3, 1),
)
def test_a_mixture_has_the_ratio_and_the_level_asked_for(snr_db, level, speech_scale, noise_scale):
    mixture = mix.mix(noise(4000, speech_scale), noise(4000, noise_scale), snr_db, level)
    added = mixture.noisy.astype(np.float64) - mixture.clean
    # At 40 dB the noise is the small difference of two float32 numbers.
    assert decibels(power(mixture.clean) / power(added)) == pytest.approx(snr_db, abs=0.01)
    assert decibels(power(mixture.noisy)) - decibels(mixture.peak_gain**2) == pytest.approx(level, abs=1e-3)
    assert mixture.noisy.dtype == mixture.clean.dtype == np.float32


def test_gains_in_closed_form():
    speech = np.tile(np.float32([0.5, -0.5]), 500)
    orthogonal = np.tile(np.float32([0.25, 0.25]), 500)
    mixture = mix.mix(speech, orthogonal, snr_db=10 * np.log10(4), level=-20)
    # 0.5 against 2 x 0.25 halved: powers 1/4 and 1/16 sum to 5/16, to be brought to 1/100.
    scale = np.sqrt(0.01 / (5 / 16))
    assert mixture.speech_gain == pytest.approx(scale, rel=1e-6)
    assert mixture.noise_gain == pytest.approx(scale, rel=1e-6)
    assert mixture.peak_gain == 1.0
    np.testing.assert_allclose(mixture.noisy, scale * (speech + orthogonal), rtol=1e-6)


def test_gains_explain_the_mixture():
    speech, disturbance = noise(3000), noise(3000, 0.01)
    mixture = mix.mix(speech, disturbance, 5.0, -25.0)
    np.testing.assert_allclose(mixture.clean, mixture.speech_gain * speech, rtol=1e-5, atol=1e-7)
    expected = mixture.speech_gain * speech + mixture.noise_gain * disturbance
    np.testing.assert_allclose(mixture.noisy, expected, rtol=1e-5, atol=1e-7)


def test_a_peak_is_limited_by_one_gain_for_both():
    speech = np.zeros(16_000, np.float32)
    speech[100] = 1.0  # at -35 dBFS the peak of one click would be 2.2
    mixture = mix.mix(speech, noise(16_000), snr_db=20.0, level=-35.0)
    assert 0.98 < np.abs(mixture.noisy).max() <= 0.99
    assert mixture.peak_gain < 1.0
    added = mixture.noisy.astype(np.float64) - mixture.clean
    assert decibels(power(mixture.clean) / power(added)) == pytest.approx(20.0, abs=0.01)


def test_silence_mixes_without_a_ratio():
    disturbance, silence = noise(1000), np.zeros(1000, np.float32)
    mixture = mix.mix(silence, disturbance, None, -20.0)
    assert decibels(power(mixture.noisy)) == pytest.approx(-20.0, abs=1e-3)
    assert not mixture.clean.any()
    nothing = mix.mix(silence, silence, None, -20.0)
    assert not nothing.noisy.any()


def test_the_ratio_over_some_samples_and_another_target():
    speech, disturbance, target = noise(4000), noise(4000, 0.03), noise(4000, 0.05)
    measured = np.arange(4000) // 500 % 2 == 1
    mixture = mix.mix(speech, disturbance, 7.0, -25.0, target=target, snr_mask=measured)
    heard, added = mixture.speech_gain * speech, mixture.noise_gain * disturbance
    assert decibels(power(heard[measured]) / power(added[measured])) == pytest.approx(7.0, abs=1e-3)
    np.testing.assert_allclose(mixture.noisy, heard + added, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(mixture.clean, mixture.speech_gain * target, rtol=1e-5)
    assert decibels(power(mixture.noisy)) == pytest.approx(-25.0, abs=1e-3)


def test_joined_pieces_keep_their_place_and_their_outer_ends():
    first, second, third = (np.full(size, value, np.float32) for size, value in ((50, 1), (60, 2), (3, 3)))
    joined = mix.join([first, second, third], gap=20, fade=10)
    assert joined.shape == (50 + 20 + 60 + 20 + 3,)
    np.testing.assert_array_equal(joined[:40], 1)
    np.testing.assert_array_equal(joined[50:70], 0)
    np.testing.assert_array_equal(joined[80:120], 2)
    np.testing.assert_array_equal(joined[130:150], 0)
    assert joined[-1] == pytest.approx(3 * 2 / 3)
    assert np.all(np.diff(joined[39:51]) <= 0)
    assert np.all(np.diff(joined[69:81]) >= 0)
    np.testing.assert_array_equal(first, 1)


def test_levels():
    assert mix.level_dbfs(np.ones(100, np.float32)) == pytest.approx(0.0)
    assert mix.level_dbfs(np.full(100, 0.1, np.float32)) == pytest.approx(-20.0, abs=1e-5)
    assert mix.level_dbfs(np.zeros(100, np.float32)) == -np.inf
    assert mix.is_silent(np.full(100, 1e-4, np.float32))
    assert not mix.is_silent(np.full(100, 1e-3, np.float32))


def frames(signal: np.ndarray, size: int) -> list[np.ndarray]:
    return [signal[start : start + size].astype(np.float64) for start in range(0, signal.size, size)]


def plain_share(signal: np.ndarray) -> float:
    """One frame after the other, each smoothed with the one before."""
    scaled = signal.astype(np.float64) * 10 ** (-25 / 20) / np.sqrt(np.mean(signal.astype(np.float64) ** 2))
    before, active = 0.0, 0
    parts = frames(scaled, 800)
    for part in parts:
        level = 20 * np.log10(np.sum(part**2) + 2.0**-52)
        now = 1 / (1 + np.exp(-(0.2 * level - 1)))
        smoothed = 0.8 * now + 0.2 * before if now > before else 0.05 * now + 0.95 * before
        active += smoothed > 0.13
        before = now
    return active / len(parts)


def bursts(seed: int, samples: int) -> np.ndarray:
    """Noise whose level changes every 20 to 200 ms by up to 80 dB."""
    random = np.random.default_rng(seed)
    levels = np.repeat(random.uniform(-90, -10, 60), random.integers(320, 3200, 60))[:samples]
    return (random.standard_normal(levels.size) * 10 ** (levels / 20)).astype(np.float32)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), samples=st.integers(1, 17_000))
def test_the_share_is_that_of_the_plain_loop(seed, samples):
    signal = bursts(seed, samples)
    assert mix.active_share(signal) == pytest.approx(plain_share(signal), abs=1e-12)


def test_the_share_is_of_the_level_independent_and_follows_the_speech():
    speech = syllables(4.0)
    share = mix.active_share(speech)
    assert mix.active_share(speech * np.float32(0.01)) == share
    half = np.concatenate([speech, np.zeros_like(speech)])
    assert 0.35 * share < mix.active_share(half) < 0.65 * share
    assert mix.active_share(np.zeros(8000, np.float32)) == 0.0
    assert mix.active_share(np.random.default_rng(0).standard_normal(16_000).astype(np.float32)) == 1.0


def plain_ratio(speech: np.ndarray, noise: np.ndarray) -> float:
    """Speech to noise in dB over the 100 ms frames whose noise is at most 25 dB below its peak."""
    power = [0.0, 0.0]
    peak = np.abs(noise).max()
    for said, added in zip(frames(speech, 1600), frames(noise, 1600), strict=True):
        if 20 * np.log10(np.sqrt(np.mean(added**2)) / peak + 1e-30) > -25:
            power[0] += np.sum(said**2)
            power[1] += np.sum(added**2)
    return 10 * np.log10(power[0] / power[1])


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), samples=st.integers(1600, 17_000))
def test_the_ratio_is_over_frames_with_noise(seed, samples):
    noise = bursts(seed, samples)
    speech = bursts(seed + 1, samples)
    speech, noise = speech[: noise.size], noise[: speech.size]
    measured = mix.active_noise_samples(speech, noise)
    assert measured is not None
    ratio = np.sum(speech[measured].astype(np.float64) ** 2) / np.sum(noise[measured].astype(np.float64) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(plain_ratio(speech, noise), abs=1e-6)


def test_no_ratio_without_both():
    noise = np.zeros(8000, np.float32)
    noise[:1600] = 0.1
    speech = np.zeros(8000, np.float32)
    speech[4000:] = 0.1
    assert mix.active_noise_samples(speech, noise) is None
    assert mix.active_noise_samples(speech, np.zeros(8000, np.float32)) is None
    click = np.zeros(8000, np.float32)
    click[100] = 1.0  # 32 dB below its peak over 100 ms
    assert mix.active_noise_samples(speech, click) is None
    assert mix.active_noise_samples(noise, noise).sum() == 1600
