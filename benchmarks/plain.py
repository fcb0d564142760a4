"""What the benchmarks compare with: MANNER as its formulas are usually written, and one job's step.

Same function and weights as `mvat_dist.models` (`enhance` is checked against it before anything is timed), in
the formulation of the authors' public code: softmax attention on whole weight matrices, `unfold`/`fold`,
depthwise convolutions chunk by chunk. A step is one student's: its own teacher, its own spectra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat_dist.config.sizes import Side, Size, View, ViewKey
from mvat_dist.models.manner import Manner

_VIEWS: tuple[View, ...] = ("channel", "global", "local")
_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))


@dataclass(frozen=True)
class Part:
    """The part of a network whose names begin with `prefix`."""

    tensors: Mapping[str, Tensor]
    size: Size
    training: bool
    prefix: str = "manner_block."

    def __getitem__(self, name: str) -> Part:
        return Part(self.tensors, self.size, self.training, f"{self.prefix}{name}.")

    def get(self, name: str) -> Tensor:
        return self.tensors[f"{self.prefix}{name}"]

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{self.prefix}{name}.") for key in self.tensors)

    def conv(self, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        bias = self.tensors.get(f"{self.prefix}bias")
        return F.conv1d(x, self.get("weight"), bias, stride, padding, groups=groups)

    def norm(self, x: Tensor) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.get(name) for name in names), training=self.training, momentum=0.01)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get("weight"), self.tensors.get(f"{self.prefix}bias"))

    def conv_norm(self, x: Tensor, padding: int = 0) -> Tensor:
        return self["bn"].norm(self["conv"].conv(x, padding=padding))


def _conformer(net: Part, x: Tensor) -> Tensor:
    y = F.glu(net["point_conv1.1"].norm(net["point_conv1.0.conv"].conv(x)), dim=1)
    y = net["depth_conv.0.conv"].conv(y, padding=15, groups=y.shape[1])
    y = F.silu(net["depth_conv.1"].norm(y))
    y = F.silu(net["point_conv2.1"].norm(net["point_conv2.0.conv"].conv(y)))
    return F.relu(net["conv"].conv_norm(y) + net["shortcut"].conv_norm(x))


def _unfold(x: Tensor, chunk: int) -> Tensor:
    """(B, n, T) -> (B, n, P, C)."""
    cut = F.unfold(x.unsqueeze(-1), (chunk, 1), padding=(chunk, 0), stride=(chunk // 2, 1))
    return cut.reshape(x.shape[0], x.shape[1], chunk, -1).transpose(2, 3)


def _fold(chunks: Tensor, frames: int) -> Tensor:
    """(B, n, P, C) -> (B, n, T)."""
    batch, channels, count, chunk = chunks.shape
    columns = chunks.transpose(2, 3).reshape(batch, channels * chunk, count)
    folded = F.fold(columns, (frames, 1), (chunk, 1), padding=(chunk, 0), stride=(chunk // 2, 1))
    return folded.reshape(batch, channels, frames) / 2


def _channel_view(net: Part, x: Tensor) -> Tensor:
    pooled = [net["fc.2"].linear(F.relu(net["fc.0"].linear(one))) for one in (x.amax(-1), x.mean(-1))]
    return x * torch.sigmoid(pooled[0] + pooled[1]).unsqueeze(-1)


def _global_view(net: Part, x: Tensor) -> Tensor:
    cut = _unfold(x, net.size.chunk)
    tokens = cut.reshape(-1, *cut.shape[2:])
    query, key, value = (
        net[name].linear(tokens).unflatten(-1, (net.size.heads, -1)).transpose(1, 2)
        for name in ("w_qs", "w_ks", "w_vs")
    )
    width = query.shape[-1]
    weights = F.softmax(torch.matmul(query / math.sqrt(width), key.transpose(2, 3)), dim=-1)
    attended = torch.matmul(weights, value).transpose(1, 2).flatten(2)
    return _fold(net["fc"].linear(attended).reshape(cut.shape), x.shape[-1])


def _local_view(net: Part, x: Tensor) -> Tensor:
    cut = _unfold(x, net.size.chunk)
    batch, channels, count, chunk = cut.shape
    each = cut.permute(0, 2, 1, 3).reshape(batch * count, channels, chunk)
    each = net["depth_conv.0.conv"].conv(each, padding=15, groups=channels)
    each = F.silu(net["depth_conv.1"].norm(each))
    summary = torch.cat([each.amax(1, keepdim=True), each.mean(1, keepdim=True)], dim=1)
    attention = torch.sigmoid(net["conv"].conv_norm(summary, padding=3))
    return _fold(cut * attention.view(batch, count, 1, chunk).permute(0, 2, 1, 3), x.shape[-1])


def _multi_view(net: Part, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    features = []
    views = (("channel_attn", _channel_view), ("global_attn", _global_view), ("local_attn", _local_view))
    for number, (name, view) in enumerate(views):
        branch = view(net[name], F.relu(net[f"in_branch{number}"].conv_norm(x)))
        features.append(F.relu(net[f"out_branch{number}"].conv_norm(branch, padding=1)))
    joined = net["conv"].conv_norm(torch.cat(features, dim=1))
    gate = torch.tanh(net["output_tanh.0"].conv(joined)) * torch.sigmoid(net["output_sigmoid.0"].conv(joined))
    return net["shortcut"].conv_norm(x) + F.relu(net["gate_conv.0"].conv(gate)), features


def enhance(
    tensors: Mapping[str, Tensor], size: Size, noisy: Tensor, *, training: bool
) -> tuple[Tensor, dict[ViewKey, Tensor]]:
    """(B, T) -> the estimate (B, T) and every view feature; `tensors` is a state dict."""
    net = Part(tensors, size, training)
    views: dict[ViewKey, Tensor] = {}

    def attend(part: Part, x: Tensor, side: Side, level: int) -> Tensor:
        if not part.has("attn_block"):
            return x
        x, features = _multi_view(part["attn_block"], x)
        views.update({(side, level, view): one for view, one in zip(_VIEWS, features, strict=True)})
        return x

    deviation = noisy.std(-1, keepdim=True)
    x = F.pad(noisy / (1e-3 + deviation), (0, size.frames(noisy.shape[-1])[0] - noisy.shape[-1]))
    x = representation = F.relu(net["in_conv.1"].norm(net["in_conv.0"].conv(x.unsqueeze(1), padding=1)))
    skips = []
    for level in range(1, size.depth + 1):
        part = net[f"encoder.{level - 1}"]
        x = F.relu(part["down_conv.1"].norm(part["down_conv.0"].conv(x, stride=size.stride)))
        x = attend(part, _conformer(part["conv_block"], x), "encoder", level)
        skips.append(x)
    x = F.relu(net["linear.0"].linear(x.transpose(1, 2))).transpose(1, 2)
    for level in range(size.depth, 0, -1):
        part = net[f"decoder.{size.depth - level}"]
        up = part["up_conv.0"]
        x = _conformer(part["conv_block"], x + skips[level - 1])
        x = F.conv_transpose1d(x, up.get("weight"), up.get("bias"), stride=size.stride)
        x = attend(part, F.relu(part["up_conv.1"].norm(x)), "decoder", level)
    gate = net["mask_gate"]
    mask = torch.tanh(gate["output.0"].conv(x)) * torch.sigmoid(gate["output_gate.0"].conv(x))
    masked = representation * F.relu(gate["mask.0"].conv(mask))
    return deviation * net["out_conv.0"].conv(masked, padding=1)[:, 0, : noisy.shape[-1]], views


def _distance(estimate: Tensor, target: Tensor) -> Tensor:
    total = (estimate - target).abs().mean(-1)
    for fft, hop, window in _RESOLUTIONS:
        hann = torch.hann_window(window)
        a, b = (
            torch.stft(one, fft, hop, window, hann, return_complex=True).abs().clamp(min=math.sqrt(1e-7))
            for one in (estimate, target)
        )
        convergence = torch.linalg.vector_norm(a - b, dim=(1, 2)) / torch.linalg.vector_norm(b, dim=(1, 2))
        total = total + 0.5 / 3 * (convergence + (a.log() - b.log()).abs().mean((1, 2)))
    return total


def enhancement_loss(estimate: Tensor, noisy: Tensor, clean: Tensor) -> Tensor:
    """L_enhance of an estimate (B, T), every spectrum made for it alone."""
    noise = noisy - clean
    energies = clean.square().sum(-1), noise.square().sum(-1)
    weight = energies[0] / (energies[0] + energies[1] + 2e-7)
    speech, rest = _distance(estimate, clean), _distance(noisy - estimate, noise)
    return (weight * speech + (1 - weight) * rest).mean()


def _loss(
    estimate: Tensor,
    views: Mapping[ViewKey, Tensor],
    teacher: Mapping[ViewKey, Tensor],
    noisy: Tensor,
    clean: Tensor,
) -> Tensor:
    """L = L_enhance + L_MVAT."""
    total = enhancement_loss(estimate, noisy, clean)
    for key in views.keys() & teacher.keys():
        frames = min(views[key].shape[-1], teacher[key].shape[-1])
        maps = [F.normalize(one[key][..., :frames].square().sum(1), dim=-1) for one in (views, teacher)]
        total = total + (maps[0] - maps[1]).square().sum(-1).mean()
    return total


class PlainJob:
    """One student's own training: its teacher, its loss, its optimiser."""

    def __init__(self, student: Manner, teacher: Manner) -> None:
        self.size = student.size
        self.parameters = {
            name: one.detach().clone().requires_grad_() for name, one in student.named_parameters()
        }
        self.tensors = {**self.parameters, **{name: one.clone() for name, one in student.named_buffers()}}
        self.teacher = teacher
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-3, weight_decay=0.0)

    @torch.no_grad()
    def ask(self, noisy: Tensor) -> Mapping[ViewKey, Tensor]:
        """The teacher's view features of (B, T)."""
        return enhance(self.teacher.state_dict(), self.teacher.size, noisy, training=False)[1]

    def forward_backward(
        self, noisy: Tensor, clean: Tensor, teacher_maps: Mapping[ViewKey, Tensor]
    ) -> Tensor:
        """The rest of a step on (B, T); the loss ()."""
        estimate, views = enhance(self.tensors, self.size, noisy, training=True)
        loss = _loss(estimate, views, teacher_maps, noisy, clean)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 5.0)
        self.optimizer.step()
        return loss.detach()
