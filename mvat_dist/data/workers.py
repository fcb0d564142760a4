"""Reader processes that are safe beside a process group, and that neither outlive nor betray their rank.

They are forked from a fork server, not from the training process. That one holds threads of gloo, NCCL
and OpenMP and, on InfiniBand, registered memory, none of which survives a fork; a forked reader would also
keep the dead rank's sockets open, so that the other ranks would wait for it. The server is a fresh
interpreter that imports this package once; a reader then costs milliseconds and shares the imported code.

Slurm sends a job's signals (the warning before the time limit, preemption) to all its processes. Only
the rank may act on them: it still needs its readers on the way to the checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from types import ModuleType

START_METHOD = "forkserver"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PARENT_CHECK_SECONDS = 1.0


@contextmanager
def starting() -> Iterator[None]:
    """Start reader processes inside this block: the fork server runs, and ``__main__`` is out of sight."""
    _start_server()
    # Python would have every reader import the main module again: for `python -m mvat_dist.train`
    # that is DeepSpeed, several seconds and some 300 MB in each, for a process that only reads audio.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_server() -> None:
    """Start the fork server unless it runs. It and all its children inherit a mask that blocks `_SIGNALS`."""
    multiprocessing.set_forkserver_preload(["mvat_dist.data.stream"])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # starting the tracker unblocks two of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def initialise(worker: int) -> None:  # noqa: ARG001, DataLoader passes the worker's number
    """What a reader does first: follow its rank. (DataLoader itself limits torch to one thread.)"""
    threading.Thread(target=_follow_rank, daemon=True).start()


def _follow_rank() -> None:
    """End this process with its rank, or when the rank says so; all others' signals are swallowed.

    DataLoader's own watch asks for the parent's number, and that is the fork server, which a reader outlived
    by its rank keeps alive.
    """
    rank = multiprocessing.parent_process()
    if rank is None:
        raise RuntimeError("not in a reader process")
    while rank.is_alive():
        received = signal.sigtimedwait(_SIGNALS, _PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == rank.pid:
            break
    # Not sys.exit: the process's feeder thread may hang in a pipe that nobody reads any more.
    os._exit(0)
