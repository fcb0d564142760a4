"""Open things of which there may be thousands: those used last stay open, the others are closed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

OPEN_AT_ONCE = 64
"""Far below the 1024 descriptors that a process usually may have, for a run opens several subsets."""


class Closable(Protocol):
    """Anything that is opened and closed."""

    def close(self) -> None:
        """Give back what it holds."""


T = TypeVar("T", bound=Closable)


class Recent(Generic[T]):
    """The `OPEN_AT_ONCE` things that were asked for last, by number."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, T] = OrderedDict()

    def get(self, number: int, opened: Callable[[], T]) -> T:
        """Thing `number`, made by `opened` unless it is open; the longest unused one may be closed for it."""
        if number not in self._open:
            self._open[number] = opened()
            if len(self._open) > OPEN_AT_ONCE:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        """Close all that is open; asking opens it again."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        self.close()
