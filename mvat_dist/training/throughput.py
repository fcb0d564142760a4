"""Where the time of a run goes: the sections, and what lies between them, add up to the whole."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from mvat_dist.runs.history import APART

if TYPE_CHECKING:
    import torch

OTHER = "other"
"""What no section claims."""


class Clock(Protocol):
    """Moments, and the time between them."""

    def now(self) -> Any:
        """A moment."""

    def passed(self, moment: Any) -> bool:
        """Whether it can be read without waiting."""

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another, both of which have passed."""


class HostClock:
    """The clock of this process."""

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        """Always."""
        del moment
        return True

    def between(self, begin: float, end: float) -> float:
        """Seconds."""
        return end - begin


class DeviceClock:
    """The clock of a GPU: a moment is an event in its stream, so nothing waits for the device."""

    def now(self) -> torch.cuda.Event:
        """An event, recorded behind the work that was queued before."""
        # Imported late: those who only read shares, on a login node, need no torch.
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def passed(self, moment: torch.cuda.Event) -> bool:
        """Whether the device has come so far."""
        return bool(moment.query())  # type: ignore[no-untyped-call]

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds on the device."""
        return float(begin.elapsed_time(end)) / 1000


class Stopwatch:
    """Seconds spent in named sections since the last `lap`.

    Sections may lie in one another: time counts for the innermost. What the clock cannot tell yet counts for
    the next lap.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or HostClock()
        self._open = [OTHER]
        self._seconds: defaultdict[str, float] = defaultdict(float)
        # (a moment, the section that begins there); all but the first are not read yet.
        self._marks: deque[tuple[Any, str]] = deque()
        self._mark()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap, and each section's share of them; starts a new lap.

        The shares add up to 1; that of `OTHER` is always among them.
        """
        self._mark()
        elapsed = sum(self._seconds.values())
        shares = {name: seconds / elapsed for name, seconds in self._seconds.items()} if elapsed else {}
        self._seconds.clear()
        return elapsed, {OTHER: 0.0, **shares}

    def _mark(self) -> None:
        """The section on top begins now."""
        self._marks.append((self._clock.now(), self._open[-1]))
        while len(self._marks) > 1 and self._clock.passed(self._marks[1][0]):
            begin, section = self._marks.popleft()
            self._seconds[section] += self._clock.between(begin, self._marks[0][0])


def clock_of(device: torch.device) -> Clock:
    """The clock that tells the time of work on `device`."""
    return DeviceClock() if device.type == "cuda" else HostClock()


def speed(amount: float, elapsed: float, shares: Mapping[str, float]) -> float | None:
    """`amount` per second of training: of a lap's seconds, validations and checkpoints do not count.

    None where the lap holds nothing else: a GPU's clock may not have told of the training yet.
    """
    seconds = elapsed * sum(share for name, share in shares.items() if name not in APART)
    return amount / seconds if seconds else None


def in_words(shares: Mapping[str, float], most: int = 4) -> str:
    """``backward 44 %, forward 31 %, teacher 18 %``: the largest shares, summed over students."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, share in shares.items():
        kinds[name.partition("/")[0]] += share
    largest = sorted(kinds.items(), key=lambda one: -one[1])[:most]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in largest)


def of_student(name: str, shares: Mapping[str, float]) -> dict[str, float]:
    """The shares as one student's record shows them: its own ones by their kind, the others' as one."""
    seen: defaultdict[str, float] = defaultdict(float)
    for key, share in shares.items():
        kind, _, whose = key.partition("/")
        seen[kind if whose in {"", name} else "other students"] += share
    return dict(seen)
