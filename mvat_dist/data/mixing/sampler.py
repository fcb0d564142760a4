"""What comes when, and every random choice, as pure functions of (seed, epoch, position).

The stream of training segments is the concatenation of all epochs. Its sample i is (epoch, position) =
divmod(i, N), optimiser step s takes the samples ``s * batch`` to ``(s + 1) * batch - 1``, and a rank takes
its slices of these by arithmetic. A batch may straddle two epochs; nothing is dropped, nothing padded.

Neither ranks nor reader processes nor the order of the calls can change a sample, because no random
state outlives a call. All numbers are taken from the raw 64-bit output of PCG64, seeded through
SeedSequence: NumPy promises that both stay as they are, but not that ``Generator.permutation`` or
``Generator.uniform`` give the same values in its next release (NEP 19).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LARGEST_SEED = 2**32 - 1
"""SeedSequence splits larger numbers into words, and (2**32,) would then equal (0, 1)."""

# A leading tag keeps the families of streams apart: SeedSequence pads with zeros, so that without it
# the order of epoch 1 and the item (epoch 1, position 0) would share one stream.
_TAGS = {"order": 1, "place": 2, "variant": 3, "room": 4}


def raw_bits(family: Literal["order", "place", "variant", "room"], *key: int) -> np.random.PCG64:
    """The stream of a family that belongs to `key`, to be read by ``random_raw`` alone.

    Each of `key` is at most `LARGEST_SEED`.
    """
    return np.random.PCG64(np.random.SeedSequence([_TAGS[family], *key]))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, items: int) -> NDArray[np.int64]:
    """The order of one epoch: a permutation of ``range(items)``, read-only, shape (items,).

    Every permutation is equally likely, whatever shard an item lies in: there is no shuffle buffer,
    hence nothing to tune. Of a shard with a share p of the items, any stretch of n samples therefore
    holds a hypergeometric number: n * p on average, with a standard deviation below sqrt(n * p).
    The last few epochs are remembered, for a batch may straddle two.
    """
    bits = raw_bits("order", seed, epoch)
    # Sorting random 64-bit keys is a uniform permutation; two equal keys among a million items have a
    # chance of 3e-8, and the stable sort then still gives everyone the same answer.
    order = np.argsort(bits.random_raw(items), kind="stable")
    order.flags.writeable = False
    return order


class Draws:
    """The random numbers of one segment, one after the other.

    Args:
        seed: of the run.
        group: the epoch, or the number of the variant.
        member: the position in the epoch, or the item.
        kind: `place`: (epoch, position); `variant`: (variant, item).
        attempt: 0, or the number of the substitute for a damaged segment.
    """

    def __init__(
        self,
        seed: int,
        group: int,
        member: int,
        kind: Literal["place", "variant"] = "place",
        attempt: int = 0,
    ) -> None:
        self._bits = raw_bits(kind, seed, group, member, *([attempt] if attempt else []))

    def fraction(self) -> float:
        """Uniform in [0, 1), 53 bits."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        """Uniform between `low` and `high`."""
        return low + (high - low) * self.fraction()

    def integer(self, count: int) -> int:
        """Uniform in ``range(count)``; the bias is below count / 2**64."""
        return (int(self._bits.random_raw()) * count) >> 64

    def chance(self, probability: float) -> bool:
        """True with `probability`; always draws one number."""
        return self.fraction() < probability


def micro_batch_size(local_batch: int, most: int) -> int:
    """Largest micro-batch of at most `most` segments that divides a rank's local batch."""
    return max(size for size in range(1, min(most, local_batch) + 1) if local_batch % size == 0)


@dataclass(frozen=True)
class RankSlices:
    """The global sample numbers of a rank's micro-batches, in order: arithmetic, so resuming costs nothing.

    Accumulation step a of rank r takes the ``micro`` samples from ``(a * world_size + r) * micro`` of each
    global batch, so that the samples of one forward pass over all ranks are neighbours.
    """

    batch: int
    micro: int
    accumulation: int
    rank: int
    world_size: int
    first_step: int
    steps: int

    def __iter__(self) -> Iterator[range]:
        for step in range(self.first_step, self.first_step + self.steps):
            for turn in range(self.accumulation):
                first = step * self.batch + (turn * self.world_size + self.rank) * self.micro
                yield range(first, first + self.micro)

    def __len__(self) -> int:
        return self.steps * self.accumulation
