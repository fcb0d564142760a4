"""End a training that no longer gets on: a rank that hangs lets all others wait for it in a collective.

Every rank has a watchdog of its own, a thread that needs nothing of the others: no collective, no
store. Where no step, validation or save has been completed for the limit, it writes the stacks of all
threads to the run's logs and ends the process; the lock and the checkpoints are as they were.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mvat_dist.errors import EXIT_HUNG

_CHECKS = 20
"""Per limit."""
_LONGEST_PAUSE = 5.0
_LAST_WORDS_SECONDS = 20.0
"""For what a rank does before it ends; its disk may be what hangs."""


class Watchdog(threading.Thread):
    """Knows what the training is at, and for how long it has been."""

    def __init__(self, limit: float, stacks: Path, last_words: Callable[[str], None]) -> None:
        """Begin with :meth:`start`.

        Args:
            limit: seconds.
            stacks: the file that gets the stacks.
            last_words: called with the reason before the process ends.
        """
        super().__init__(name="watchdog", daemon=True)
        self.limit = limit
        self._stacks = stacks
        self._last_words = last_words
        self._pause = min(_LONGEST_PAUSE, limit / _CHECKS)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._idle = 0.0
        self._phase = "starting"
        self._step = 0

    def progress(self, phase: str, step: int) -> None:
        """Something is done; from now on the training is at `phase`, with `step` steps done."""
        with self._lock:
            self._idle, self._phase, self._step = 0.0, phase, step

    def describe(self) -> tuple[int, str, float, float]:
        """Step, phase, seconds since the last progress, and the limit."""
        with self._lock:
            return self._step, self._phase, round(self._idle, 1), self.limit

    def run(self) -> None:
        """Count the time in which nothing is done; not that in which this whole process was suspended."""
        before = time.monotonic()
        while not self._ended.wait(self._pause):
            now = time.monotonic()
            with self._lock:
                self._idle += min(now - before, 2 * self._pause)
                hung = self._idle >= self.limit
            before = now
            if hung:
                self._bark()

    def stop(self) -> None:
        """The training has ended by itself."""
        self._ended.set()

    def _bark(self) -> None:
        step, phase, idle, _ = self.describe()
        reason = (
            f"no step, validation or save was completed for {idle:.0f} s while {phase} after step {step}; "
            f"the stacks are in {self._stacks}"
        )
        speaker = threading.Thread(target=self._speak, args=(reason,), daemon=True)
        speaker.start()
        speaker.join(_LAST_WORDS_SECONDS)
        # Not sys.exit: the main thread hangs, often outside of Python.
        os._exit(EXIT_HUNG)

    def _speak(self, reason: str) -> None:
        print(f"error: hung: {reason}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._stacks.parent.mkdir(exist_ok=True)
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        self._last_words(reason)
