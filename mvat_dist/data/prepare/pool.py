"""Worker processes for packing and verifying: ordered results, a clean end whatever happens."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Protocol, TypeVar

from mvat_dist.data.workers import follow_parent, signals_blocked
from mvat_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_AHEAD = 4
"""Chunks handed out per process: enough to keep all busy, few enough to keep memory flat."""


class Map(Protocol):
    """Results of ``function(job)`` in the order of the jobs, computed `chunk` jobs at a time."""

    def __call__(
        self, function: Callable[[Job], Result], jobs: Iterable[Job], chunk: int = 1
    ) -> Iterator[Result]: ...


@contextmanager
def processes(count: int) -> Iterator[Map]:
    """Yield a map over `count` processes (0: one per core that this process may use; 1: no other process).

    `function` must be importable and its jobs small: paths and plans, never audio.

    Raises:
        UserError: a worker was killed, most often because memory ran out.
    """
    count = count or len(os.sched_getaffinity(0))
    if count == 1:
        yield lambda function, jobs, chunk=1: map(function, jobs)  # noqa: ARG005
        return
    # Spawned, because a fork of a process with threads (torch, progress bars) can lock up.
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=follow_parent)
    with signals_blocked():  # which are the parent's; each of these jobs starts a worker
        for _ in range(count):
            executor.submit(os.getpid)
    try:
        yield lambda function, jobs, chunk=1: _ordered(executor, _AHEAD * count, function, jobs, chunk)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely because memory ran out: run again with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _ordered(
    executor: ProcessPoolExecutor,
    ahead: int,
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    chunk: int,
) -> Iterator[Result]:
    """`Executor.map` submits every job at once and keeps what is done early; this has `ahead` under way."""
    rest = iter(jobs)
    under_way: deque[Future[list[Result]]] = deque()
    while part := list(islice(rest, chunk)):
        under_way.append(executor.submit(_each, function, part))
        if len(under_way) >= ahead:
            yield from under_way.popleft().result()
    while under_way:
        yield from under_way.popleft().result()


def _each(function: Callable[[Job], Result], jobs: list[Job]) -> list[Result]:
    return [function(job) for job in jobs]
