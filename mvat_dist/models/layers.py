"""Layers that every level of MANNER is made of (arXiv 2203.02181).

Attributes have the names of the authors' released checkpoints, so that a checkpoint is a state dict of these
modules. Convolutions of the same input run as one product (`models.cpu_kernels`).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat_dist.config.sizes import DEPTHWISE_KERNEL
from mvat_dist.models.cpu_kernels import BatchNorm, TallConv1d, by_tiles, conv_together, norm_together

RESCALE_REFERENCE = 0.1
"""Standard deviation towards which convolutions are rescaled after construction, as Demucs does."""


def depthwise_conv(channels: int) -> nn.Sequential:
    """A convolution with 31 taps per channel; the length stays."""
    conv = TallConv1d(
        channels, channels, DEPTHWISE_KERNEL, padding=DEPTHWISE_KERNEL // 2, groups=channels, bias=False
    )
    return nn.Sequential(OrderedDict(conv=conv))


def pointwise_conv(inputs: int, outputs: int) -> nn.Sequential:
    """A linear map of the channels, the same at every frame."""
    return nn.Sequential(OrderedDict(conv=nn.Conv1d(inputs, outputs, 1)))


def conv_bn(inputs: int, outputs: int, kernel_size: int = 1, *, relu: bool = True) -> nn.Sequential:
    """A convolution without bias that keeps the length, BatchNorm and, with `relu`, ReLU."""
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
        joint = conv_together(x, self.point_conv1, self.shortcut)
        joint = norm_together(joint, self.point_conv1[1], self.shortcut[1])
        gated, direct = torch.split(joint, [2 * x.shape[1], joint.shape[1] - 2 * x.shape[1]], dim=1)
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


def gated_tanh(x: Tensor, tanh: nn.Module, gate: nn.Module) -> Tensor:
    """tanh of one module's convolution of x (B, c, T) times the sigmoid of the other's."""
    value, gates = conv_together(x, tanh, gate).chunk(2, dim=1)
    return torch.tanh(value) * torch.sigmoid(gates)


@torch.no_grad()
def rescale(module: nn.Module) -> None:
    """Divide weight and bias of every convolution in `module` by sqrt(std(weight) / 0.1).

    This brings the scales of all layers near each other at the start (Defossez et al., "Demucs",
    arXiv 1909.01174); the authors of MANNER do the same.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d):
            scale = (conv.weight.std() / RESCALE_REFERENCE).sqrt()
            conv.weight /= scale
            if conv.bias is not None:
                conv.bias /= scale
