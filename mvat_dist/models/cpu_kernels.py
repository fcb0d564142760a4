"""Faster CPU forms of MANNER's layers: the same functions and weights as torch's modules, equal by test.

They stand in for `nn.Conv1d`, `nn.ConvTranspose1d` and `nn.BatchNorm1d`, so that a state dict does not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 8192
"""Frames per tile of a frame-by-frame computation on a CPU: its intermediates stay in the cache."""


class _Standardise(torch.autograd.Function):
    """BatchNorm by the batch's statistics; returns these statistics too.

    It takes half of torch's time on one CPU thread, because torch's sums are not vectorised. The variance is
    that of the centred values, item by item: one float32 sum over a batch would lose three more digits and
    vectorise less. Backward is torch's own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        others = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1] + [1] * (x.ndim - 2)
        mean = x.mean(others)
        y = x - mean.view(shape)
        squares = torch.linalg.vector_norm(y, dim=others[-1], keepdim=True).square().sum(others)
        variance = squares * (y.shape[1] / y.numel())
        deviation = (variance + eps).rsqrt()
        y.mul_((weight * deviation).view(shape)).add_(bias.view(shape))
        ctx.save_for_backward(x, weight, mean, deviation)
        ctx.mark_non_differentiable(mean, variance)
        ctx.eps = eps
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation = ctx.saved_tensors
        return *torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, None, None, mean, deviation, True, ctx.eps, [True, True, True]
        ), None


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of (B, c, ...) over every axis but the second."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return norm_together(x, self)


def norm_together(x: Tensor, *norms: nn.Module) -> Tensor:
    """Apply each of `norms` to its own channels of x (B, c, ...), in their order, as one operation.

    All of them are `BatchNorm`, or all are its replacement: the identity after folding into the convolutions
    before them, or `nn.SyncBatchNorm`, which runs by itself.
    """
    layers = [norm for norm in norms if isinstance(norm, BatchNorm)]
    if not layers:
        if isinstance(norms[0], nn.Identity):
            return x
        shares = torch.split(x, [len(norm.get_parameter("weight")) for norm in norms], dim=1)
        return torch.cat([norm(share) for norm, share in zip(norms, shares, strict=True)], dim=1)
    weight, bias = _cat([layer.weight for layer in layers]), _cat([layer.bias for layer in layers])
    eps = layers[0].eps
    if not layers[0].training:
        mean, variance = (
            _cat([layer.get_buffer(name) for layer in layers]) for name in ("running_mean", "running_var")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)
    y: Tensor
    if x.device.type == "cpu" and x.dtype == weight.dtype:
        y, mean, variance = _Standardise.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    else:
        y, mean, deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        variance = deviation.detach().pow(-2) - eps
    _update_statistics(layers, mean.detach(), variance, x.numel() // x.shape[1])
    return y


@torch.no_grad()
def _update_statistics(layers: Sequence[BatchNorm], mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics from a batch with `count` values per channel."""
    unbiased = variance * (count / max(1, count - 1))
    sizes = [layer.num_features for layer in layers]
    parts = zip(layers, torch.split(mean, sizes), torch.split(unbiased, sizes), strict=True)
    for layer, batch_mean, batch_variance in parts:
        assert layer.momentum is not None  # None would mean a plain mean over all batches
        layer.get_buffer("running_mean").lerp_(batch_mean, layer.momentum)
        layer.get_buffer("running_var").lerp_(batch_variance, layer.momentum)
        layer.get_buffer("num_batches_tracked").add_(1)


def conv_together(x: Tensor, *modules: nn.Module, groups: int = 1) -> Tensor:
    """Apply the first convolution of each of `modules` to x (B, c, T), or to its group of x; the length
    stays.

    One product replaces several. The outputs' channels are in the order of the modules.
    """
    convs = [conv_of(module) for module in modules]
    bias = None
    if any(conv.bias is not None for conv in convs):
        biases = [conv.bias for conv in convs]
        bias = _cat(
            [
                c.weight.new_zeros(c.out_channels) if b is None else b
                for c, b in zip(convs, biases, strict=True)
            ]
        )
    padding = convs[0].kernel_size[0] // 2
    return F.conv1d(x, _cat([conv.weight for conv in convs]), bias, padding=padding, groups=groups)


def conv_of(module: nn.Module) -> nn.Conv1d:
    """The first convolution in `module`."""
    return next(layer for layer in module.modules() if isinstance(layer, nn.Conv1d))


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class TallConv1d(nn.Conv1d):
    """A depthwise `Conv1d` computed along the height of an image.

    CPU kernels for depthwise convolutions with many taps are 3 to 10 times as fast in this layout, backward
    included.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T) -> the same with this convolution's channels."""
        padding, groups = (int(self.padding[0]), 0), self.groups
        image = F.conv2d(
            x.unsqueeze(-1), self.weight.unsqueeze(-1), self.bias, padding=padding, groups=groups
        )
        return image.squeeze(-1)


class FromMonoConv1d(nn.Conv1d):
    """A `Conv1d` with three taps from one channel, computed as a product.

    The channel at its three lags becomes three channels of one product. On a CPU this is 2 to 4 times as
    fast as
    the kernel for such a convolution, 1.3 to 2 times with backward.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, c, T)."""
        padded = F.pad(x, (1, 1))
        lags = torch.cat([padded[..., :-2], x, padded[..., 2:]], dim=1)
        return F.conv1d(lags, self.weight.transpose(1, 2), self.bias)


class ToMonoConv1d(nn.Conv1d):
    """A `Conv1d` with three taps to one channel, computed as a product.

    The taps become three channels of one product, which are shifted by their lags and summed. On a CPU this
    is 3 to 8 times as fast as the kernel for such a convolution, backward included.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T) -> (B, 1, T)."""
        earlier, current, later = torch.split(F.conv1d(x, self.weight.transpose(0, 2)), 1, dim=1)
        assert self.bias is not None
        shifted: Tensor = F.pad(earlier[..., :-1], (1, 0)) + current + F.pad(later[..., 1:], (0, 1))
        return shifted + self.bias.view(-1, 1)


class UpConv1d(nn.ConvTranspose1d):
    """A strided `ConvTranspose1d`, computed as a product.

    The output frames between two input frames depend on the kernel_size / stride nearest input frames. They
    become channels of one product, which are then interleaved in time. On a CPU this is 1.1 to 2 times as
    fast as torch's, backward included.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(channels, channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, c, T) -> (B, c, (T - 1) * stride + kernel_size)."""
        stride, taps = self.stride[0], -(-self.kernel_size[0] // self.stride[0])
        assert self.bias is not None
        padded = F.pad(self.weight, (0, taps * stride - self.kernel_size[0]))
        # (c in, c out, taps * stride) -> (c out * stride, taps * c in, 1)
        placed = padded.view(*padded.shape[:2], taps, stride).permute(1, 3, 2, 0)
        weight = placed.flatten(2).flatten(0, 1).unsqueeze(-1)
        shifted = torch.cat([F.pad(x, (lag, taps - 1 - lag)) for lag in range(taps)], dim=1)
        between = F.conv1d(shifted, weight, self.bias.repeat_interleave(stride))
        interleaved = between.view(x.shape[0], -1, stride, between.shape[-1]).transpose(2, 3).flatten(2)
        return interleaved[..., : (x.shape[-1] - 1) * stride + self.kernel_size[0]]


def by_tiles(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Apply a frame-by-frame `function` to inputs (B, c, T), one tile of frames at a time.

    A compiled or exported graph, which serves any length, computes all frames at once.
    """
    exported = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if inputs[0].device.type != "cpu" or exported:
        return function(*inputs)
    tiles = zip(*(torch.split(x, TILE, dim=-1) for x in inputs), strict=True)
    return _cat([function(*tile) for tile in tiles], dim=-1)


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, n, P, C) plus a bias (n,), which there is once BatchNorm has been folded."""
    return x if bias is None else x + bias.view(-1, 1, 1)


def banded(taps: Tensor, length: int) -> Tensor:
    """Banded matrices (n, C, C): a product with one convolves C = `length` frames with its taps (n, K).

    Most of the matrix is zero: C / K times the work, in a far faster kernel.
    """
    length = int(length)  # constant for an architecture, but a trace would take it for a variable
    left = length - 1 - taps.shape[-1] // 2
    diagonals = F.pad(taps, (left, 2 * length - 1 - taps.shape[-1] - left))
    return diagonals.unfold(-1, length, 1).flip(-1)
