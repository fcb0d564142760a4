"""Losses of a student's output: the authors' enhancement loss, added terms, and output distillation.

Each has two steps: `prepare` computes what depends on the batch alone, once for all students; the call
computes the loss of one student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mvat_dist.losses.stft import (
    Reference,
    check_shape,
    check_shapes,
    distance,
    full_precision,
    hann,
    power,
    reference,
    rms,
    spectra,
    stft,
)  # fmt: skip

WEIGHT_EPS = 2e-7
"""Added to the energy of speech plus noise (the authors' value)."""

LEAST_LEVEL = 1e-5
"""Smallest level of a signal, -100 dB of full scale: a quieter one counts as this loud (design choice)."""

COMPRESSION = 0.3
"""Exponent of the compressed magnitudes (arXiv 2008.06412)."""
COMPLEX_SHARE = 0.3
"""Weight of the part that depends on the phase (arXiv 2008.06412)."""
COMPRESSED_FFT, COMPRESSED_HOP = 512, 128
"""Length and hop of the periodic Hann windows, in samples: 32 and 8 ms (design choice)."""
COMPRESSED_FLOOR = 1e-6
"""Added to each bin's power so that gradients stay finite: 60 dB below a white signal as loud as the noisy
one (design choice)."""


@dataclass(frozen=True)
class Targets:
    """What the enhancement loss needs of a batch, prepared once for all students."""

    noisy: Tensor
    """(B, T), full scale 1."""
    spectra: list[Tensor]
    """Complex STFTs of `noisy`; minus those of an estimate, they are the STFTs of the estimated noise."""
    clean: Reference
    noise: Reference
    """The noise in `noisy`: noisy minus clean."""
    weight: Tensor
    """Share of the speech in the energy of speech plus noise, (B,), in [0, 1)."""


class EnhancementLoss:
    """Distance of speech and of noise, weighted by energy; lower is better (arXiv 2203.02181).

    With noisy x, clean c and estimate e: the mean over items of w * d(e, c) + (1 - w) * d(x - e, x - c),
    where w = |c|^2 / (|c|^2 + |x - c|^2 + 2e-7) and d is `distance`.
    """

    def prepare(self, noisy: Tensor, clean: Tensor) -> Targets:
        """Targets of one batch for any number of students.

        Args:
            noisy: (B, T), full scale 1.
            clean: (B, T), the speech in it.

        Raises:
            ValueError: the shapes differ, or T is less than the largest STFT window.
        """
        if noisy.shape != clean.shape:
            raise ValueError(f"noisy and clean differ in shape: {tuple(noisy.shape)}, {tuple(clean.shape)}")
        noisy, clean = full_precision(noisy.detach()), full_precision(clean.detach())
        noise = noisy - clean
        speech_energy, noise_energy = clean.square().sum(-1), noise.square().sum(-1)
        weight = speech_energy / (speech_energy + noise_energy + WEIGHT_EPS)
        noisy_spectra, clean_spectra = spectra(noisy), spectra(clean)
        noise_spectra = [
            mixture - speech for mixture, speech in zip(noisy_spectra, clean_spectra, strict=True)
        ]
        clean_reference, noise_reference = reference(clean, clean_spectra), reference(noise, noise_spectra)
        return Targets(noisy, noisy_spectra, clean_reference, noise_reference, weight)

    def __call__(self, estimate: Tensor, targets: Targets) -> Tensor:
        """The loss () of an estimate (B, T).

        Raises:
            ValueError: the estimate's shape is not that of the targets.
        """
        check_shapes(estimate, targets.noisy)
        speech_spectra = spectra(estimate)
        noise_spectra = [
            noisy - speech for noisy, speech in zip(targets.spectra, speech_spectra, strict=True)
        ]
        speech = distance(estimate, targets.clean, speech_spectra)
        noise = distance(targets.noisy - estimate, targets.noise, noise_spectra)
        return (targets.weight * speech + (1 - targets.weight) * noise).mean()


class WaveformLoss:
    """Relative distance of waveforms, mean|e - c| / mean|x|, averaged over items; 0 or more, lower is better.

    e is the estimate, c the clean and x the noisy signal. Its value does not depend on the level, unlike the
    same distance in the authors' loss. Design choice: it is relative to the noisy signal, because that is
    never silent.
    """

    def __call__(self, estimate: Tensor, targets: Targets) -> Tensor:
        """The loss () of an estimate (B, T).

        Raises:
            ValueError: the estimate's shape is not that of the targets.
        """
        check_shapes(estimate, targets.noisy)
        error = (full_precision(estimate) - targets.clean.signal).abs().mean(-1)
        return (error / targets.noisy.abs().mean(-1).clamp(min=LEAST_LEVEL)).mean()


class CompressedTargets(NamedTuple):
    """What the loss needs of a batch, prepared once for all students."""

    shape: torch.Size
    """(B, T)."""
    level: Tensor
    """RMS of the noisy signal, (B, 1); at least `LEAST_LEVEL`."""
    magnitude: Tensor
    """Compressed magnitudes of the clean signal, (B, frames, F)."""
    spectrum: Tensor
    """Compressed complex spectrum of the clean signal, (B, frames, F)."""


class CompressedLoss:
    """Distance of compressed spectra, in which quiet parts weigh more; lower is better, in [0, inf).

    0.7 mean(|E|^0.3 - |C|^0.3)^2 + 0.3 mean|E' - C'|^2.

    E and C are the STFTs of estimate and clean signal over the RMS of the noisy one, scaled so that white
    noise has bins of power 1, and their powers are floored by `COMPRESSED_FLOOR`; E' and C' have their
    phases and compressed magnitudes. Means over items, bins and frames.

    Source: Braun and Tashev, "Data augmentation and loss normalization for deep noise suppression", arXiv
    2008.06412; they divide by the level of active clean speech. Dividing by the noisy level, which is never
    that of silence, is a design choice.
    """

    def prepare(self, noisy: Tensor, clean: Tensor) -> CompressedTargets:
        """Targets of one batch (B, T) for any number of students.

        Raises:
            ValueError: the shapes differ, or T is no more than `COMPRESSED_FFT` // 2.
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
        window = hann(COMPRESSED_FFT, signal.dtype, signal.device)
        spectrum = stft(signal, COMPRESSED_FFT, COMPRESSED_HOP, window / window.square().sum().sqrt())
        floored = power(spectrum) + COMPRESSED_FLOOR
        factor = floored ** ((COMPRESSION - 1) / 2)
        return factor * floored.sqrt(), spectrum * factor


OutputTargets = Reference
"""The teacher's output, prepared."""


class OutputLoss:
    """Output distillation: the mean over items of d(student's output, teacher's output); lower is better.

    It is not weighted by energy: the teacher's output takes the place of the clean speech (design choice).
    """

    def prepare(self, teacher_output: Tensor) -> OutputTargets:
        """Targets of one batch for any number of students, from the teacher's output (B, T).

        Raises:
            ValueError: T is less than the largest STFT window.
        """
        return reference(teacher_output)

    def __call__(self, estimate: Tensor, target: OutputTargets) -> Tensor:
        """The loss () of a student's output (B, T).

        Raises:
            ValueError: its shape is not that of the teacher's output.
        """
        return distance(estimate, target).mean()
