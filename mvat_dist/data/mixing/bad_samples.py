"""Damaged segments that a run is told to bear: said, counted, and refused where there are too many."""

from __future__ import annotations

import logging
from collections.abc import Iterable

SUBSTITUTES = 8
"""Segments tried in place of a damaged one."""

_logger = logging.getLogger(__name__)
_SAID_IN_FULL = 10


class DamageLog:
    """Warns of what was found damaged: every utterance once, and ever more rarely where there are many.

    The first ten utterances are named, then the 20th, the 40th and so on; each of these lines has the count.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def tell(self, damage: Iterable[str]) -> None:
        """Warn of the damage of one step; each entry names a shard and a key."""
        for what in damage:
            if what in self._known:
                continue
            self._known.add(what)
            count = len(self._known)
            tens, rest = divmod(count, _SAID_IN_FULL)
            if count <= _SAID_IN_FULL or (rest == 0 and tens & (tens - 1) == 0):
                _logger.warning("damaged, another segment took its place (%d so far): %s", count, what)


class DamageBudget:
    """How many damaged segments a run bears, counted over all its ranks since it was started.

    Args:
        share: the largest share, of an epoch's segments or of all made so far, whichever is more. One
            damaged segment is always borne.
        epoch: segments of one epoch.
    """

    def __init__(self, share: float, epoch: int) -> None:
        self._share = share
        self._epoch = epoch
        self.damaged = 0
        """Damaged segments counted so far."""
        self.made = 0
        """All segments counted so far."""

    def count(self, damaged: int, made: int) -> None:
        """Count `made` more segments, of which `damaged` were replaced."""
        self.damaged += damaged
        self.made += made

    def refusal(self) -> str | None:
        """What to tell the user where more segments are damaged than is borne."""
        if self.damaged <= max(1.0, self._share * max(self.made, self._epoch)):
            return None
        return (
            f"{self.damaged} of {self.made} segments met damaged data, more than --data.max_damaged "
            f"{self._share:g} bears: find it with python -m mvat_dist.pack verify, and copy or pack again "
            "what that names"
        )
