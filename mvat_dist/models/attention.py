"""The multi-view attention block: channel, global and local view (arXiv 2203.02181)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat_dist.config.sizes import SPATIAL_KERNEL
from mvat_dist.models.cpu_kernels import (
    BatchNorm,
    add_bias,
    banded,
    by_tiles,
    conv_of,
    conv_together,
    norm_together,
)
from mvat_dist.models.layers import conv_bn, depthwise_conv, gated_tanh

VECTOR = 16
"""Numbers that an attention kernel of a CPU or a GPU processes at once."""
ViewFeatures = tuple[Tensor, Tensor, Tensor]
"""Features of the channel, the global and the local view, each (B, n, T)."""


def chunk(x: Tensor, length: int) -> Tensor:
    """(B, n, T) -> (B, n, P, C): chunks of `length` C frames, each overlapping the next by half.

    C zeros are padded on both sides; frames of the right padding that do not fill a chunk are dropped.
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
    """Weights each channel by a perceptron of its maximum and its mean over time."""

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

    A token is the C frames of one chunk, and each of `heads` heads is C wide. Keys and values are not
    projected: with tokens x, the scores (x Wq')(x Wk')' are (x (Wq' Wk)) x', and the output A (x Wv') Wo' is
    (A x) (Wv' Wo'), so the tokens themselves serve as keys and values.
    """

    def __init__(self, chunk_length: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.w_qs = nn.Linear(chunk_length, heads * chunk_length, bias=False)
        self.w_ks = nn.Linear(chunk_length, heads * chunk_length, bias=False)
        self.w_vs = nn.Linear(chunk_length, heads * chunk_length, bias=False)
        self.fc = nn.Linear(heads * chunk_length, chunk_length, bias=False)

    def forward(self, chunks: Tensor) -> Tensor:
        """(B, n, P, C) -> (B, n, P, C)."""
        length = self.fc.out_features
        by_head = (self.heads, -1, length)
        query, key, value = (layer.weight.view(by_head) for layer in (self.w_qs, self.w_ks, self.w_vs))
        out = self.fc.weight.t().reshape(by_head)  # transposed, as the others are
        # Tokens are padded with zeros to full vectors of the processor: a sixth faster where C is 94.
        zeros = -length % VECTOR
        to_scores = F.pad(query.transpose(1, 2) @ key, (0, zeros))
        to_output = F.pad(value.transpose(1, 2) @ out, (0, 0, 0, zeros))
        tokens = chunks.flatten(0, 1).unsqueeze(1)  # (B * n, 1, P, C)
        heads = F.pad(tokens, (0, zeros)).expand(-1, self.heads, -1, -1)
        attended = F.scaled_dot_product_attention(tokens @ to_scores, heads, heads, scale=length**-0.5)
        joined = attended.transpose(1, 2).flatten(2)  # (B * n, P, heads * C)
        return (joined @ to_output.flatten(0, 1)).view_as(chunks)


class LocalView(nn.Module):
    """Weights each frame of each chunk by a convolution over its neighbours in the chunk."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth_conv = nn.Sequential(depthwise_conv(channels), BatchNorm(channels), nn.SiLU())
        self.conv = nn.Sequential(
            OrderedDict(
                conv=nn.Conv1d(2, 1, SPATIAL_KERNEL, padding=SPATIAL_KERNEL // 2, bias=False),
                bn=BatchNorm(1, momentum=0.01),
            )
        )

    def forward(self, chunks: Tensor) -> Tensor:
        """(B, n, P, C) -> the weights (B, 1, P, C), which all channels share."""
        wide, narrow = conv_of(self.depth_conv), conv_of(self.conv)
        length = chunks.shape[-1]
        local = add_bias(chunks @ banded(wide.weight[:, 0], length), wide.bias)
        local = F.silu(self.depth_conv[1](local))
        summary = torch.cat([local.amax(1, keepdim=True), local.mean(1, keepdim=True)], dim=-1)
        weights = add_bias(summary @ banded(narrow.weight[0], length).flatten(0, 1), narrow.bias)
        return torch.sigmoid(self.conv[1](weights))


class MultiViewBlock(nn.Module):
    """Three views of the same channels, joined through a mask gate and added to a shortcut."""

    def __init__(self, channels: int, chunk_length: int, heads: int) -> None:
        super().__init__()
        branch = channels // 3
        self.chunk_length = chunk_length
        self.in_branch0 = conv_bn(channels, branch)
        self.in_branch1 = conv_bn(channels, branch)
        self.in_branch2 = conv_bn(channels, branch)
        self.channel_attn = ChannelView(branch)
        self.global_attn = GlobalView(chunk_length, heads)
        self.local_attn = LocalView(branch)
        self.out_branch0 = conv_bn(branch, branch, 3)
        self.out_branch1 = conv_bn(branch, branch, 3)
        self.out_branch2 = conv_bn(branch, branch, 3)
        self.conv = conv_bn(3 * branch, channels, relu=False)
        self.shortcut = conv_bn(channels, channels, relu=False)
        self.output_tanh = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Tanh())
        self.output_sigmoid = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.Sigmoid())
        self.gate_conv = nn.Sequential(nn.Conv1d(channels, channels, 1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> tuple[Tensor, ViewFeatures]:
        """(B, N, T) -> (B, N, T) and the view features F_v, each (B, floor(N / 3), T).

        F_v is taken after each view's own convolution, BatchNorm and ReLU, where the views have the form in
        which the block joins them (design choice).
        """
        layers = (self.in_branch0, self.in_branch1, self.in_branch2, self.shortcut)
        y = norm_together(conv_together(x, *layers), *(layer[1] for layer in layers))
        # Split, not sliced: the gradient of a split is one concatenation, that of slices a sum with zeros.
        branches, direct = torch.split(y, [y.shape[1] - x.shape[1], x.shape[1]], dim=1)
        # In place where no gradient needs y: at 30 s of audio, each such tensor has a tenth of a gigabyte.
        branches = F.relu(branches, inplace=not torch.is_grad_enabled())
        features = self._features(self._views(branches))
        joined = self.conv(features)
        channel, global_, local = features.chunk(3, dim=1)
        return by_tiles(self._add_gated, joined, direct), (channel, global_, local)

    def _add_gated(self, joined: Tensor, direct: Tensor) -> Tensor:
        gated: Tensor = self.gate_conv(gated_tanh(joined, self.output_tanh, self.output_sigmoid))
        return direct + gated

    def _views(self, branches: Tensor) -> Tensor:
        """Apply each view to its branch of (B, 3n, T)."""
        first, second, third = branches.chunk(3, dim=1)
        frames = branches.shape[-1]
        attended = overlap_add(self.global_attn(chunk(second, self.chunk_length)), frames)
        # Both chunks over a frame hold the same frame, so the mean of the weighted frames is a mean of
        # weights.
        weights = overlap_add(self.local_attn(chunk(third, self.chunk_length)), frames)
        return torch.cat([self.channel_attn(first), attended, third * weights], dim=1)

    def _features(self, views: Tensor) -> Tensor:
        """Apply each view's own convolution with three taps to (B, 3n, T), as groups of one convolution."""
        layers = (self.out_branch0, self.out_branch1, self.out_branch2)
        y = norm_together(conv_together(views, *layers, groups=3), *(layer[1] for layer in layers))
        return F.relu(y, inplace=True)
