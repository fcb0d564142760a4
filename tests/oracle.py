"""MANNER written out a second time: slow, literal, one function per sentence of its description.

Works on a state dict in the authors' key layout, so it shares no code with `mvat_dist.models`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Oracle:
    """The part of a network whose keys begin with `prefix`."""

    state: Mapping[str, Tensor]
    training: bool
    """Normalise by the batch's statistics instead of the running ones."""
    chunk: int
    stride: int = 4
    prefix: str = ""
    batch: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    """Mean, biased variance and count of every BatchNorm's last input in training, by its prefix."""

    def part(self, name: str) -> Oracle:
        return Oracle(self.state, self.training, self.chunk, self.stride, f"{self.prefix}{name}.", self.batch)

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{self.prefix}{name}.") for key in self.state)

    def get(self, name: str) -> Tensor:
        return self.state[f"{self.prefix}{name}"]

    def bias(self) -> Tensor | None:
        return self.state.get(f"{self.prefix}bias")

    def conv(self, x: Tensor, padding: int = 0, stride: int = 1, groups: int = 1) -> Tensor:
        return F.conv1d(x, self.get("weight"), self.bias(), stride=stride, padding=padding, groups=groups)

    def linear(self, x: Tensor) -> Tensor:
        weight = self.get("weight")
        bias = self.bias()
        return x @ weight.T if bias is None else x @ weight.T + bias

    def norm(self, x: Tensor) -> Tensor:
        """BatchNorm over every axis but the second."""
        others = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        if self.training:
            mean = x.mean(others)
            variance = ((x - mean.view(shape)) ** 2).mean(others)
            self.batch[self.prefix] = mean, variance, x.numel() // x.shape[1]
        else:
            mean, variance = self.get("running_mean"), self.get("running_var")
        normal = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        return normal * self.get("weight").view(shape) + self.get("bias").view(shape)

    def conv_norm(self, x: Tensor, padding: int = 0) -> Tensor:
        return self.part("bn").norm(self.part("conv").conv(x, padding))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def conformer(net: Oracle, x: Tensor) -> Tensor:
    y = net.part("point_conv1.1").norm(net.part("point_conv1.0.conv").conv(x))
    half = y.shape[1] // 2
    y = y[:, :half] * torch.sigmoid(y[:, half:])
    y = net.part("depth_conv.0.conv").conv(y, padding=15, groups=half)
    y = swish(net.part("depth_conv.1").norm(y))
    y = swish(net.part("point_conv2.1").norm(net.part("point_conv2.0.conv").conv(y)))
    return torch.relu(net.part("conv").conv_norm(y) + net.part("shortcut").conv_norm(x))


def cut(x: Tensor, length: int) -> list[Tensor]:
    """Every chunk of `length` frames, half overlapped, of the input between `length` zeros."""
    padded = F.pad(x, (length, length))
    return [padded[..., start : start + length] for start in _starts(x.shape[-1], length)]


def overlap_add(chunks: list[Tensor], frames: int) -> Tensor:
    length = chunks[0].shape[-1]
    total = chunks[0].new_zeros(*chunks[0].shape[:-1], frames + 2 * length)
    for start, piece in zip(_starts(frames, length), chunks, strict=True):
        total = total + F.pad(piece, (start, total.shape[-1] - start - length))
    return total[..., length : length + frames] / 2


def _starts(frames: int, length: int) -> list[int]:
    return [start for start in range(0, frames + 2 * length, length // 2) if start <= frames + length]


def channel_view(net: Oracle, x: Tensor) -> Tensor:
    def perceptron(pooled: Tensor) -> Tensor:
        return net.part("fc.2").linear(torch.relu(net.part("fc.0").linear(pooled)))

    attention = torch.sigmoid(perceptron(x.max(-1).values) + perceptron(x.mean(-1)))
    return x * attention[:, :, None]


def global_view(net: Oracle, x: Tensor) -> Tensor:
    tokens = torch.stack(cut(x, net.chunk), dim=2)  # (B, n, P, C)
    attended = torch.zeros_like(tokens)
    for item in range(x.shape[0]):
        for channel in range(x.shape[1]):
            one = tokens[item, channel]
            query, key, value = (net.part(name).linear(one) for name in ("w_qs", "w_ks", "w_vs"))
            weights = torch.softmax(query @ key.T / math.sqrt(net.chunk), dim=-1)
            attended[item, channel] = net.part("fc").linear(weights @ value)
    return overlap_add(list(attended.unbind(2)), x.shape[-1])


def local_view(net: Oracle, x: Tensor) -> Tensor:
    chunks = cut(x, net.chunk)
    convolved = [net.part("depth_conv.0.conv").conv(one, padding=15, groups=x.shape[1]) for one in chunks]
    local = swish(net.part("depth_conv.1").norm(torch.stack(convolved, dim=2)))  # (B, n, P, C)
    summaries = [torch.stack([one.max(1).values, one.mean(1)], dim=1) for one in local.unbind(2)]
    attention = torch.stack([net.part("conv.conv").conv(one, padding=3) for one in summaries], dim=2)
    attention = torch.sigmoid(net.part("conv.bn").norm(attention))  # (B, 1, P, C)
    return overlap_add([one * attention[:, :, p] for p, one in enumerate(chunks)], x.shape[-1])


def multi_view(net: Oracle, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The block's output and the features of the channel, the global and the local view."""
    features = []
    for number, (name, view) in enumerate(
        [("channel_attn", channel_view), ("global_attn", global_view), ("local_attn", local_view)]
    ):
        branch = torch.relu(net.part(f"in_branch{number}").conv_norm(x))
        branch = view(net.part(name), branch)
        features.append(torch.relu(net.part(f"out_branch{number}").conv_norm(branch, padding=1)))
    joined = net.part("conv").conv_norm(torch.cat(features, dim=1))
    gate = ("output_tanh.0", "output_sigmoid.0", "gate_conv.0")
    return net.part("shortcut").conv_norm(x) + mask_gate(net, joined, gate), features


def mask_gate(net: Oracle, x: Tensor, names: tuple[str, str, str]) -> Tensor:
    tanh, sigmoid, last = (net.part(name) for name in names)
    return torch.relu(last.conv(torch.tanh(tanh.conv(x)) * torch.sigmoid(sigmoid.conv(x))))


def manner(whole: Oracle, noisy: Tensor) -> tuple[Tensor, dict[tuple[str, int, str], Tensor]]:
    """(B, T) -> the estimate (B, T) and every view feature."""
    net = whole.part("manner_block")
    depth = sum(net.has(f"encoder.{level}") for level in range(20))
    kernel = net.get("encoder.0.down_conv.0.weight").shape[-1]
    samples = noisy.shape[-1]
    deviation = noisy.std(-1, keepdim=True) if samples > 1 else torch.zeros_like(noisy)
    padded = _valid_length(samples, depth, kernel, net.stride)
    x = F.pad(noisy / (deviation + 0.001), (0, padded - samples))[:, None]

    x = torch.relu(net.part("in_conv.1").norm(net.part("in_conv.0").conv(x, padding=1)))
    representation, skips, views = x, [], {}
    for level in range(1, depth + 1):
        part = net.part(f"encoder.{level - 1}")
        x = torch.relu(part.part("down_conv.1").norm(part.part("down_conv.0").conv(x, stride=net.stride)))
        x = conformer(part.part("conv_block"), x)
        if part.has("attn_block"):
            x, features = multi_view(part.part("attn_block"), x)
            views |= _named("encoder", level, features)
        skips.append(x)
    x = torch.relu(net.part("linear.0").linear(x.transpose(1, 2))).transpose(1, 2)
    for level in range(depth, 0, -1):
        part = net.part(f"decoder.{depth - level}")
        x = conformer(part.part("conv_block"), x + skips[level - 1][..., : x.shape[-1]])
        up = part.part("up_conv.0")
        x = F.conv_transpose1d(x, up.get("weight"), up.get("bias"), stride=net.stride)
        x = torch.relu(part.part("up_conv.1").norm(x))
        if part.has("attn_block"):
            x, features = multi_view(part.part("attn_block"), x)
            views |= _named("decoder", level, features)
    mask = mask_gate(net.part("mask_gate"), x, ("output.0", "output_gate.0", "mask.0"))
    estimate = net.part("out_conv.0").conv(representation * mask, padding=1)
    return deviation * estimate[:, 0, :samples], views


def _named(side: str, level: int, features: list[Tensor]) -> dict[tuple[str, int, str], Tensor]:
    return {(side, level, view): f for view, f in zip(("channel", "global", "local"), features, strict=True)}


def _valid_length(samples: int, depth: int, kernel: int, stride: int) -> int:
    length = samples
    for _ in range(depth):
        length = max(1, math.ceil((length - kernel) / stride) + 1)
    for _ in range(depth):
        length = (length - 1) * stride + kernel
    return length
