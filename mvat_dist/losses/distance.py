"""The distance between two waveforms that every loss on waveforms is made of.

d(a, b) = mean|a - b| + 0.5 * SC(a, b) + 0.5 * MAG(a, b), with spectral convergence SC and log-magnitude
distance MAG averaged over three STFT resolutions (Yamamoto et al., "Parallel WaveGAN", arXiv 1910.11480).
The STFT's magnitudes are those of `src/stft_loss.py` in github.com/winddori2002/MANNER: centred frames with
reflected edges, periodic Hann windows, no normalisation, one value per item.

A spectrum is linear in its signal, so that of a difference is the difference of two: a caller who knows it
hands it in, and no second STFT is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvat_dist.losses.stft import full_precision, hann, plain_power, stft

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
    """STFT magnitudes (B, frames, F), one per resolution."""
    logarithms: list[Tensor]
    """Their natural logarithms."""


def spectra(signal: Tensor) -> list[Tensor]:
    """Complex STFTs (B, frames, F) of a signal (B, T), one per resolution, in float32 (float64 stays).

    Raises:
        ValueError: it has another shape, or is shorter than the largest window.
    """
    if signal.ndim != 2 or signal.shape[-1] < SHORTEST:
        shape = tuple(signal.shape)
        raise ValueError(f"a signal must be (B, T) with T of at least {SHORTEST} samples, got shape {shape}")
    with torch.autocast(signal.device.type, enabled=False):
        signal = full_precision(signal)
        return [
            stft(signal, fft, hop, hann(window, signal.dtype, signal.device))
            for fft, hop, window in RESOLUTIONS
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
        powers = [plain_power(one.detach()).clamp(min=POWER_FLOOR) for one in known or spectra(signal)]
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
            _SpectralDistance.apply(spectrum, magnitude, logarithm)  # type: ignore[no-untyped-call]
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


def rms(signal: Tensor, least: float) -> Tensor:
    """Root mean square (B, 1) of a signal (B, T), at least `least`, with a finite gradient."""
    return full_precision(signal).square().mean(-1, keepdim=True).clamp(min=least**2).sqrt()


class _SpectralDistance(torch.autograd.Function):
    """SC + MAG of complex spectra (B, frames, F) of one resolution, (B,).

    Its gradient is the spectrum times a real factor, which is made in the forward pass, where all that it
    needs is at hand.
    """

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, magnitude: Tensor, logarithm: Tensor) -> Tensor:
        powers = plain_power(spectrum)
        floored = powers.clamp(min=POWER_FLOOR)
        own = floored.sqrt()
        error = own - magnitude
        size = torch.linalg.vector_norm(error, dim=(1, 2), keepdim=True)
        norm = torch.linalg.vector_norm(magnitude, dim=(1, 2), keepdim=True)
        apart = floored.log().mul_(0.5).sub_(logarithm)
        found: Tensor = (size / norm).flatten() + apart.abs().mean(dim=(1, 2))
        if ctx.needs_input_grad[0]:
            heard = (powers >= POWER_FLOOR).to(own.dtype)
            least = torch.finfo(own.dtype).tiny  # where there is no error, its direction counts for nothing
            factor = error.div_(own).div_((size * norm).clamp(min=least))
            factor += apart.sign_().div_(floored).mul_(len(apart) / apart.numel())
            ctx.save_for_backward(spectrum, factor.mul_(heard))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # else the factor would count as constant, without a word
            raise RuntimeError("the spectral distance can be differentiated once, not twice")
        spectrum, factor = ctx.saved_tensors
        return spectrum * (factor * gradients[0].view(-1, 1, 1)), None, None
