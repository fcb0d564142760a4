"""What comes when, and every random choice, as pure functions of (seed, epoch, position).

Neither ranks nor reader processes nor the order of the calls can change a sample, because no random
state outlives a call. All numbers are taken from the raw 64-bit output of PCG64, seeded through
SeedSequence: NumPy promises that both stay as they are, but not that ``Generator.permutation`` or
``Generator.uniform`` give the same values in its next release (NEP 19).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LARGEST_SEED = 2**32 - 1
"""SeedSequence splits larger numbers into words, and (2**32,) would then equal (0, 1)."""

# A leading tag keeps the two families of streams apart: SeedSequence pads with zeros, so that without it
# the order of epoch 1 and the item (epoch 1, position 0) would share one stream.
_ORDER, _ITEM = 1, 2


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, items: int) -> NDArray[np.int64]:
    """The order of one epoch: a permutation of ``range(items)``, read-only, shape (items,).

    Every permutation is equally likely, whatever shard an item lies in: there is no shuffle buffer,
    hence nothing to tune. The last few epochs are remembered, for a batch may straddle two.
    """
    bits = np.random.PCG64(np.random.SeedSequence([_ORDER, seed, epoch]))
    # Sorting random 64-bit keys is a uniform permutation; two equal keys among a million items have a
    # chance of 3e-8, and the stable sort then still gives everyone the same answer.
    order = np.argsort(bits.random_raw(items), kind="stable")
    order.flags.writeable = False
    return order


class Draws:
    """The random numbers of one item, one after the other."""

    def __init__(self, seed: int, epoch: int, position: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([_ITEM, seed, epoch, position]))

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
