"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds spent in named sections since the last `lap`.

    Host time: on a GPU, work that was queued counts where the host next waits for it.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - before

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap, and each section's share of them; starts a new lap."""
        now = time.perf_counter()
        elapsed = now - self._started
        shares = {name: seconds / elapsed for name, seconds in self._seconds.items()}
        self._seconds.clear()
        self._started = now
        return elapsed, shares
