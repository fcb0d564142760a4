"""The inference form of a network: the same function of a waveform with less to compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvat_dist.models.attention import MultiViewBlock
from mvat_dist.models.cpu_kernels import BatchNorm

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def folded(network: Network) -> Network:
    """A copy of `network` for inference; the network itself stays as it is.

    In eval mode a BatchNorm is an affine map and becomes part of the convolution before it. In a multi-view
    block, the convolution that joins the views becomes part of the two convolutions of the gate, which alone
    read it. View features do not change. The copy is in eval mode, holds no gradients, and is no checkpoint:
    its keys differ.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            _fold(module)
    for module in network.modules():
        if isinstance(module, MultiViewBlock):
            _join(module)
    return network


def _fold(sequence: nn.Sequential) -> None:
    """Fold the BatchNorms of `sequence` into the convolutions before them; identities replace them."""
    conv: nn.Module | None = None
    for name, layer in list(sequence.named_children()):
        if isinstance(layer, BatchNorm) and conv is not None:
            _scale(conv, layer)
            setattr(sequence, name, nn.Identity())
        conv = next(_convolutions(layer), None)


def _convolutions(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d))


def _scale(conv: nn.Module, norm: BatchNorm) -> None:
    assert isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)
    scale = norm.weight / (_tensor(norm.running_var) + norm.eps).sqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias
    outputs = (1, -1, 1) if isinstance(conv, nn.ConvTranspose1d) else (-1, 1, 1)
    conv.weight.mul_(scale.view(outputs))
    conv.bias = nn.Parameter(norm.bias + (bias - _tensor(norm.running_mean)) * scale, requires_grad=False)


def _join(block: MultiViewBlock) -> None:
    """Fold the convolution that joins the views into those of the gate."""
    joining = block.conv[0]
    assert isinstance(joining, nn.Conv1d)
    for sequence in (block.output_tanh, block.output_sigmoid):
        gate = sequence[0]
        assert isinstance(gate, nn.Conv1d)
        weight, bias = gate.weight[..., 0], _tensor(gate.bias) + gate.weight[..., 0] @ _tensor(joining.bias)
        product = nn.Conv1d(
            joining.in_channels, gate.out_channels, 1, device=weight.device, dtype=weight.dtype
        )
        product.weight = nn.Parameter((weight @ joining.weight[..., 0]).unsqueeze(-1), requires_grad=False)
        product.bias = nn.Parameter(bias, requires_grad=False)
        sequence[0] = product
    block.conv = nn.Sequential()


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
