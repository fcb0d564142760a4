"""The distance between two waveforms that every loss on waveforms is made of.

d(a, b) = mean|a - b| + 0.5 * SC(a, b) + 0.5 * MAG(a, b), with spectral convergence SC and log-magnitude
distance MAG averaged over three STFT resolutions (Yamamoto et al., "Parallel WaveGAN", arXiv 1910.11480).
The STFT's conventions are those of `src/stft_loss.py` in github.com/winddori2002/MANNER: centred frames with
reflected edges, periodic Hann windows, no normalisation, one value per item.
"""

from __future__ import annotations

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


def reference(signal: Tensor) -> Reference:
    """Prepare a target (B, T) for any number of estimates; no gradient flows into it.

    Raises:
        ValueError: it is shorter than the largest window.
    """
    with torch.autocast(signal.device.type, enabled=False):
        signal = full_precision(signal.detach())
        powers = [_power(signal, resolution) for resolution in RESOLUTIONS]
        return Reference(signal, [p.sqrt() for p in powers], [0.5 * p.log() for p in powers])


def distance(estimate: Tensor, target: Reference) -> Tensor:
    """d(estimate, target) per item: (B, T) -> (B,); lower is better, 0 is equal.

    In float32, whatever autocast says around it, for logarithms of spectra need the range; float64
    stays float64.

    Raises:
        ValueError: the two signals differ in shape.
    """
    if estimate.shape != target.signal.shape:
        raise ValueError(
            f"estimate and target differ in shape: {tuple(estimate.shape)}, {tuple(target.signal.shape)}"
        )
    with torch.autocast(estimate.device.type, enabled=False):
        estimate = full_precision(estimate)
        spectral = [
            _spectral_distance(_power(estimate, resolution), magnitude, logarithm)
            for resolution, magnitude, logarithm in zip(RESOLUTIONS, *target[1:], strict=True)
        ]
        return (estimate - target.signal).abs().mean(-1) + 0.5 * torch.stack(spectral).mean(0)


def full_precision(signal: Tensor) -> Tensor:
    """The signal in float32, or in float64 where it is that already."""
    return signal if signal.dtype == torch.float64 else signal.float()


def _spectral_distance(power: Tensor, magnitude: Tensor, logarithm: Tensor) -> Tensor:
    """SC + MAG of one resolution, (B,)."""
    error: Tensor = torch.linalg.vector_norm(power.sqrt() - magnitude, dim=(1, 2))
    norm: Tensor = torch.linalg.vector_norm(magnitude, dim=(1, 2))
    return error / norm + (0.5 * power.log() - logarithm).abs().mean(dim=(1, 2))


def _power(signal: Tensor, resolution: Resolution) -> Tensor:
    """Squared STFT magnitude, at least `POWER_FLOOR`: (B, T) -> (B, F, frames)."""
    if signal.ndim != 2 or signal.shape[-1] < SHORTEST:
        shape = tuple(signal.shape)
        raise ValueError(f"a signal must be (B, T) with T of at least {SHORTEST} samples, got shape {shape}")
    spectrum = torch.stft(
        signal,
        n_fft=resolution.fft,
        hop_length=resolution.hop,
        win_length=resolution.window,
        window=torch.hann_window(resolution.window, dtype=signal.dtype, device=signal.device),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power: Tensor = torch.view_as_real(spectrum).square().sum(-1)
    return power.clamp(min=POWER_FLOOR)
