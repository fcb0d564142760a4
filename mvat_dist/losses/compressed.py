"""The distance of compressed spectra: what the ear notices weighs more than what is loud."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mvat_dist.losses.distance import check_shape, check_shapes, rms
from mvat_dist.losses.enhancement import LEAST_LEVEL
from mvat_dist.losses.stft import full_precision, hann, power, stft

EXPONENT = 0.3
"""Of magnitudes (the paper's value)."""
COMPLEX_SHARE = 0.3
"""Of the part that heeds the phase (the paper's value)."""
FFT, HOP = 512, 128
"""Length and hop of the periodic Hann windows, in samples: 32 and 8 ms (design choice)."""
POWER_FLOOR = 1e-6
"""Added to each bin's power: gradients stay finite. 60 dB below a white signal as loud as the noisy one
(design choice)."""


class CompressedTargets(NamedTuple):
    """What the loss needs to know of a batch."""

    shape: torch.Size
    """(B, T)."""
    level: Tensor
    """RMS of the noisy signal, (B, 1); at least `LEAST_LEVEL`."""
    magnitude: Tensor
    """Compressed magnitudes of the clean one, (B, frames, F)."""
    spectrum: Tensor
    """Compressed complex spectrum of the clean one, (B, frames, F)."""


class CompressedLoss:
    """0.7 mean(|E|^0.3 - |C|^0.3)^2 + 0.3 mean|E' - C'|^2; lower is better, in [0, inf).

    E and C are the STFTs of estimate and clean signal over the RMS of the noisy one, scaled so that white
    noise has bins of power 1, and their powers are floored by `POWER_FLOOR`; E' and C' have their phases and
    compressed magnitudes. Means over items, bins and frames.

    Source: Braun and Tashev, "Data augmentation and loss normalization for deep noise suppression", arXiv
    2008.06412; they divide by the level of active clean speech. The noisy level, which is never that of
    silence, is a design choice.
    """

    def prepare(self, noisy: Tensor, clean: Tensor) -> CompressedTargets:
        """Targets of one batch (B, T) for any number of students.

        Raises:
            ValueError: the shapes differ, or T is no more than `FFT` // 2.
        """
        check_shapes(clean, noisy)
        level = rms(noisy.detach(), LEAST_LEVEL)
        return CompressedTargets(clean.shape, level, *_compressed(clean.detach(), level))

    def __call__(self, estimate: Tensor, targets: CompressedTargets) -> Tensor:
        """The loss () of an estimate (B, T).

        Raises:
            ValueError: the estimate's shape is not that of the targets.
        """
        check_shape(estimate, targets.shape)
        magnitude, spectrum = _compressed(estimate, targets.level)
        of_magnitudes = (magnitude - targets.magnitude).square().mean()
        of_spectra = power(spectrum - targets.spectrum).mean()
        return (1 - COMPLEX_SHARE) * of_magnitudes + COMPLEX_SHARE * of_spectra


def _compressed(signal: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Compressed magnitudes and complex spectrum (B, frames, F) of a signal (B, T)."""
    with torch.autocast(signal.device.type, enabled=False):
        signal = full_precision(signal) / level
        window = hann(FFT, signal.dtype, signal.device)
        spectrum = stft(signal, FFT, HOP, window / window.square().sum().sqrt())
        floored = power(spectrum) + POWER_FLOOR
        factor = floored ** ((EXPONENT - 1) / 2)
        return factor * floored.sqrt(), spectrum * factor
