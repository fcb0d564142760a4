"""The distance between two waveforms that every loss on waveforms is made of.

d(a, b) = mean|a - b| + 0.5 * SC(a, b) + 0.5 * MAG(a, b), with spectral convergence SC and log-magnitude
distance MAG averaged over three STFT resolutions (Yamamoto et al., "Parallel WaveGAN", arXiv 1910.11480).
The STFT's conventions are those of `src/stft_loss.py` in github.com/winddori2002/MANNER: centred frames with
reflected edges, periodic Hann windows, no normalisation, one value per item.

A spectrum is linear in its signal, so that of a difference is the difference of two: a caller who knows it
hands it in, and no second STFT is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

POWER_FLOOR = 1e-7
"""Least squared magnitude: keeps the logarithm and its gradient finite in silence."""


class Resolution(NamedTuple):
    """Parameters of one STFT, in samples."""

    fft: int
    hop: int
    window: int


RESOLUTIONS = (Resolution(1024, 120, 600), Resolution(2048, 240, 1200), Resolution(512, 50, 240))
SHORTEST = max(resolution.window for resolution in RESOLUTIONS)
"""Fewest samples of a signal that has a distance."""


class Reference(NamedTuple):
    """A signal that others are compared with, and what is computed of it once."""

    signal: Tensor
    """(B, T), full scale 1."""
    magnitudes: list[Tensor]
    """STFT magnitudes (B, F, frames), one per resolution."""
    logarithms: list[Tensor]
    """Their natural logarithms."""


def spectra(signal: Tensor) -> list[Tensor]:
    """Complex STFTs (B, F, frames) of a signal (B, T), one per resolution, in float32 (float64 stays).

    Raises:
        ValueError: it has another shape, or is shorter than the largest window.
    """
    if signal.ndim != 2 or signal.shape[-1] < SHORTEST:
        shape = tuple(signal.shape)
        raise ValueError(f"a signal must be (B, T) with T of at least {SHORTEST} samples, got shape {shape}")
    with torch.autocast(signal.device.type, enabled=False):
        signal = full_precision(signal)
        return [
            torch.stft(
                signal,
                n_fft=resolution.fft,
                hop_length=resolution.hop,
                win_length=resolution.window,
                window=hann(resolution.window, signal.dtype, signal.device),
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )
            for resolution in RESOLUTIONS
        ]


def reference(signal: Tensor, known: Sequence[Tensor] | None = None) -> Reference:
    """Prepare a target (B, T) for any number of estimates; no gradient flows into it.

    Args:
        signal: (B, T), full scale 1.
        known: its `spectra`, where the caller has them.

    Raises:
        ValueError: it is shorter than the largest window.
    """
    with torch.autocast(signal.device.type, enabled=False):
        signal = full_precision(signal.detach())
        powers = [_power(spectrum.detach()) for spectrum in known or spectra(signal)]
        return Reference(signal, [p.sqrt() for p in powers], [0.5 * p.log() for p in powers])


def distance(estimate: Tensor, target: Reference, known: Sequence[Tensor] | None = None) -> Tensor:
    """d(estimate, target) per item: (B, T) -> (B,); lower is better, 0 is equal.

    In float32, whatever autocast says around it, for logarithms of spectra need the range; float64
    stays float64.

    Args:
        estimate: (B, T), full scale 1.
        target: what it is compared with.
        known: the estimate's `spectra`, where the caller has them.

    Raises:
        ValueError: the two signals differ in shape.
    """
    check_shapes(estimate, target.signal)
    with torch.autocast(estimate.device.type, enabled=False):
        estimate = full_precision(estimate)
        spectral = [
            _spectral_distance(_power(spectrum), magnitude, logarithm)
            for spectrum, magnitude, logarithm in zip(known or spectra(estimate), *target[1:], strict=True)
        ]
        return (estimate - target.signal).abs().mean(-1) + 0.5 * torch.stack(spectral).mean(0)


def check_shapes(estimate: Tensor, target: Tensor) -> None:
    """Refuse an estimate of another shape than its target.

    Raises:
        ValueError: with both shapes.
    """
    check_shape(estimate, target.shape)


def check_shape(estimate: Tensor, shape: torch.Size) -> None:
    """As `check_shapes`, of a target that is known by its shape."""
    if estimate.shape != shape:
        raise ValueError(f"estimate and target differ in shape: {tuple(estimate.shape)}, {tuple(shape)}")


def full_precision(signal: Tensor) -> Tensor:
    """The signal in float32, or in float64 where it is that already."""
    return signal if signal.dtype == torch.float64 else signal.float()


def rms(signal: Tensor, least: float) -> Tensor:
    """Root mean square (B, 1) of a signal (B, T), at least `least`, with a finite gradient."""
    return full_precision(signal).square().mean(-1, keepdim=True).clamp(min=least**2).sqrt()


def _spectral_distance(power: Tensor, magnitude: Tensor, logarithm: Tensor) -> Tensor:
    """SC + MAG of one resolution, (B,)."""
    error: Tensor = torch.linalg.vector_norm(power.sqrt() - magnitude, dim=(1, 2))
    norm: Tensor = torch.linalg.vector_norm(magnitude, dim=(1, 2))
    return error / norm + (0.5 * power.log() - logarithm).abs().mean(dim=(1, 2))


def _power(spectrum: Tensor) -> Tensor:
    """Squared magnitude of a complex STFT, at least `POWER_FLOOR`."""
    real, imaginary = torch.view_as_real(spectrum).unbind(-1)
    return (real.square() + imaginary.square()).clamp(min=POWER_FLOOR)


@lru_cache(maxsize=16)
def hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The periodic Hann window, made once."""
    # Also where the first to ask is in inference mode: a later training may have to save it for its backward.
    with torch.inference_mode(mode=False):
        return torch.hann_window(length, dtype=dtype, device=device)
