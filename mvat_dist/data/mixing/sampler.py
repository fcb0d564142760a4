"""The order of the samples and the random numbers of each, as pure functions of (seed, epoch, position).

The stream of training segments is the concatenation of all epochs. Its sample i is (epoch, position) =
divmod(i, N), optimiser step s takes the samples ``s * batch`` to ``(s + 1) * batch - 1``, and `RankSampler`
finds those of a rank by arithmetic. A batch may straddle two epochs; nothing is dropped, nothing padded.

Ranks, reader processes and the order of the calls cannot change a sample, because no random state outlives a
call: random numbers are counter-based. All are taken from the raw 64-bit output of PCG64, seeded through
SeedSequence. NumPy promises that both stay as they are, but not that ``Generator.permutation`` or
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

# SeedSequence pads with zeros: without a leading tag the permutation of epoch 1 and the item at
# (epoch 1, position 0) would share one stream.
_TAGS = {"permutation": 1, "position": 2, "variant": 3, "room": 4}


def random_bits(family: Literal["permutation", "position", "variant", "room"], *key: int) -> np.random.PCG64:
    """The stream of random bits of a family and `key`, to be read by ``random_raw`` alone.

    Each number of `key` is at most `LARGEST_SEED`.
    """
    return np.random.PCG64(np.random.SeedSequence([_TAGS[family], *key]))


@lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, items: int) -> NDArray[np.int64]:
    """The order of one epoch: a permutation of ``range(items)``, read-only, shape (items,).

    Every permutation is equally likely, whatever shard an item lies in: there is no shuffle buffer to tune.
    So n samples in a row hold a hypergeometric number of items of a shard that has a share p of them: n * p
    on average, with a standard deviation below sqrt(n * p). The last few epochs are cached, because a batch
    may straddle two.
    """
    bits = random_bits("permutation", seed, epoch)
    # Sorting random 64-bit keys is a uniform permutation; two equal keys among a million items have a
    # chance of 3e-8, and the stable sort then still gives everyone the same answer.
    permutation = np.argsort(bits.random_raw(items), kind="stable")
    permutation.flags.writeable = False
    return permutation


class CounterRandom:
    """Counter-based random numbers: those of one segment, one after the other.

    Args:
        seed: of the run.
        group: the epoch, or the number of the variant.
        member: the position in the epoch, or the item.
        kind: what `group` and `member` are: `position` for (epoch, position), `variant` for (variant, item).
        attempt: 0, or the number of the segment tried in place of a bad sample.
    """

    def __init__(
        self,
        seed: int,
        group: int,
        member: int,
        kind: Literal["position", "variant"] = "position",
        attempt: int = 0,
    ) -> None:
        self._bits = random_bits(kind, seed, group, member, *([attempt] if attempt else []))

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
class RankSampler:
    """Yield the global sample numbers of a rank's micro-batches; arithmetic, so resuming costs nothing.

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
