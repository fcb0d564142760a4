"""Training segments cut from pre-mixed pairs of noisy and clean recordings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing import augment, mix
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import CounterRandom
from mvat_dist.data.mixing.segments import (
    Segment,
    Span,
    describe_span,
    draw_tempo,
    needed_length,
    segment_length,
    stride_length,
)
from mvat_dist.data.shards.reader import ShardSet


class PremixedPairs:
    """Noisy and clean recordings of one length, cut together.

    With ``stride_seconds`` 0 an item is a pair, and every epoch takes another random crop of it. With a
    stride an item is one place of a fixed grid: a start at every multiple of the stride at which a whole
    segment fits and, where that leaves a rest, a last segment that ends with the recording. A pair shorter
    than the segment gives one item, zero-padded at its end, in both cases.

    Recipe: ``key``, ``start`` and ``frames`` (samples read before a change of tempo), ``tempo``;
    ``remix`` is the span of another pair whose noise (noisy minus clean, repeated where it is too
    short) replaces the pair's own, or None; ``gain_db`` is the gain drawn and ``peak_gain`` the further
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
        augmented = config.tempo_probability or config.remix_probability or len(set(config.gain_db)) > 1
        self.fixed = self._grid is not None and not augmented

    def __len__(self) -> int:
        return len(self.iterated) if self._grid is None else len(self._grid)

    def make(self, item: int, random: CounterRandom) -> Segment:
        """The segment of `item`: a pair, or a place of the grid."""
        config = self._config
        tempo = draw_tempo(config, random)
        span = self._draw_crop(item, needed_length(self._length, tempo), random)
        clean, noisy = self._cut(span, tempo)

        remix = self._draw_remix(span.utterance, random)
        if remix is not None:
            noisy = clean + np.resize(self._noise(remix), self._length)
        gain_db = random.uniform(*config.gain_db)
        peak_gain = 1.0
        if remix is not None or gain_db != 0.0:
            gain = mix.from_db(gain_db)
            peak_gain = mix.limit_gain(noisy * np.float32(gain), clean * np.float32(gain))
            noisy = noisy * np.float32(gain * peak_gain)
            clean = clean * np.float32(gain * peak_gain)
        recipe = {
            **describe_span(self.iterated, span),
            "tempo": tempo,
            "remix": None if remix is None else describe_span(self.iterated, remix),
            "gain_db": gain_db,
            "peak_gain": peak_gain,
        }
        return Segment(noisy, clean, recipe)

    def _draw_crop(self, item: int, needed: int, random: CounterRandom) -> Span:
        """`needed` samples at the item's place, moved forward where a faster tempo would pass the end."""
        index, start = (item, None) if self._grid is None else map(int, self._grid[item])
        available = int(self.iterated.samples[index])
        frames = min(available, needed)
        latest = available - frames
        start = random.integer(latest + 1) if start is None else min(start, latest)
        return Span(index, start, frames)

    def _cut(self, span: Span, tempo: float) -> tuple[Audio, Audio]:
        """Clean and noisy at `tempo`, `self._length` samples each, spliced at the same places."""
        missing = (0, needed_length(self._length, tempo) - span.frames)
        signals = [
            np.pad(self.iterated.read(span.utterance, field, span.start, span.frames), missing)
            for field in ("clean", "noisy")
        ]
        clean, noisy = augment.change_tempo(signals, self._length, tempo)
        return clean, noisy

    def _draw_remix(self, utterance: int, random: CounterRandom) -> Span | None:
        if not random.chance(self._config.remix_probability):
            return None
        others = len(self.iterated) - 1
        other = (utterance + 1 + random.integer(others)) % len(self.iterated)
        available = int(self.iterated.samples[other])
        frames = min(available, self._length)
        return Span(other, random.integer(available - frames + 1), frames)

    def _noise(self, span: Span) -> Audio:
        noisy = self.iterated.read(span.utterance, "noisy", span.start, span.frames)
        return noisy - self.iterated.read(span.utterance, "clean", span.start, span.frames)


def segment_grid(samples: NDArray[np.int64], length: int, stride: int) -> NDArray[np.int64]:
    """Places of a grid over utterances that have `samples` (N,) samples: (items, 2), utterance and start."""
    rest = np.maximum(samples - length, 0)
    counts = -(-rest // stride) + 1
    utterances = np.repeat(np.arange(len(samples)), counts)
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([utterances, np.minimum(steps * stride, rest[utterances])], axis=1)
