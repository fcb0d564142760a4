"""A classical denoiser to measure networks against: the log-MMSE amplitude estimator, which learns nothing.

Y. Ephraim and D. Malah, "Speech enhancement using a minimum mean-square error log-spectral amplitude
estimator", IEEE Trans. ASSP 33(2), 1985. The noise is tracked after T. Gerkmann and R. C. Hendriks, "Unbiased
MMSE-based noise power estimation with low complexity and low tracking delay", IEEE Trans. ASLP 20(4), 2012.
Constants are those of the papers; the noise's first estimate is the mean of the first 100 ms.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import exp1
from torch import Tensor, nn

Spectrum = npt.NDArray[np.float64]
"""A power, or a ratio of powers, per frequency: (F,)."""

_FFT, _HOP = 512, 128
"""Samples of a frame and between frames: 32 ms and 8 ms at 16 kHz."""
_FIRST_FRAMES = 12
_SMOOTHING = 0.98
"""Weight of the last frame in the a-priori SNR ("decision-directed", Ephraim and Malah 1984)."""
_LEAST_SNR = 10 ** (-25 / 10)
_LEAST_POWER = 1e-20
_LARGEST_SNR = 1e4

_SPEECH_SNR = 10 ** (15 / 10)
"""A-priori SNR of speech where it is present (Gerkmann and Hendriks, section III)."""
_PRESENCE_SMOOTHING, _NOISE_SMOOTHING = 0.9, 0.8
_STUCK = 0.99
"""Probability of speech beyond which, in the mean, the tracker is held to have lost the noise."""


def gain(prior: Spectrum, posterior: Spectrum) -> Spectrum:
    """Factor of the amplitude from the a-priori and the a-posteriori SNR (Ephraim and Malah, eq. 20)."""
    wiener = prior / (1 + prior)
    factor: Spectrum = wiener * np.exp(0.5 * exp1(np.maximum(wiener * posterior, 1e-8)))
    return factor


class NoiseTracker:
    """The noise's power in each frame, from the probability that speech is there."""

    def __init__(self, first: Spectrum) -> None:
        """`first` is an estimate (F,) to begin with."""
        self.power = np.maximum(first, _LEAST_POWER)
        self._presence = np.full_like(self.power, 0.5)

    def update(self, frame: Spectrum) -> Spectrum:
        """The noise's power (F,) in a `frame` of noisy speech of power (F,)."""
        exponent = frame / self.power * _SPEECH_SNR / (1 + _SPEECH_SNR)
        odds = np.exp(np.minimum(exponent, 200.0)) / (1 + _SPEECH_SNR)
        speech = odds / (1 + odds)
        self._presence = _PRESENCE_SMOOTHING * self._presence + (1 - _PRESENCE_SMOOTHING) * speech
        speech = np.where(self._presence > _STUCK, np.minimum(speech, _STUCK), speech)
        estimate = speech * self.power + (1 - speech) * frame
        smoothed = _NOISE_SMOOTHING * self.power + (1 - _NOISE_SMOOTHING) * estimate
        self.power = np.maximum(smoothed, _LEAST_POWER)
        return self.power


class LogMmse(nn.Module):
    """Enhances speech at 16 kHz by log-MMSE, on the CPU; has no parameters."""

    def forward(self, noisy: Tensor) -> Tensor:
        """(B, T) -> (B, T), full scale 1."""
        window = torch.hann_window(_FFT, device=noisy.device)
        spectra = torch.stft(noisy, _FFT, _HOP, window=window, pad_mode="constant", return_complex=True)
        powers = spectra.abs().square().double().cpu().numpy()
        gains = torch.from_numpy(np.stack([_gains(power.T).T for power in powers])).to(spectra)
        return torch.istft(spectra * gains, _FFT, _HOP, window=window, length=noisy.shape[-1])


def _gains(powers: Spectrum) -> Spectrum:
    """Factors of the amplitudes (frames, F) from the powers of noisy speech."""
    sounding = powers[powers.sum(1) > 0]  # digital silence tells nothing about the noise
    tracker = NoiseTracker(sounding[:_FIRST_FRAMES].mean(0) if len(sounding) else powers[0])
    factors = np.ones_like(powers)
    speech = np.zeros_like(powers[0])
    for number, power in enumerate(powers):
        if not power.any():
            continue
        noise = tracker.update(power)
        posterior = np.minimum(power / noise, _LARGEST_SNR)
        prior = _SMOOTHING * speech / noise + (1 - _SMOOTHING) * np.maximum(posterior - 1, 0)
        factors[number] = np.minimum(gain(np.clip(prior, _LEAST_SNR, _LARGEST_SNR), posterior), 1.0)
        speech = factors[number] ** 2 * power
    return factors
