"""What a training segment is, and what dynamic mixing and pre-mixed pairs have in common.

A segment is a function of its item and of its `CounterRandom` alone. Its recipe holds every choice as plain
values, so any mixture can be explained, and made again, from the record.
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
from mvat_dist.data.mixing.sampler import CounterRandom
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.target_codec import SegmentTargets

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """One training segment: two waveforms in [-1, 1] at 16 kHz, and how they were made."""

    noisy: Audio
    """(T,) float32: the network's input."""
    clean: Audio
    """(T,) float32: the target."""
    recipe: Recipe
    """Plain values, ready for JSON: see `DynamicMixing`, `PremixedPairs` and `TrainingData.item`."""
    teacher_targets: SegmentTargets | None = None
    """The teacher's targets, where a teacher cache was opened."""


class SegmentFactory(Protocol):
    """Makes the segments of one kind of corpus."""

    iterated: ShardSet
    """The subset whose utterances are visited in turn."""

    subsets: Sequence[ShardSet]
    """Everything that is read."""

    utterances: NDArray[np.int64]
    """(N,) the utterance, by its place in `iterated`, that each item begins with; never decreasing."""

    fixed: bool
    """Whether nothing is random: an item gives the same segment whenever it is made."""

    def __len__(self) -> int:
        """Items per epoch."""

    def make(self, item: int, random: CounterRandom) -> Segment:
        """The segment of one item.

        Raises:
            ShardError: an utterance that it needs is damaged.
        """


class Span(NamedTuple):
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


def draw_tempo(config: DataConfig, random: CounterRandom) -> float:
    """A random tempo factor; 1 where the tempo stays."""
    changed = random.chance(config.tempo_probability)
    factor = random.uniform(*config.tempo_range)
    return factor if changed else 1.0


def needed_length(length: int, tempo: float) -> int:
    """Samples to read for `length` samples at `tempo`."""
    return length if tempo == 1.0 else augment.input_length(length, tempo)


def describe_span(subset: ShardSet, span: Span) -> Recipe:
    """A span as a recipe names it: key, first sample, samples."""
    return {"key": subset.key(span.utterance), "start": span.start, "frames": span.frames}
