"""The losses on waveforms: the authors' enhancement loss, and output distillation.

Both have two steps: what depends on the batch alone is prepared once and shared by all students.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mvat_dist.losses.distance import Reference, check_shapes, distance, reference, spectra
from mvat_dist.losses.stft import full_precision

WEIGHT_EPS = 2e-7
"""Added to the energy of speech plus noise (the authors' value)."""

LEAST_LEVEL = 1e-5
"""Level of a signal, -100 dB of full scale: what is quieter counts as being so loud (design choice)."""


@dataclass(frozen=True)
class Targets:
    """What the enhancement loss needs to know of a batch."""

    noisy: Tensor
    """(B, T), full scale 1."""
    spectra: list[Tensor]
    """Complex STFTs of `noisy`: less those of an estimate they are those of the noise that it leaves."""
    clean: Reference
    noise: Reference
    """Of the noise in `noisy`: noisy minus clean."""
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
        of_noisy, of_clean = spectra(noisy), spectra(clean)
        of_noise = [whole - speech for whole, speech in zip(of_noisy, of_clean, strict=True)]
        return Targets(noisy, of_noisy, reference(clean, of_clean), reference(noise, of_noise), weight)

    def __call__(self, estimate: Tensor, targets: Targets) -> Tensor:
        """The loss () of an estimate (B, T).

        Raises:
            ValueError: the estimate's shape is not that of the targets.
        """
        check_shapes(estimate, targets.noisy)
        of_speech = spectra(estimate)
        of_noise = [whole - speech for whole, speech in zip(targets.spectra, of_speech, strict=True)]
        speech = distance(estimate, targets.clean, of_speech)
        noise = distance(targets.noisy - estimate, targets.noise, of_noise)
        return (targets.weight * speech + (1 - targets.weight) * noise).mean()


class WaveformLoss:
    """mean|e - c| / mean|x| of estimate e, clean c and noisy x, mean over items; 0 or more, lower is better.

    The same at any level: the authors' loss counts this distance absolutely. Design choice; over the noisy
    signal, and not over the clean one, because that is never silent.
    """

    def __call__(self, estimate: Tensor, targets: Targets) -> Tensor:
        """The loss () of an estimate (B, T).

        Raises:
            ValueError: the estimate's shape is not that of the targets.
        """
        check_shapes(estimate, targets.noisy)
        error = (full_precision(estimate) - targets.clean.signal).abs().mean(-1)
        return (error / targets.noisy.abs().mean(-1).clamp(min=LEAST_LEVEL)).mean()


OutputTargets = Reference
"""The teacher's output, prepared."""


class OutputLoss:
    """Output distillation: the mean over items of d(student's output, teacher's output); lower is better.

    Not weighted by energy, a design choice: the teacher's output is taken as the clean speech is.
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
