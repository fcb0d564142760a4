"""The classical baseline: its gain against the integral it stands for, its noise against known noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate

from mvat_dist.models.log_mmse import LogMmse, NoiseTracker, gain
from tests.signals import noise_at, syllables

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("prior", "posterior"), [(0.01, 0.5), (1.0, 1.0), (3.0, 7.0), (100.0, 90.0)])
def test_gain_is_that_of_the_expected_log_amplitude(prior, posterior):
    """exp E[ln A | Y] = G |Y| by Ephraim and Malah's model: A^2 given Y is that of a complex Gaussian."""
    wiener = prior / (1 + prior)
    mean, variance = wiener * np.sqrt(posterior), wiener  # of S given Y, where the noise's power is 1

    def log_amplitude(u: float, v: float) -> float:
        density = np.exp(-((u - mean) ** 2 + v**2) / variance) / (np.pi * variance)
        return 0.5 * np.log(u**2 + v**2) * density

    reach = 6 * np.sqrt(variance)
    half, _ = integrate.dblquad(log_amplitude, 0, reach, mean - reach, mean + reach, epsabs=1e-7)
    expected = np.exp(2 * half) / np.sqrt(posterior)  # symmetric in the imaginary part
    assert gain(np.array([prior]), np.array([posterior]))[0] == pytest.approx(expected, rel=1e-4)


def test_noise_is_tracked_and_followed_after_a_jump():
    random = np.random.default_rng(0)
    frames = random.exponential(1.0, (400, 257))
    tracker = NoiseTracker(frames[:12].mean(0))
    found = np.stack([tracker.update(frame) for frame in frames])
    assert 10 * np.log10(found[100:].mean()) == pytest.approx(0, abs=1.5)
    found = np.stack([tracker.update(4 * frame) for frame in frames])  # 6 dB louder
    assert 10 * np.log10(found[200:].mean()) == pytest.approx(6, abs=1.5)


def snr(clean: np.ndarray, heard: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(clean**2) / np.sum((heard - clean) ** 2)))


def test_it_takes_stationary_noise_away_and_leaves_clean_speech():
    clean = syllables(4.0)
    noisy = clean + noise_at(clean, 5.0)
    enhanced, untouched = LogMmse()(torch.from_numpy(np.stack([noisy, clean]).astype(np.float32))).numpy()
    assert snr(clean, enhanced) > snr(clean, noisy) + 3
    assert snr(clean, untouched) > 10


@pytest.mark.parametrize("samples", [1, 127, 512, 16001])
def test_any_length_and_silence(samples):
    noisy = torch.zeros(2, samples)
    noisy[1] = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    enhanced = LogMmse()(noisy)
    assert enhanced.shape == noisy.shape
    assert not enhanced[0].any()
    assert torch.isfinite(enhanced).all()
    assert enhanced[1].norm() <= 1.01 * noisy[1].norm()


def test_items_of_a_batch_do_not_meet():
    noisy = 0.1 * torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    together = LogMmse()(noisy)
    alone = torch.cat([LogMmse()(noisy[at : at + 1]) for at in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-7)
