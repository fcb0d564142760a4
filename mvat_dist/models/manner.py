"""MANNER, a waveform-to-waveform speech enhancer (arXiv 2203.02181), in every size of the family."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mvat_dist.config import sizes
from mvat_dist.config.sizes import VIEWS, Side, Size, ViewKey
from mvat_dist.models.attention import MultiViewBlock
from mvat_dist.models.cpu_kernels import BatchNorm, FromMonoConv1d, ToMonoConv1d, UpConv1d
from mvat_dist.models.layers import MaskGate, ResidualConformer, rescale

Views = dict[ViewKey, Tensor]
"""View features (B, n, T_b) by (side, level, view), in the order of computation."""

NORMALISATION_EPS = 1e-3
"""Added to the standard deviation by which the input is divided; full scale is 1."""


class Encoder(nn.Module):
    """One level down: `channels` at its input's rate -> twice as many at 1/stride of the rate."""

    def __init__(self, size: Size, level: int) -> None:
        super().__init__()
        channels = size.hidden * 2 ** (level - 1)
        self.down_conv = nn.Sequential(
            nn.Conv1d(channels, channels, size.kernel_size, size.stride),
            BatchNorm(channels),
            nn.ReLU(inplace=True),
        )
        self.conv_block = ResidualConformer(channels, 2 * channels)
        self.attn_block = _multi_view_block(size, "encoder", level)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, c, T) -> (B, 2c, T') and, where this level has them, its view features."""
        x = self.conv_block(self.down_conv(x))
        return (x, ()) if self.attn_block is None else self.attn_block(x)


class Decoder(nn.Module):
    """One level up: the mirror of the encoder of its level."""

    def __init__(self, size: Size, level: int) -> None:
        super().__init__()
        channels = size.hidden * 2 ** (level - 1)
        self.conv_block = ResidualConformer(2 * channels, channels)
        self.up_conv = nn.Sequential(
            UpConv1d(channels, size.kernel_size, size.stride),
            BatchNorm(channels),
            nn.ReLU(inplace=True),
        )
        self.attn_block = _multi_view_block(size, "decoder", level)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, 2c, T') -> (B, c, T) and, where this level has them, its view features."""
        x = self.up_conv(self.conv_block(x))
        return (x, ()) if self.attn_block is None else self.attn_block(x)


def _multi_view_block(size: Size, side: Side, level: int) -> MultiViewBlock | None:
    if (side, level) not in size.blocks():
        return None
    channels = size.hidden * 2 ** (level if side == "encoder" else level - 1)
    return MultiViewBlock(channels, size.chunk, size.heads)


class MaskingUNet(nn.Module):
    """A U-Net that estimates a mask on a learned representation of the waveform."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden, deepest = size.hidden, size.hidden * 2**size.depth
        levels = range(1, size.depth + 1)
        self.in_conv = nn.Sequential(FromMonoConv1d(hidden), BatchNorm(hidden), nn.ReLU(inplace=True))
        self.out_conv = nn.Sequential(ToMonoConv1d(hidden))
        self.encoder = nn.ModuleList(Encoder(size, level) for level in levels)
        self.decoder = nn.ModuleList(Decoder(size, level) for level in reversed(levels))
        self.linear = nn.Sequential(nn.Linear(deepest, deepest, bias=False), nn.ReLU(inplace=True))
        self.mask_gate = MaskGate(hidden)

    def forward(self, waveform: Tensor, return_views: bool) -> tuple[Tensor, Views]:
        """(B, 1, T) -> (B, 1, T) and the view features, where asked for.

        T is a length that `Size.frames` pads to, so that a skip is as long as what it is added to.
        """
        views: Views = {}
        representation = x = self.in_conv(waveform)
        skips = []
        for level, encoder in enumerate(self.encoder, start=1):
            x, features = encoder(x)
            if return_views:
                views |= _by_key("encoder", level, features)
            skips.append(x)
        x = self.linear(x.transpose(1, 2)).transpose(1, 2)
        for level, decoder in zip(range(len(skips), 0, -1), self.decoder, strict=True):
            x, features = decoder(x + skips.pop())
            if return_views:
                views |= _by_key("decoder", level, features)
        return self.out_conv(representation * self.mask_gate(x)), views


def _by_key(side: Side, level: int, features: tuple[Tensor, ...]) -> Views:
    return {(side, level, view): feature for view, feature in zip(VIEWS, features, strict=False)}


class Manner(nn.Module):
    """The whole enhancer: normalises and pads a waveform of any length for the U-Net inside.

    MANNER normalises by, and attends over, its whole input: the enhanced waveform of an excerpt is
    not an excerpt of the enhanced waveform.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.manner_block = MaskingUNet(size)
        rescale(self)

    def forward(self, noisy: Tensor, return_views: bool = False) -> Tensor | tuple[Tensor, Views]:
        """Enhance noisy speech, 16 kHz mono.

        Args:
            noisy: (B, T), full scale 1, one sample or more.
            return_views: also return the view features of every multi-view block.

        Returns:
            The estimate of the clean speech, (B, T). With `return_views` also a dict from (side,
            level, view) to (B, n, T_b), encoder levels 1 to L before decoder levels L to 1.

        A constant input, and so a single sample, has no deviation, and its estimate is zero.

        Raises:
            ValueError: `noisy` has another shape.
        """
        if noisy.ndim != 2 or noisy.shape[-1] == 0:
            raise ValueError(f"noisy must be (B, T) with T of at least 1, got shape {tuple(noisy.shape)}")
        samples = noisy.shape[-1]
        # The unbiased estimate of one sample would be 0 / 0.
        deviation = noisy.std(dim=-1, keepdim=True, correction=min(1, samples - 1))
        padding = self.size.frames(samples)[0] - samples
        padded = F.pad(noisy / (NORMALISATION_EPS + deviation), (0, padding))
        estimate, views = self.manner_block(padded.unsqueeze(1), return_views)
        estimate = deviation * estimate[:, 0, :samples]
        return (estimate, views) if return_views else estimate


def build(name_or_size: str | Size) -> Manner:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name_or_size: a name from the table of sizes, or a size of your own.

    Raises:
        UserError: no such name.
    """
    return Manner(sizes.get(name_or_size) if isinstance(name_or_size, str) else name_or_size)
