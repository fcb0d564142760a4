"""Worker processes for packing and verifying: ordered results, a clean end whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Protocol, TypeVar

from mvat_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Map(Protocol):
    """Results of ``function(job)`` in the order of the jobs, computed `chunk` jobs at a time."""

    def __call__(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], chunk: int = 1
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
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_follow_parent)
    # Ctrl-C is the parent's: the workers, of which each of these jobs starts one, inherit that it is blocked.
    resource_tracker.ensure_running()  # here, because its start would unblock the signal again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for _ in range(count):
        executor.submit(os.getpid)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield lambda function, jobs, chunk=1: executor.map(function, jobs, chunksize=chunk)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely because memory ran out: run again with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """End this worker when its parent ends, even if that is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
