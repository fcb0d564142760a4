"""Where the time of a run goes and, on GPUs, the energy.

The sections of a `Stopwatch`, and what lies between them, add up to the whole time. Energy is the GPUs' total
from NVML, through the package nvidia-ml-py; CPUs, power supplies, disks and networks are not in it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from mvat_dist.runs.history import APART

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

OTHER = "other"
"""The section of what no other section claims."""


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
        """Always true."""
        del moment
        return True

    def between(self, begin: float, end: float) -> float:
        """Seconds."""
        return end - begin


class DeviceClock:
    """The clock of a GPU: a moment is an event in its stream, so nothing waits for the device."""

    def now(self) -> torch.cuda.Event:
        """An event, recorded behind the work that was queued before."""
        # Imported late: those who only read shares of the time, on a login node, need no torch.
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

    Sections may be nested: time counts for the innermost. What the clock cannot tell yet counts for the next
    lap. Copying gradients into the buffer of their all-reduce counts as backward, waiting for it as
    communication.
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

    def timed(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, with the time of every call counted under `name`."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.section(name):
                return function(*args, **kwargs)

        return call

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
        """Note that the innermost open section begins now."""
        self._marks.append((self._clock.now(), self._open[-1]))
        while len(self._marks) > 1 and self._clock.passed(self._marks[1][0]):
            begin, section = self._marks.popleft()
            self._seconds[section] += self._clock.between(begin, self._marks[0][0])


def clock_of(device: torch.device) -> Clock:
    """The clock that tells the time of work on `device`."""
    return DeviceClock() if device.type == "cuda" else HostClock()


def speed(amount: float, elapsed: float, shares: Mapping[str, float]) -> float | None:
    """`amount` per second of training: validations and checkpoints do not count among a lap's seconds.

    None where the lap holds nothing else: a GPU's clock may not have reported the training yet.
    """
    seconds = elapsed * sum(share for name, share in shares.items() if name not in APART)
    return amount / seconds if seconds else None


def in_words(shares: Mapping[str, float], most: int = 4) -> str:
    """``backward 44 %, forward 31 %, teacher 18 %``: the largest shares, summed over students."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, share in shares.items():
        kinds[name.partition("/")[0]] += share
    largest = sorted(kinds.items(), key=lambda kind: -kind[1])[:most]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in largest)


def of_student(name: str, shares: Mapping[str, float]) -> dict[str, float]:
    """The shares as one student's row shows them: its own by their kind, those of all others as one."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for key, share in shares.items():
        kind, _, student = key.partition("/")
        kinds[kind if student in {"", name} else "other students"] += share
    return dict(kinds)


class EnergyMeter:
    """Joules that the GPUs of all ranks have used since the last `lap`."""

    def __init__(self, device: torch.device, counter: GpuCounter | None = None) -> None:
        self._device = device
        self._counter = counter or (GpuCounter(device) if device.type == "cuda" else None)
        self._last = 0.0

    def lap(self) -> float | None:
        """Joules; None on CPUs, and where one rank's GPU does not tell. Every rank calls it."""
        import torch

        from mvat_dist.distributed.collectives import all_reduce_sum

        if self._counter is None:
            return None
        joules = self._counter.joules()
        used = 0.0 if joules is None else joules - self._last
        self._last += used
        total = torch.tensor([used, float(joules is None)], dtype=torch.float64, device=self._device)
        all_reduce_sum([total])
        used, unknown = total.tolist()
        return None if unknown else used


class GpuCounter:
    """NVML's energy counter of one GPU, Volta or later."""

    def __init__(self, device: torch.device) -> None:
        self._first = 0.0
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            # Not by number: NVML counts every GPU of the node, whichever the job may see.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._first = self._total()
        except Exception as error:  # no package, an old driver, a slice of a GPU: each has errors of its own
            logger.info("the GPU's energy is not known (%s)", error)
            self._handle = None

    def joules(self) -> float | None:
        """Joules counted since this counter was made; None where NVML does not tell."""
        try:
            return None if self._handle is None else self._total() - self._first
        except self._nvml.NVMLError:
            return None

    def _total(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
