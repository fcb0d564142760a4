"""Reader processes that are safe beside a process group, and that neither outlive nor betray their rank.

They are forked from a fork server, not from the training process. That one holds threads of gloo, NCCL
and OpenMP and, on InfiniBand, registered memory, none of which survives a fork; a forked reader would also
keep the dead rank's sockets open, so that the other ranks would wait for it. The server is a fresh
interpreter that imports this package once; a reader then costs milliseconds and shares the imported code.

Slurm sends a job's signals (the warning before the time limit, preemption) to all its processes. Only
the rank may act on them: it still needs its readers on the way to the checkpoint. The same holds for the
workers of `mvat_dist.data.pool`, which shares what is said here of signals.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from types import ModuleType

START_METHOD = "forkserver"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""The parent's to act on, though all its children get them."""
_PARENT_CHECK_SECONDS = 1.0
_main_module_lock = threading.RLock()
"""Held while ``__main__`` is replaced: pools start workers from threads of their own."""


@contextmanager
def starting() -> Iterator[None]:
    """Start reader processes inside this block: the fork server runs, and ``__main__`` is out of sight."""
    _start_server()
    with main_module_hidden():
        yield


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Keep processes that are started inside this block from importing the main module again.

    For `python -m mvat_dist.train` that is DeepSpeed: several seconds and some 300 MB in each process.
    """
    with _main_module_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _start_server() -> None:
    """Start the fork server unless it runs."""
    multiprocessing.set_forkserver_preload(["mvat_dist.data.loader"])
    with signals_blocked():
        forkserver.ensure_running()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block `SIGNALS` in this thread; what it starts meanwhile, and all its children, inherit that."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # starting the tracker unblocks two of them
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def initialise(worker: int) -> None:  # noqa: ARG001, DataLoader passes the worker's number
    """What a reader does first: follow its rank. (DataLoader itself limits torch to one thread.)"""
    follow_parent()


def follow_parent(cleanup: Callable[[], object] | None = None) -> None:
    """End this process, whose `SIGNALS` are blocked, with its parent, or when the parent says so.

    Args:
        cleanup: called before that, in a thread.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # of a worker that was started later than the first
    threading.Thread(target=_follow, args=(cleanup,), daemon=True).start()


def _follow(cleanup: Callable[[], object] | None) -> None:
    """Wait for the parent's end or its signal; all others' signals are swallowed.

    DataLoader's own watch asks for the parent's number, and that is the fork server, which a reader outlived
    by its rank keeps alive.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("not in a child process")
    while parent.is_alive():
        received = signal.sigtimedwait(SIGNALS, _PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break
    try:
        if cleanup is not None:
            cleanup()
    finally:
        # Not sys.exit: the process's feeder thread may hang in a pipe that nobody reads any more.
        os._exit(0)
