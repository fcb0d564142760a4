"""How one training segment is made: mixed on the fly from sources, or cut from a pair mixed before.

A segment is a function of the item and of its `Draws` alone. Its recipe holds every choice as plain
values, so that any mixture can be explained, and made again, from the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config import SAMPLE_RATE, DataConfig
from mvat_dist.data import augment, mixing
from mvat_dist.data.mixing import Audio
from mvat_dist.data.order import Draws
from mvat_dist.data.shards import ShardSet

GAP = round(0.2 * SAMPLE_RATE)
"""Silence between two joined utterances, in samples: the DNS synthesizer's 0.2 s."""

FADE = round(0.005 * SAMPLE_RATE)
"""Fade at an inner end of a joined piece, in samples (design choice)."""

ATTEMPTS = 5
"""Stretches drawn before a silent one is accepted, and the recipe says so."""

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """One training segment: two waveforms in [-1, 1) at 16 kHz, and how they came about."""

    noisy: Audio
    """(T,) float32: the network's input."""
    clean: Audio
    """(T,) float32: the target."""
    recipe: Recipe
    """Plain values, ready for JSON: see `SourceSegments` and `PairSegments`."""


class Maker(Protocol):
    """Makes the segments of one kind of corpus."""

    iterated: ShardSet
    """The subset whose utterances are visited in turn."""

    def __len__(self) -> int:
        """Items an epoch."""

    def make(self, item: int, draws: Draws) -> Segment:
        """The segment of one item."""


class _Stretch(NamedTuple):
    """A part of one utterance."""

    utterance: int
    start: int
    frames: int


def segment_length(config: DataConfig) -> int:
    """Samples of one segment."""
    return round(config.segment_seconds * SAMPLE_RATE)


def _draw_tempo(config: DataConfig, draws: Draws) -> float:
    changed = draws.chance(config.tempo_probability)
    factor = draws.uniform(*config.tempo_range)
    return factor if changed else 1.0


def _needed(length: int, tempo: float) -> int:
    return length if tempo == 1.0 else augment.input_length(length, tempo)


class SourceSegments:
    """Clean speech, noise and room impulse responses, mixed anew in every epoch.

    An item is a clean utterance: a random crop of it or, where it is shorter than the segment, all of it and
    further random utterances after a pause of 0.2 s each. The clean target is the speech as the room
    gives it back, with its reverberation, as in the DNS synthesizer; what the room did to speech before the
    crop is not heard. Noise is cut or joined in the same way, without pauses.

    Recipe: ``speech`` and ``noise`` list their stretches (key, first sample, samples), ``tempo`` is the
    factor applied to the speech, ``rir`` a key or None, ``snr_db`` and ``level_dbfs`` are the values drawn;
    ``noisy = speech_gain * speech + noise_gain * noise``, with ``peak_gain`` (1 where the peak was low
    enough) contained in both gains. ``silent`` names the sides for which no audible stretch was found;
    ``snr_db`` is None then, and the noise keeps its own level.
    """

    def __init__(self, config: DataConfig, clean: ShardSet, noise: ShardSet, rirs: ShardSet | None) -> None:
        self.iterated = clean
        self._config = config
        self._length = segment_length(config)
        self._noise = noise
        self._rirs = rirs

    def __len__(self) -> int:
        return len(self.iterated)

    def make(self, item: int, draws: Draws) -> Segment:
        """The mixture whose first utterance is `item`."""
        config = self._config
        tempo = _draw_tempo(config, draws)
        room, impulse_response = self._draw_room(draws)
        snr_db: float | None = draws.uniform(*config.snr_db)
        level = draws.uniform(*config.level_dbfs)
        found = _draw_audible(self.iterated, item, _needed(self._length, tempo), GAP, draws)
        noise = _draw_audible(self._noise, None, self._length, 0, draws)
        if found.silent or noise.silent:
            snr_db = None

        speech = augment.change_tempo([found.audio], self._length, tempo)[0]
        if impulse_response is not None:
            speech = mixing.reverberate(speech, impulse_response)
        mixture = mixing.mix(speech, noise.audio, snr_db, level)
        recipe = {
            "speech": _described(self.iterated, found.parts),
            "tempo": tempo,
            "rir": room,
            "noise": _described(self._noise, noise.parts),
            "snr_db": snr_db,
            "level_dbfs": level,
            "speech_gain": mixture.speech_gain,
            "noise_gain": mixture.noise_gain,
            "peak_gain": mixture.peak_gain,
            "silent": [side for side, drawn in (("speech", found), ("noise", noise)) if drawn.silent],
        }
        return Segment(mixture.noisy, mixture.clean, recipe)

    def _draw_room(self, draws: Draws) -> tuple[str | None, Audio | None]:
        """Key and samples of an impulse response, or twice None."""
        if not draws.chance(self._config.reverb_probability) or self._rirs is None:
            return None, None
        index = draws.integer(len(self._rirs))
        return self._rirs.key(index), self._rirs.read(index)


class _Drawn(NamedTuple):
    """Audio that fills a segment."""

    audio: Audio
    parts: list[_Stretch]
    silent: bool


def _draw_audible(sources: ShardSet, first: int | None, length: int, gap: int, draws: Draws) -> _Drawn:
    """`length` samples that are not silent, or the last of `ATTEMPTS`; `first` None draws that one, too."""
    for _ in range(ATTEMPTS):
        parts = _draw_stretches(sources, first, length, gap, draws)
        pieces = [sources.read(part.utterance, "audio", part.start, part.frames) for part in parts]
        joined = mixing.join(pieces, gap, FADE)
        # Where the last pause reaches the end of the segment, no utterance follows it.
        drawn = _Drawn(np.pad(joined, (0, length - joined.size)), parts, mixing.is_silent(joined))
        if not drawn.silent:
            break
    return drawn


def _draw_stretches(
    sources: ShardSet, first: int | None, length: int, gap: int, draws: Draws
) -> list[_Stretch]:
    """Stretches that fill `length` samples with `gap` samples between them."""
    parts = []
    index = draws.integer(len(sources)) if first is None else first
    while length > 0:
        available = int(sources.samples[index])
        frames = min(available, length)
        parts.append(_Stretch(index, draws.integer(available - frames + 1), frames))
        length -= frames + gap
        index = draws.integer(len(sources))
    return parts


def _described(sources: ShardSet, parts: list[_Stretch]) -> list[Recipe]:
    return [
        {"key": sources.key(part.utterance), "start": part.start, "frames": part.frames} for part in parts
    ]


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
        self._config = config
        self._length = segment_length(config)
        self._grid: NDArray[np.int64] | None = None
        if config.stride_seconds > 0:
            self._grid = segment_grid(pairs.samples, self._length, round(config.stride_seconds * SAMPLE_RATE))

    def __len__(self) -> int:
        return len(self.iterated) if self._grid is None else len(self._grid)

    def make(self, item: int, draws: Draws) -> Segment:
        """The segment of `item`: a pair, or a place of the grid."""
        config = self._config
        tempo = _draw_tempo(config, draws)
        part = self._draw_crop(item, _needed(self._length, tempo), draws)
        clean, noisy = self._cut(part, tempo)

        remix = self._draw_remix(part.utterance, draws)
        if remix is not None:
            noisy = clean + np.resize(self._noise(remix), self._length)
        gain_db = draws.uniform(*config.gain_db)
        peak_gain = 1.0
        if remix is not None or gain_db != 0.0:
            gain = mixing.from_db(gain_db)
            peak_gain = mixing.limit_gain(noisy * np.float32(gain), clean * np.float32(gain))
            noisy = noisy * np.float32(gain * peak_gain)
            clean = clean * np.float32(gain * peak_gain)
        recipe = {
            **_described(self.iterated, [part])[0],
            "tempo": tempo,
            "remix": None if remix is None else _described(self.iterated, [remix])[0],
            "gain_db": gain_db,
            "peak_gain": peak_gain,
        }
        return Segment(noisy, clean, recipe)

    def _draw_crop(self, item: int, needed: int, draws: Draws) -> _Stretch:
        """`needed` samples at the item's place, moved forward where a faster tempo would pass the end."""
        index, start = (item, None) if self._grid is None else map(int, self._grid[item])
        available = int(self.iterated.samples[index])
        frames = min(available, needed)
        latest = available - frames
        start = draws.integer(latest + 1) if start is None else min(start, latest)
        return _Stretch(index, start, frames)

    def _cut(self, part: _Stretch, tempo: float) -> tuple[Audio, Audio]:
        """Clean and noisy, `self._length` samples each, spliced at the same places."""
        missing = (0, _needed(self._length, tempo) - part.frames)
        signals = [
            np.pad(self.iterated.read(part.utterance, field, part.start, part.frames), missing)
            for field in ("clean", "noisy")
        ]
        clean, noisy = augment.change_tempo(signals, self._length, tempo)
        return clean, noisy

    def _draw_remix(self, own: int, draws: Draws) -> _Stretch | None:
        if not draws.chance(self._config.remix_probability):
            return None
        others = len(self.iterated) - 1
        index = (own + 1 + draws.integer(others)) % len(self.iterated)
        available = int(self.iterated.samples[index])
        frames = min(available, self._length)
        return _Stretch(index, draws.integer(available - frames + 1), frames)

    def _noise(self, part: _Stretch) -> Audio:
        noisy = self.iterated.read(part.utterance, "noisy", part.start, part.frames)
        return noisy - self.iterated.read(part.utterance, "clean", part.start, part.frames)


def segment_grid(samples: NDArray[np.int64], length: int, stride: int) -> NDArray[np.int64]:
    """All places of the grid over utterances of `samples` samples: shape (items, 2), utterance and start."""
    rest = np.maximum(samples - length, 0)
    counts = -(-rest // stride) + 1
    utterances = np.repeat(np.arange(len(samples)), counts)
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([utterances, np.minimum(steps * stride, rest[utterances])], axis=1)
