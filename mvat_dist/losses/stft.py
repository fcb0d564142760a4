"""Short-time spectra with a fast gradient, and the multi-resolution STFT distance of two waveforms.

`stft` equals `torch.stft` with centred frames and reflected edges, except that a window begins its frame
instead of lying in the middle of the FFT's length: phases of all signals shift alike, and magnitudes stay.
Forward and backward take a third to two thirds of torch's time.

The distance is d(a, b) = mean|a - b| + 0.5 * SC(a, b) + 0.5 * MAG(a, b), with spectral convergence SC and
log-magnitude distance MAG averaged over three STFT resolutions (Yamamoto et al., "Parallel WaveGAN", arXiv
1910.11480). The magnitudes are those of `src/stft_loss.py` in github.com/winddori2002/MANNER: periodic Hann
windows, no normalisation, one value per item. A spectrum is linear in its signal, so the spectrum of a
difference is the difference of two spectra: a caller who has both hands it in, and no second STFT is
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(signal: Tensor) -> Tensor:
    """The signal in float32, or in float64 where it is that already."""
    return signal if signal.dtype == torch.float64 else signal.float()


@lru_cache(maxsize=16)
def hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The periodic Hann window, computed once per length, dtype and device."""
    # Also where the first to ask is in inference mode: a later training may have to save it for its backward.
    with torch.inference_mode(mode=False):
        return torch.hann_window(length, dtype=dtype, device=device)


def stft(signal: Tensor, fft: int, hop: int, window: Tensor) -> Tensor:
    """Complex spectra (B, T // hop + 1, fft // 2 + 1) of a signal (B, T).

    Args:
        signal: float32 or float64, longer than half the window.
        fft: length of the FFT in samples, even and at least that of the window.
        hop: samples from frame to frame.
        window: of even length.

    Raises:
        ValueError: the signal has another shape, or is too short to be reflected at its ends.
    """
    assert fft % 2 == len(window) % 2 == 0
    assert len(window) <= fft
    half = len(window) // 2
    if signal.ndim != 2 or signal.shape[1] <= half:
        shape = tuple(signal.shape)
        raise ValueError(f"a signal must be (B, T) with T of more than {half} samples, got shape {shape}")
    padded = F.pad(signal.unsqueeze(1), (half, half), mode="reflect").squeeze(1)
    spectrum: Tensor = _Stft.apply(padded, window, fft, hop)  # type: ignore[no-untyped-call]
    return spectrum


def power(spectrum: Tensor) -> Tensor:
    """Squared magnitudes of a complex spectrum."""
    squared: Tensor = _Power.apply(spectrum)  # type: ignore[no-untyped-call]
    return squared


def plain_power(spectrum: Tensor) -> Tensor:
    """`power` where no gradient is taken; the backward of this form would cost more."""
    return (spectrum * spectrum.conj()).real


class _Stft(torch.autograd.Function):
    """Windowed frames of a signal (B, T), and their FFTs.

    torch's own backward makes a complex FFT instead of a real one, and scatters sample by sample.
    """

    @staticmethod
    def forward(ctx: Any, signal: Tensor, window: Tensor, fft: int, hop: int) -> Tensor:
        unwindowed = signal.unfold(-1, len(window), hop)
        frames = signal.new_zeros(*unwindowed.shape[:2], fft)
        torch.mul(unwindowed, window, out=frames[..., : len(window)])
        ctx.save_for_backward(window)
        ctx.samples, ctx.hop = signal.shape[-1], hop
        spectrum: Tensor = torch.fft.rfft(frames)
        return spectrum

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (window,) = ctx.saved_tensors
        # irfft counts the bins between the first and the last twice, as a real signal has each of them twice.
        halved = 0.5 * gradients[0]
        halved[..., 0] *= 2
        halved[..., -1] *= 2
        frames = torch.fft.irfft(halved, norm="forward")[..., : len(window)] * window
        return _overlap_add(frames, ctx.hop, ctx.samples), None, None, None


def _overlap_add(frames: Tensor, hop: int, samples: int) -> Tensor:
    """Sum frames (B, n, length), each `hop` samples after the last one, to a signal (B, `samples`)."""
    batch, count, length = frames.shape
    hops = -(-length // hop)
    parts = F.pad(frames, (0, hops * hop - length)).view(batch, count, hops, hop)
    total = frames.new_zeros(batch, count + hops - 1, hop)
    for shift in range(hops):
        total[:, shift : shift + count] += parts[:, :, shift]
    signal = total.flatten(1)
    return F.pad(signal, (0, samples - signal.shape[1]))  # a negative padding cuts


class _Power(torch.autograd.Function):
    """Squared magnitudes by one product; torch's backward of it would make five complex ones."""

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor) -> Tensor:
        ctx.save_for_backward(spectrum)
        return plain_power(spectrum).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        spectrum: Tensor = ctx.saved_tensors[0]
        return spectrum * (2 * gradients[0])


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
    """A signal that estimates are compared with, and its spectra, computed once."""

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
        powers = [
            plain_power(spectrum.detach()).clamp(min=POWER_FLOOR) for spectrum in known or spectra(signal)
        ]
        return Reference(signal, [p.sqrt() for p in powers], [0.5 * p.log() for p in powers])


def distance(estimate: Tensor, target: Reference, known: Sequence[Tensor] | None = None) -> Tensor:
    """d(estimate, target) per item: (B, T) -> (B,); lower is better, 0 is equal.

    It is computed in float32 even under autocast, because logarithms of spectra need the range; float64 stays
    float64.

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
    """`check_shapes` for a target whose shape alone is known."""
    if estimate.shape != shape:
        raise ValueError(f"estimate and target differ in shape: {tuple(estimate.shape)}, {tuple(shape)}")


def rms(signal: Tensor, least: float) -> Tensor:
    """Root mean square (B, 1) of a signal (B, T), at least `least`, with a finite gradient."""
    return full_precision(signal).square().mean(-1, keepdim=True).clamp(min=least**2).sqrt()


class _SpectralDistance(torch.autograd.Function):
    """SC + MAG of complex spectra (B, frames, F) of one resolution, (B,).

    Its gradient is the spectrum times a real factor. The forward pass computes this factor, because it has
    all that the factor needs.
    """

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, magnitude: Tensor, logarithm: Tensor) -> Tensor:
        powers = plain_power(spectrum)
        floored = powers.clamp(min=POWER_FLOOR)
        estimate = floored.sqrt()
        error = estimate - magnitude
        size = torch.linalg.vector_norm(error, dim=(1, 2), keepdim=True)
        norm = torch.linalg.vector_norm(magnitude, dim=(1, 2), keepdim=True)
        log_error = floored.log().mul_(0.5).sub_(logarithm)
        value: Tensor = (size / norm).flatten() + log_error.abs().mean(dim=(1, 2))
        if ctx.needs_input_grad[0]:
            audible = (powers >= POWER_FLOOR).to(estimate.dtype)
            least = torch.finfo(estimate.dtype).tiny  # the direction of no error does not count
            factor = error.div_(estimate).div_((size * norm).clamp(min=least))
            factor += log_error.sign_().div_(floored).mul_(len(log_error) / log_error.numel())
            ctx.save_for_backward(spectrum, factor.mul_(audible))
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the factor would silently count as a constant
            raise RuntimeError("the spectral distance can be differentiated once, not twice")
        spectrum, factor = ctx.saved_tensors
        return spectrum * (factor * gradients[0].view(-1, 1, 1)), None, None
