"""How much of a signal is active, against the plain loops of the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat_dist.data.mixing.activity import active_share, ratio_samples
from tests.signals import syllables


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
    assert active_share(signal) == pytest.approx(plain_share(signal), abs=1e-12)


def test_the_share_is_of_the_level_independent_and_follows_the_speech():
    speech = syllables(4.0)
    share = active_share(speech)
    assert active_share(speech * np.float32(0.01)) == share
    half = np.concatenate([speech, np.zeros_like(speech)])
    assert 0.35 * share < active_share(half) < 0.65 * share
    assert active_share(np.zeros(8000, np.float32)) == 0.0
    assert active_share(np.random.default_rng(0).standard_normal(16_000).astype(np.float32)) == 1.0


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
    measured = ratio_samples(speech, noise)
    assert measured is not None
    ratio = np.sum(speech[measured].astype(np.float64) ** 2) / np.sum(noise[measured].astype(np.float64) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(plain_ratio(speech, noise), abs=1e-6)


def test_no_ratio_without_both():
    noise = np.zeros(8000, np.float32)
    noise[:1600] = 0.1
    speech = np.zeros(8000, np.float32)
    speech[4000:] = 0.1
    assert ratio_samples(speech, noise) is None
    assert ratio_samples(speech, np.zeros(8000, np.float32)) is None
    click = np.zeros(8000, np.float32)
    click[100] = 1.0  # 32 dB below its peak over 100 ms
    assert ratio_samples(speech, click) is None
    assert ratio_samples(noise, noise).sum() == 1600
