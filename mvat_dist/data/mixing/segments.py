"""What a training segment is, and what the two ways of making one share.

A segment is a function of the item and of its `Draws` alone. Its recipe holds every choice as plain
values, so that any mixture can be explained, and made again, from the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.mixing import augment
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import Draws
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.target_codec import LessonArrays

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """One training segment: two waveforms in [-1, 1] at 16 kHz, and how they came about."""

    noisy: Audio
    """(T,) float32: the network's input."""
    clean: Audio
    """(T,) float32: the target."""
    recipe: Recipe
    """Plain values, ready for JSON: see `SourceSegments`, `PairSegments` and `TrainingData.item`."""
    lesson: LessonArrays | None = None
    """What the teacher says of it, where a cache was opened."""


class Maker(Protocol):
    """Makes the segments of one kind of corpus."""

    iterated: ShardSet
    """The subset whose utterances are visited in turn."""

    subsets: Sequence[ShardSet]
    """Everything that is read."""

    utterances: NDArray[np.int64]
    """(N,) the utterance, by its place in `iterated`, that each item begins with; never decreasing."""

    fixed: bool
    """Whether nothing is drawn: an item gives the same segment whenever it is made."""

    def __len__(self) -> int:
        """Items an epoch."""

    def make(self, item: int, draws: Draws) -> Segment:
        """The segment of one item.

        Raises:
            ShardError: what it is made of is damaged.
        """


class Stretch(NamedTuple):
    """A part of one utterance."""

    utterance: int
    start: int
    frames: int


def segment_length(config: DataConfig) -> int:
    """Samples of one segment."""
    return round(config.segment_seconds * SAMPLE_RATE)


def stride_length(config: DataConfig) -> int:
    """Samples between two places of the grid of segments; 0 where there is none."""
    return round(config.stride_seconds * SAMPLE_RATE)


def draw_tempo(config: DataConfig, draws: Draws) -> float:
    """A tempo factor; 1 where the tempo stays."""
    changed = draws.chance(config.tempo_probability)
    factor = draws.uniform(*config.tempo_range)
    return factor if changed else 1.0


def needed_length(length: int, tempo: float) -> int:
    """Samples to read for `length` samples at `tempo`."""
    return length if tempo == 1.0 else augment.input_length(length, tempo)


def described(sources: ShardSet, parts: Sequence[Stretch]) -> list[Recipe]:
    """The stretches as a recipe tells them."""
    return [
        {"key": sources.key(part.utterance), "start": part.start, "frames": part.frames} for part in parts
    ]
