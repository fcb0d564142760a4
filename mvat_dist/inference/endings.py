"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is half written is removed."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)

TIDY_SECONDS = 5.0
"""In which what is half written is removed."""


class Ended(SystemExit):
    """The process was asked to end; its code is 128 + the signal, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class _Handler:
    """Raises `Ended` in the main thread.

    Not again while it tidies up: systemd sends SIGHUP right after SIGTERM. Later it does, as an exception
    that falls into a finaliser is lost.
    """

    def __init__(self) -> None:
        self._raised = -math.inf

    def __call__(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._raised > TIDY_SECONDS:
            self._raised = now
            raise Ended(number)


handler = _Handler()


@contextmanager
def clean_end() -> Iterator[None]:
    """Within it, `SIGNALS` raise `Ended`; those that are ignored stay so, as under ``nohup``."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no thread but the main one can have handlers
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number, its in before.items() if its != signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, handler)
        yield
    except Ended as ended:
        with suppress(OSError):  # of a terminal that has hung up
            print(f"ended by {signal.Signals(ended.number).name}", file=sys.stderr)
        raise
    finally:
        for number in heeded:
            signal.signal(number, before[number])
