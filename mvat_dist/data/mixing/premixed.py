"""Training segments cut from mixtures made before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing import augment, mix
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import Draws
from mvat_dist.data.mixing.segments import (
    Segment,
    Stretch,
    described,
    draw_tempo,
    needed_length,
    segment_length,
    stride_length,
)
from mvat_dist.data.shards.reader import ShardSet


class PairSegments:
    """Noisy and clean recordings of one length, cut together.

    With ``stride_seconds`` 0 an item is a pair, and every epoch takes another random crop of it. With a
    stride an item is one place of a fixed grid: a start at every multiple of the stride at which a whole
    segment fits and, where that leaves a rest, a last segment that ends with the recording. A pair shorter
    than the segment gives one item, zero-padded at its end, in both cases.

    Recipe: ``key``, ``start`` and ``frames`` (samples read before a change of tempo), ``tempo``;
    ``remix`` is the stretch of another pair whose noise (noisy minus clean, repeated where it is too
    short) took the place of the own, or None; ``gain_db`` is the gain drawn and ``peak_gain`` the further
    factor that kept a changed mixture from clipping.
    """

    def __init__(self, config: DataConfig, pairs: ShardSet) -> None:
        self.iterated = pairs
        self.subsets: Sequence[ShardSet] = [pairs]
        self._config = config
        self._length = segment_length(config)
        self._grid: NDArray[np.int64] | None = None
        if config.stride_seconds > 0:
            self._grid = segment_grid(pairs.samples, self._length, stride_length(config))
        self.utterances = np.arange(len(pairs)) if self._grid is None else self._grid[:, 0]
        random = config.tempo_probability or config.remix_probability or len(set(config.gain_db)) > 1
        self.fixed = self._grid is not None and not random

    def __len__(self) -> int:
        return len(self.iterated) if self._grid is None else len(self._grid)

    def make(self, item: int, draws: Draws) -> Segment:
        """The segment of `item`: a pair, or a place of the grid."""
        config = self._config
        tempo = draw_tempo(config, draws)
        part = self._draw_crop(item, needed_length(self._length, tempo), draws)
        clean, noisy = self._cut(part, tempo)

        remix = self._draw_remix(part.utterance, draws)
        if remix is not None:
            noisy = clean + np.resize(self._noise(remix), self._length)
        gain_db = draws.uniform(*config.gain_db)
        peak_gain = 1.0
        if remix is not None or gain_db != 0.0:
            gain = mix.from_db(gain_db)
            peak_gain = mix.limit_gain(noisy * np.float32(gain), clean * np.float32(gain))
            noisy = noisy * np.float32(gain * peak_gain)
            clean = clean * np.float32(gain * peak_gain)
        recipe = {
            **described(self.iterated, [part])[0],
            "tempo": tempo,
            "remix": None if remix is None else described(self.iterated, [remix])[0],
            "gain_db": gain_db,
            "peak_gain": peak_gain,
        }
        return Segment(noisy, clean, recipe)

    def _draw_crop(self, item: int, needed: int, draws: Draws) -> Stretch:
        """`needed` samples at the item's place, moved forward where a faster tempo would pass the end."""
        index, start = (item, None) if self._grid is None else map(int, self._grid[item])
        available = int(self.iterated.samples[index])
        frames = min(available, needed)
        latest = available - frames
        start = draws.integer(latest + 1) if start is None else min(start, latest)
        return Stretch(index, start, frames)

    def _cut(self, part: Stretch, tempo: float) -> tuple[Audio, Audio]:
        """Clean and noisy, `self._length` samples each, spliced at the same places."""
        missing = (0, needed_length(self._length, tempo) - part.frames)
        signals = [
            np.pad(self.iterated.read(part.utterance, field, part.start, part.frames), missing)
            for field in ("clean", "noisy")
        ]
        clean, noisy = augment.change_tempo(signals, self._length, tempo)
        return clean, noisy

    def _draw_remix(self, own: int, draws: Draws) -> Stretch | None:
        if not draws.chance(self._config.remix_probability):
            return None
        others = len(self.iterated) - 1
        index = (own + 1 + draws.integer(others)) % len(self.iterated)
        available = int(self.iterated.samples[index])
        frames = min(available, self._length)
        return Stretch(index, draws.integer(available - frames + 1), frames)

    def _noise(self, part: Stretch) -> Audio:
        noisy = self.iterated.read(part.utterance, "noisy", part.start, part.frames)
        return noisy - self.iterated.read(part.utterance, "clean", part.start, part.frames)


def segment_grid(samples: NDArray[np.int64], length: int, stride: int) -> NDArray[np.int64]:
    """All places of the grid over utterances of `samples` samples: shape (items, 2), utterance and start."""
    rest = np.maximum(samples - length, 0)
    counts = -(-rest // stride) + 1
    utterances = np.repeat(np.arange(len(samples)), counts)
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([utterances, np.minimum(steps * stride, rest[utterances])], axis=1)
