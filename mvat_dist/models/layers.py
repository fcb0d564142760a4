"""Layers that every level of MANNER is made of (arXiv 2203.02181).

Attributes bear the names of the authors' released checkpoints, so that a checkpoint is a state
dict of these modules as it stands.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat_dist.students import DEPTHWISE_KERNEL

RESCALE_REFERENCE = 0.1
"""Standard deviation towards which convolutions are rescaled after construction, as Demucs does."""


class TallConv1d(nn.Conv1d):
    """A `Conv1d` computed along the height of an image: the same function and weights, less time.

    On CPU, the kernels for depthwise convolutions with many taps are 3 to 10 times faster this
    way round, backward included. It also convolves P sequences at once: (B, c, T, P).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, T) or (B, c, T, P) -> the same with this convolution's channels."""
        image = x if x.ndim == 4 else x.unsqueeze(-1)
        padding, groups = (int(self.padding[0]), 0), self.groups
        y = F.conv2d(image, self.weight.unsqueeze(-1), self.bias, padding=padding, groups=groups)
        return y if x.ndim == 4 else y.squeeze(-1)


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
        bn=nn.BatchNorm1d(outputs, momentum=0.01),
    )
    if relu:
        layers["relu"] = nn.ReLU()
    return nn.Sequential(layers)


class ResidualConformer(nn.Module):
    """The residual conformer block: gated pointwise, depthwise and pointwise convolution, with a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.point_conv1 = nn.Sequential(
            pointwise_conv(inputs, 2 * inputs), nn.BatchNorm1d(2 * inputs), nn.GLU(dim=1)
        )
        self.depth_conv = nn.Sequential(depthwise_conv(inputs), nn.BatchNorm1d(inputs), nn.SiLU())
        self.point_conv2 = nn.Sequential(pointwise_conv(inputs, outputs), nn.BatchNorm1d(outputs), nn.SiLU())
        self.conv = conv_bn(outputs, outputs, relu=False)
        self.shortcut = conv_bn(inputs, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, T) -> (B, outputs, T)."""
        residual = self.conv(self.point_conv2(self.depth_conv(self.point_conv1(x))))
        return F.relu(residual + self.shortcut(x))


class MaskGate(nn.Module):
    """A non-negative mask from a gated tanh."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.output = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Tanh())
        self.output_gate = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Sigmoid())
        self.mask = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, T) -> the same."""
        mask: Tensor = self.mask(self.output(x) * self.output_gate(x))
        return mask


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
