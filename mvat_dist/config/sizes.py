"""The table of network sizes: every student, and the teachers, by name.

Importable without torch, so that a login node can list sizes and their costs. The paper
(arXiv 2208.10367) publishes only the cost of its students; the widths here are a design choice
that meets those costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mvat_dist.errors import UserError, nearest

Kind = Literal["base", "small"]
Side = Literal["encoder", "decoder"]
View = Literal["channel", "global", "local"]
VIEWS: tuple[View, ...] = ("channel", "global", "local")
ViewKey = tuple[Side, int, View]
"""Key of one view feature: side, level (1 is next to the waveform), view."""

DEPTHWISE_KERNEL = 31
"""Taps of every depthwise convolution (arXiv 2203.02181)."""
SPATIAL_KERNEL = 7
"""Taps of the local view's convolution over the channel-wise maximum and mean (arXiv 2203.02181)."""


@dataclass(frozen=True)
class Size:
    """One architecture of the MANNER family (arXiv 2203.02181, section 2)."""

    kind: Kind
    """``base`` has the multi-view block at every level, ``small`` only at the deepest."""
    hidden: int
    """Channels h at full rate; level l of the encoder puts out h * 2**l."""
    depth: int = 4
    """Levels L of the encoder and of the decoder."""
    chunk: int = 64
    """Chunk length C of the global and local views, in frames."""
    kernel_size: int = 8
    stride: int = 4
    heads: int = 1

    def __post_init__(self) -> None:
        for name in ("hidden", "depth", "chunk", "kernel_size", "stride", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"a network's {name} must be at least 1, got {getattr(self, name)}")
        if self.chunk % 2:
            raise UserError(f"a network's chunk must be even (chunks overlap by half), got {self.chunk}")
        # The channel view's bottleneck has a sixth of its block's channels.
        narrowest = self.hidden if self.kind == "base" else self.hidden * 2 ** (self.depth - 1)
        if narrowest < 6:
            raise UserError(
                f"hidden {self.hidden} is too small: a {self.kind} network of depth {self.depth} would have "
                f"a multi-view block of {narrowest} channels, and it needs 6"
            )

    def frames(self, samples: int) -> list[int]:
        """Frames per level for `samples` of input: [0] is the padded waveform, [l] the output of level l.

        Encoder level l works on ``frames[l]``; decoder level l puts out ``frames[l - 1]``. The padded
        length is the shortest that the strided convolutions divide without remainder.
        """
        deepest = samples
        for _ in range(self.depth):
            deepest = max(1, -(-(deepest - self.kernel_size) // self.stride) + 1)
        frames = [deepest]
        for _ in range(self.depth):
            frames.append((frames[-1] - 1) * self.stride + self.kernel_size)
        return frames[::-1]

    def blocks(self) -> list[tuple[Side, int]]:
        """(side, level) of each multi-view attention block, levels counted from 1."""
        levels = range(1, self.depth + 1) if self.kind == "base" else [self.depth]
        return [(side, level) for side in ("encoder", "decoder") for level in levels]

    def views(self, samples: int) -> dict[ViewKey, int]:
        """Every view feature, in the network's order, and its frames for `samples` of input."""
        frames = self.frames(samples)
        return {
            (side, level, view): frames[level if side == "encoder" else level - 1]
            for side, level in self.blocks()
            for view in VIEWS
        }


SIZES: dict[str, Size] = {
    "manner-l": Size("base", 120),
    "manner-b": Size("base", 60),
    "manner-s-13.6gf": Size("small", 60),
    "manner-s-8.1gf": Size("base", 26, depth=3, chunk=94),
    "manner-s-5.3gf": Size("base", 15),
    "manner-s-3.1gf": Size("small", 30, depth=3),
    "manner-s-2.0gf": Size("small", 24, depth=3),
    "manner-s-0.9gf": Size("small", 15),
    "manner-s-0.6gf": Size("small", 12),
}

STUDENTS: tuple[str, ...] = tuple(name for name in SIZES if name.startswith("manner-s-"))
"""The students of ``--student all``."""


def get(name: str, own: dict[str, Size] | None = None) -> Size:
    """The size called `name`, from the table or from the user's `own` sizes.

    Raises:
        UserError: no such size; the message shows the nearest names.
    """
    known = {**SIZES, **(own or {})}
    if name not in known:
        raise UserError(f"unknown student {name!r}; did you mean {nearest(name, known)}?")
    return known[name]


def select(names: str, own: dict[str, Size] | None = None) -> dict[str, Size]:
    """Sizes for a comma-separated selection, in its order; ``all`` means every `STUDENTS` entry.

    Raises:
        UserError: an unknown, empty or repeated name.
    """
    selected = list(STUDENTS) if names.strip() == "all" else [name.strip() for name in names.split(",")]
    if len(set(selected)) != len(selected):
        raise UserError(f"a student is named twice in {names!r}")
    return {name: get(name, own) for name in selected}


class Cost(NamedTuple):
    """The cost of one layer or of a whole network."""

    parameters: int
    macs: int
    """Multiply-accumulates of convolutions, linear layers and matrix products."""


def parameters(size: Size) -> int:
    """Trainable parameters of a network of this size."""
    return _network(size, samples=1).parameters


COST_SECONDS = 4.0
"""Length of the clip on which MACs are counted and time is measured: attention is quadratic in the
length, so a cost per second is meaningless without it."""


def macs(size: Size, samples: int) -> int:
    """Multiply-accumulates of one forward pass over `samples` samples (one item).

    Convolutions, linear layers and matrix products only: the convention in which MANNER has
    38.4 * 10**9 at 4 s. Global attention makes it quadratic in `samples`.
    """
    return _network(size, samples).macs


def _sum(*costs: Cost) -> Cost:
    return Cost(*(sum(column) for column in zip(*costs, strict=True)))


def _conv(
    inputs: int, outputs: int, taps: int, frames: int, *, bias: bool = False, norm: bool = True
) -> Cost:
    """A convolution whose kernel is applied `frames` times, with the BatchNorm behind it."""
    weights = inputs * outputs * taps
    return Cost(weights + outputs * (bias + 2 * norm), weights * frames)


def _network(size: Size, samples: int) -> Cost:
    frames, hidden, attended = size.frames(samples), size.hidden, set(size.blocks())
    deepest = hidden * 2**size.depth
    total = _sum(
        _conv(1, hidden, 3, frames[0], bias=True),
        _conv(deepest, deepest, 1, frames[-1], norm=False),  # the bottleneck's linear layer
        _mask_gate(hidden, frames[0]),
        _conv(hidden, 1, 3, frames[0], bias=True, norm=False),
    )
    for level in range(1, size.depth + 1):
        channels, long, short = hidden * 2 ** (level - 1), frames[level - 1], frames[level]
        # Down and up: a transposed convolution applies its kernel once per frame of its input.
        resample = _conv(channels, channels, size.kernel_size, short, bias=True)
        total = _sum(total, resample, _conformer(channels, 2 * channels, short))
        total = _sum(total, resample, _conformer(2 * channels, channels, short))
        if ("encoder", level) in attended:
            total = _sum(total, _multi_view(size, 2 * channels, short))
        if ("decoder", level) in attended:
            total = _sum(total, _multi_view(size, channels, long))
    return total


def _conformer(inputs: int, outputs: int, frames: int) -> Cost:
    return _sum(
        _conv(inputs, 2 * inputs, 1, frames, bias=True),
        _conv(1, inputs, DEPTHWISE_KERNEL, frames),
        _conv(inputs, outputs, 1, frames, bias=True),
        _conv(outputs, outputs, 1, frames),
        _conv(inputs, outputs, 1, frames),
    )


def _mask_gate(channels: int, frames: int) -> Cost:
    return _sum(*[_conv(channels, channels, 1, frames, bias=True, norm=False)] * 3)


def _multi_view(size: Size, channels: int, frames: int) -> Cost:
    branch = channels // 3
    bottleneck = branch // 2
    chunks = (frames + size.chunk) // (size.chunk // 2) + 1
    token = size.chunk * size.heads
    return _sum(
        *[_conv(channels, branch, 1, frames)] * 3,
        # Channel view: one perceptron, applied to the maximum and to the mean.
        _conv(branch, bottleneck, 1, 2, bias=True, norm=False),
        _conv(bottleneck, branch, 1, 2, bias=True, norm=False),
        # Global view: query, key, value and output, then the two products of attention.
        *[_conv(size.chunk, token, 1, branch * chunks, norm=False)] * 4,
        Cost(0, 2 * branch * token * chunks**2),
        # Local view, on every frame of every chunk.
        _conv(1, branch, DEPTHWISE_KERNEL, chunks * size.chunk),
        _conv(2, 1, SPATIAL_KERNEL, chunks * size.chunk),
        *[_conv(branch, branch, 3, frames)] * 3,
        _conv(3 * branch, channels, 1, frames),
        _conv(channels, channels, 1, frames),
        _mask_gate(channels, frames),
    )
