"""The multi-view attention block: channel, global and local view (arXiv 2203.02181)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat_dist.models.layers import TallConv1d, conv_bn, depthwise_conv
from mvat_dist.students import SPATIAL_KERNEL

ViewFeatures = tuple[Tensor, Tensor, Tensor]
"""Features of the channel, the global and the local view, each (B, n, T)."""


def chunk(x: Tensor, length: int) -> Tensor:
    """(B, n, T) -> (B, n, P, C): chunks of `length` C frames, each overlapping the next by half.

    C zeros are padded on both sides; frames of the right padding that fill no chunk are left out.
    """
    hop = length // 2
    batch, channels, frames = x.shape
    halves = (frames + 2 * length) // hop
    padded = F.pad(x, (length, halves * hop - length - frames)).view(batch, channels, halves, hop)
    return torch.cat([padded[..., :-1, :], padded[..., 1:, :]], dim=-1)


def overlap_add(chunks: Tensor, frames: int) -> Tensor:
    """(B, n, P, C) -> (B, n, T): the mean of the two chunks over each of T `frames`; undoes `chunk`."""
    length = chunks.shape[-1]
    first, second = chunks.chunk(2, dim=-1)
    total = F.pad(first, (0, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))
    return total.flatten(-2)[..., length : length + frames] / 2


class ChannelView(nn.Module):
    """Weights each channel by what its maximum and mean over time say of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        bottleneck = channels // 2
        self.fc = nn.Sequential(nn.Linear(channels, bottleneck), nn.ReLU(), nn.Linear(bottleneck, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, T) -> (B, n, T)."""
        attention = torch.sigmoid(self.fc(x.amax(-1)) + self.fc(x.mean(-1)))
        return x * attention.unsqueeze(-1)


class GlobalView(nn.Module):
    """Per channel, scaled dot-product attention across the chunks of the whole input.

    A token is the C frames of one chunk. Each of `heads` heads is C wide.
    """

    def __init__(self, chunk_length: int, heads: int) -> None:
        super().__init__()
        self.chunk_length = chunk_length
        self.heads = heads
        self.w_qs = nn.Linear(chunk_length, heads * chunk_length, bias=False)
        self.w_ks = nn.Linear(chunk_length, heads * chunk_length, bias=False)
        self.w_vs = nn.Linear(chunk_length, heads * chunk_length, bias=False)
        self.fc = nn.Linear(heads * chunk_length, chunk_length, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, T) -> (B, n, T)."""
        batch, _, frames = x.shape
        tokens = chunk(x, self.chunk_length).flatten(0, 1)  # (B * n, P, C)
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B * n, heads, P, C)
            for project in (self.w_qs, self.w_ks, self.w_vs)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = self.fc(attended.transpose(1, 2).flatten(2))
        return overlap_add(tokens.unflatten(0, (batch, -1)), frames)


class LocalView(nn.Module):
    """Weights each frame of each chunk by what its neighbours in the chunk say of it."""

    def __init__(self, channels: int, chunk_length: int) -> None:
        super().__init__()
        self.chunk_length = chunk_length
        # BatchNorm2d: the same statistics, over items, frames and chunks at once.
        self.depth_conv = nn.Sequential(depthwise_conv(channels), nn.BatchNorm2d(channels), nn.SiLU())
        self.conv = nn.Sequential(
            OrderedDict(
                conv=TallConv1d(2, 1, SPATIAL_KERNEL, padding=SPATIAL_KERNEL // 2, bias=False),
                bn=nn.BatchNorm2d(1, momentum=0.01),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, T) -> (B, n, T)."""
        chunks = chunk(x, self.chunk_length)
        local = self.depth_conv(chunks.transpose(2, 3).contiguous())  # (B, n, C, P)
        summary = torch.stack([local.amax(1), local.mean(1)], dim=1)  # (B, 2, C, P)
        attention = torch.sigmoid(self.conv(summary)).transpose(2, 3)  # (B, 1, P, C)
        return overlap_add(chunks * attention, x.shape[-1])


class MultiViewBlock(nn.Module):
    """Three views of the same channels, joined through a mask gate and added to a shortcut."""

    def __init__(self, channels: int, chunk_length: int, heads: int) -> None:
        super().__init__()
        branch = channels // 3
        self.in_branch0 = conv_bn(channels, branch)
        self.in_branch1 = conv_bn(channels, branch)
        self.in_branch2 = conv_bn(channels, branch)
        self.channel_attn = ChannelView(branch)
        self.global_attn = GlobalView(chunk_length, heads)
        self.local_attn = LocalView(branch, chunk_length)
        self.out_branch0 = conv_bn(branch, branch, 3)
        self.out_branch1 = conv_bn(branch, branch, 3)
        self.out_branch2 = conv_bn(branch, branch, 3)
        self.conv = conv_bn(3 * branch, channels, relu=False)
        self.shortcut = conv_bn(channels, channels, relu=False)
        self.output_tanh = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Tanh())
        self.output_sigmoid = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Sigmoid())
        self.gate_conv = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, ViewFeatures]:
        """(B, N, T) -> (B, N, T) and the view features F_v, each (B, floor(N / 3), T).

        F_v is taken behind each view's own convolution, BatchNorm and ReLU: a design choice, for
        there the views have the form in which the block joins them.
        """
        features = (
            self.out_branch0(self.channel_attn(self.in_branch0(x))),
            self.out_branch1(self.global_attn(self.in_branch1(x))),
            self.out_branch2(self.local_attn(self.in_branch2(x))),
        )
        joined = self.conv(torch.cat(features, dim=1))
        gated = self.gate_conv(self.output_tanh(joined) * self.output_sigmoid(joined))
        return self.shortcut(x) + gated, features
