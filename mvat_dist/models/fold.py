"""The inference form of a network: the same function of a waveform with less to compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvat_dist.models.attention import MultiViewBlock
from mvat_dist.models.layers import BatchNorm

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def folded(network: Network) -> Network:
    """A copy of `network` for inference; the network itself stays as it is.

    In eval mode a BatchNorm is an affine map, and becomes part of the convolution before it. So does,
    in a multi-view block, the convolution that joins the views: nothing but the two convolutions of the
    gate reads it, and of two linear maps in a row one is left. View features stay what they were.
    The copy is in eval mode, holds no gradients, and is no checkpoint: its keys differ.
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
    """BatchNorms of `sequence` into the convolutions before them; identities take their places."""
    before: nn.Module | None = None
    for name, layer in list(sequence.named_children()):
        if isinstance(layer, BatchNorm) and before is not None:
            _scale(before, layer)
            setattr(sequence, name, nn.Identity())
        before = next(_convolutions(layer), None)


def _convolutions(module: nn.Module) -> Iterator[nn.Module]:
    return (one for one in module.modules() if isinstance(one, nn.Conv1d | nn.ConvTranspose1d))


def _scale(conv: nn.Module, norm: BatchNorm) -> None:
    assert isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)
    scale = norm.weight / (_tensor(norm.running_var) + norm.eps).sqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias
    outputs = (1, -1, 1) if isinstance(conv, nn.ConvTranspose1d) else (-1, 1, 1)
    conv.weight.mul_(scale.view(outputs))
    conv.bias = nn.Parameter(norm.bias + (bias - _tensor(norm.running_mean)) * scale, requires_grad=False)


def _join(block: MultiViewBlock) -> None:
    """The convolution that joins the views into those of the gate."""
    joining = block.conv[0]
    assert isinstance(joining, nn.Conv1d)
    for sequence in (block.output_tanh, block.output_sigmoid):
        gate = sequence[0]
        assert isinstance(gate, nn.Conv1d)
        weight, bias = gate.weight[..., 0], _tensor(gate.bias) + gate.weight[..., 0] @ _tensor(joining.bias)
        both = nn.Conv1d(joining.in_channels, gate.out_channels, 1, device=weight.device, dtype=weight.dtype)
        both.weight = nn.Parameter((weight @ joining.weight[..., 0]).unsqueeze(-1), requires_grad=False)
        both.bias = nn.Parameter(bias, requires_grad=False)
        sequence[0] = both
    block.conv = nn.Sequential()


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
