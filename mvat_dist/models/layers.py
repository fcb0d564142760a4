"""Layers that every level of MANNER is made of (arXiv 2203.02181).

Attributes bear the names of the authors' released checkpoints, so that a checkpoint is a state
dict of these modules as it stands. What the modules hold and what is computed at once differ: maps
of the same input are one product, with the weights of all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat_dist.config.sizes import DEPTHWISE_KERNEL

TILE = 8192
"""Frames at a time of what is computed frame by frame on CPU: its intermediates stay in the cache."""
RESCALE_REFERENCE = 0.1
"""Standard deviation towards which convolutions are rescaled after construction, as Demucs does."""


class _Standardise(torch.autograd.Function):
    """BatchNorm by the batch's statistics, and these statistics.

    On one CPU thread half the time of torch's own, whose sums are not vectorised. The variance is that
    of the centred values, item by item: one float32 sum over a batch would lose three digits more, and
    vectorises less. Backward is torch's own.
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
    """Each of `norms` on its share of the channels (B, c, ...), in their order, as one.

    They are all `BatchNorm`, or what took its place: the identity where they have been folded into the
    convolutions before them, or `nn.SyncBatchNorm`, which runs on its own.
    """
    layers = [norm for norm in norms if isinstance(norm, BatchNorm)]
    if not layers:
        if isinstance(norms[0], nn.Identity):
            return x
        shares = torch.split(x, [len(norm.get_parameter("weight")) for norm in norms], dim=1)
        return torch.cat([norm(share) for norm, share in zip(norms, shares, strict=True)], dim=1)
    weight, bias = _joined([layer.weight for layer in layers]), _joined([layer.bias for layer in layers])
    eps = layers[0].eps
    if not layers[0].training:
        mean, variance = (
            _joined([layer.get_buffer(name) for layer in layers]) for name in ("running_mean", "running_var")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)
    y: Tensor
    if x.device.type == "cpu" and x.dtype == weight.dtype:
        y, mean, variance = _Standardise.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    else:
        y, mean, deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        variance = deviation.detach().pow(-2) - eps
    _remember(layers, mean.detach(), variance, x.numel() // x.shape[1])
    return y


@torch.no_grad()
def _remember(layers: Sequence[BatchNorm], mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics towards those of a batch with `count` values a channel."""
    unbiased = variance * (count / max(1, count - 1))
    sizes = [layer.num_features for layer in layers]
    for layer, *its in zip(layers, torch.split(mean, sizes), torch.split(unbiased, sizes), strict=True):
        assert layer.momentum is not None  # torch's way to ask for a plain mean over all batches
        layer.get_buffer("running_mean").lerp_(its[0], layer.momentum)
        layer.get_buffer("running_var").lerp_(its[1], layer.momentum)
        layer.get_buffer("num_batches_tracked").add_(1)


def conv_together(x: Tensor, *modules: nn.Module, groups: int = 1) -> Tensor:
    """The first convolution of each of `modules` on x (B, c, T), or on its group of x; length kept.

    One product instead of several; their channels in their order.
    """
    convs = [conv_of(module) for module in modules]
    bias = None
    if any(conv.bias is not None for conv in convs):
        biases = [conv.bias for conv in convs]
        bias = _joined(
            [
                c.weight.new_zeros(c.out_channels) if b is None else b
                for c, b in zip(convs, biases, strict=True)
            ]
        )
    padding = convs[0].kernel_size[0] // 2
    return F.conv1d(x, _joined([conv.weight for conv in convs]), bias, padding=padding, groups=groups)


def conv_of(module: nn.Module) -> nn.Conv1d:
    """The first convolution in `module`."""
    return next(one for one in module.modules() if isinstance(one, nn.Conv1d))


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class TallConv1d(nn.Conv1d):
    """A `Conv1d` computed along the height of an image: the same function and weights, less time.

    On CPU, the kernels for depthwise convolutions with many taps are 3 to 10 times faster this
    way round, backward included.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T) -> the same with this convolution's channels."""
        padding, groups = (int(self.padding[0]), 0), self.groups
        image = F.conv2d(
            x.unsqueeze(-1), self.weight.unsqueeze(-1), self.bias, padding=padding, groups=groups
        )
        return image.squeeze(-1)


class FromMonoConv1d(nn.Conv1d):
    """A `Conv1d` from one channel, of three taps: the same function and weights, less time.

    The channel at its three lags as three channels of one product. On CPU 2 to 4 times as fast as the kernel
    for such a convolution, 1.3 to 2 times with backward.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, c, T)."""
        padded = F.pad(x, (1, 1))
        lags = torch.cat([padded[..., :-2], x, padded[..., 2:]], dim=1)
        return F.conv1d(lags, self.weight.transpose(1, 2), self.bias)


class ToMonoConv1d(nn.Conv1d):
    """A `Conv1d` to one channel, of three taps: the same function and weights, less time.

    The taps as three channels of one product, then their sum, each shifted by its lag. On CPU 3 to 8
    times as fast as the kernel for such a convolution, backward included.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T) -> (B, 1, T)."""
        before, now, after = torch.split(F.conv1d(x, self.weight.transpose(0, 2)), 1, dim=1)
        assert self.bias is not None
        shifted: Tensor = F.pad(before[..., :-1], (1, 0)) + now + F.pad(after[..., 1:], (0, 1))
        return shifted + self.bias.view(-1, 1)


class UpConv1d(nn.ConvTranspose1d):
    """A strided `ConvTranspose1d`: the same function and weights, less time.

    The frames between two of the input depend on its kernel_size / stride nearest ones: they are channels of
    one product, put in their places in time. On CPU 1.1 to 2 times as fast as torch's, backward included.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(channels, channels, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, c, T) -> (B, c, (T - 1) * stride + kernel_size)."""
        stride, taps = self.stride[0], -(-self.kernel_size[0] // self.stride[0])
        assert self.bias is not None
        whole = F.pad(self.weight, (0, taps * stride - self.kernel_size[0]))
        # (c in, c out, taps * stride) -> (c out * stride, taps * c in, 1)
        placed = whole.view(*whole.shape[:2], taps, stride).permute(1, 3, 2, 0)
        weight = placed.flatten(2).flatten(0, 1).unsqueeze(-1)
        late = torch.cat([F.pad(x, (lag, taps - 1 - lag)) for lag in range(taps)], dim=1)
        between = F.conv1d(late, weight, self.bias.repeat_interleave(stride))
        joined = between.view(x.shape[0], -1, stride, between.shape[-1]).transpose(2, 3).flatten(2)
        return joined[..., : (x.shape[-1] - 1) * stride + self.kernel_size[0]]


def depthwise_conv(channels: int) -> nn.Sequential:
    """31 taps per channel, length kept."""
    conv = TallConv1d(
        channels, channels, DEPTHWISE_KERNEL, padding=DEPTHWISE_KERNEL // 2, groups=channels, bias=False
    )
    return nn.Sequential(OrderedDict(conv=conv))


def pointwise_conv(inputs: int, outputs: int) -> nn.Sequential:
    """A linear map of the channels at every frame."""
    return nn.Sequential(OrderedDict(conv=nn.Conv1d(inputs, outputs, 1)))


def conv_bn(inputs: int, outputs: int, kernel_size: int = 1, *, relu: bool = True) -> nn.Sequential:
    """Convolution without bias, length kept, BatchNorm and, where asked for, ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv1d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False),
        bn=BatchNorm(outputs, momentum=0.01),
    )
    if relu:
        layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class ResidualConformer(nn.Module):
    """The residual conformer block: gated pointwise, depthwise and pointwise convolution, with a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.point_conv1 = nn.Sequential(
            pointwise_conv(inputs, 2 * inputs), BatchNorm(2 * inputs), nn.GLU(dim=1)
        )
        self.depth_conv = nn.Sequential(depthwise_conv(inputs), BatchNorm(inputs), nn.SiLU())
        self.point_conv2 = nn.Sequential(pointwise_conv(inputs, outputs), BatchNorm(outputs), nn.SiLU())
        self.conv = conv_bn(outputs, outputs, relu=False)
        self.shortcut = conv_bn(inputs, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, T) -> (B, outputs, T)."""
        both = conv_together(x, self.point_conv1, self.shortcut)
        both = norm_together(both, self.point_conv1[1], self.shortcut[1])
        gated, direct = torch.split(both, [2 * x.shape[1], both.shape[1] - 2 * x.shape[1]], dim=1)
        residual = self.conv(self.point_conv2(self.depth_conv(F.glu(gated, dim=1))))
        return F.relu(residual + direct, inplace=True)


class MaskGate(nn.Module):
    """A non-negative mask from a gated tanh."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.output = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Tanh())
        self.output_gate = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Sigmoid())
        self.mask = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> the same."""
        return by_tiles(lambda part: self.mask(gated_tanh(part, self.output, self.output_gate)), x)


def by_tiles(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of inputs (B, c, T), where no frame of its result depends on another frame.

    A graph that is compiled or exported, for any length, has it whole.
    """
    exported = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if inputs[0].device.type != "cpu" or exported:
        return function(*inputs)
    tiles = zip(*(torch.split(x, TILE, dim=-1) for x in inputs), strict=True)
    return _joined([function(*tile) for tile in tiles], dim=-1)


def gated_tanh(x: Tensor, tanh: nn.Module, gate: nn.Module) -> Tensor:
    """tanh of the convolution in one module of x (B, c, T) times the sigmoid of that in the other."""
    value, gates = conv_together(x, tanh, gate).chunk(2, dim=1)
    return torch.tanh(value) * torch.sigmoid(gates)


@torch.no_grad()
def rescale(module: nn.Module) -> None:
    """Divide weight and bias of every convolution in `module` by sqrt(std(weight) / 0.1).

    Brings the scale of all layers near each other at the start (Defossez et al., "Demucs",
    arXiv 1909.01174); the authors of MANNER do the same.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d):
            scale = (conv.weight.std() / RESCALE_REFERENCE).sqrt()
            conv.weight /= scale
            if conv.bias is not None:
                conv.bias /= scale
