"""Short-time spectra as the losses need them: a gradient at a third to two thirds of the price of torch's.

Frames are centred and edges reflected, as in `torch.stft`. A window begins its frame instead of lying in
the middle of the FFT's length, which shifts phases alike in all signals and leaves magnitudes as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(signal: Tensor) -> Tensor:
    """The signal in float32, or in float64 where it is that already."""
    return signal if signal.dtype == torch.float64 else signal.float()


@lru_cache(maxsize=16)
def hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The periodic Hann window, made once."""
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
    found: Tensor = _Power.apply(spectrum)  # type: ignore[no-untyped-call]
    return found


def plain_power(spectrum: Tensor) -> Tensor:
    """As `power`, for where no gradient is taken: torch's own would cost more."""
    return (spectrum * spectrum.conj()).real


class _Stft(torch.autograd.Function):
    """Windowed frames of a signal (B, T), and their FFTs.

    torch's own backward makes a complex FFT instead of a real one, and scatters sample by sample.
    """

    @staticmethod
    def forward(ctx: Any, signal: Tensor, window: Tensor, fft: int, hop: int) -> Tensor:
        taken = signal.unfold(-1, len(window), hop)
        frames = signal.new_zeros(*taken.shape[:2], fft)
        torch.mul(taken, window, out=frames[..., : len(window)])
        ctx.save_for_backward(window)
        ctx.samples, ctx.hop = signal.shape[-1], hop
        spectrum: Tensor = torch.fft.rfft(frames)
        return spectrum

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (window,) = ctx.saved_tensors
        # irfft takes the bins between the first and the last for two each, as those of a real signal are.
        halved = 0.5 * gradients[0]
        halved[..., 0] *= 2
        halved[..., -1] *= 2
        frames = torch.fft.irfft(halved, norm="forward")[..., : len(window)] * window
        return _overlapped(frames, ctx.hop, ctx.samples), None, None, None


def _overlapped(frames: Tensor, hop: int, samples: int) -> Tensor:
    """The sum (B, `samples`) of frames (B, n, length), each `hop` later than the one before."""
    batch, count, length = frames.shape
    hops = -(-length // hop)
    parts = F.pad(frames, (0, hops * hop - length)).view(batch, count, hops, hop)
    total = frames.new_zeros(batch, count + hops - 1, hop)
    for late in range(hops):
        total[:, late : late + count] += parts[:, :, late]
    joined = total.flatten(1)
    return F.pad(joined, (0, samples - joined.shape[1]))  # a negative padding cuts


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
