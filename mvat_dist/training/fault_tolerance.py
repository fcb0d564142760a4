"""Why a run ends early, and what protects it meanwhile: signals, a watchdog, one writer for its folder.

Signals only set a flag; the ranks agree on it at a step boundary, save together and leave. submitit's own
handler is replaced: it would call `checkpoint()` on rank 0 alone, in the middle of whatever that rank does,
while a save needs every rank.

A rank that hangs lets all others wait for it in a collective. So every rank has a watchdog, a thread that
needs nothing of the others: no collective, no store. Where no step, validation or save has been completed for
the limit, it writes the stacks of all threads to the run's logs and ends the process; the lock and the
checkpoints stay as they are.

No torch: signals are caught before it is imported, which may take a minute from a cold disk.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from mvat_dist import io
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import EXIT_HUNG, UserError
from mvat_dist.runs import status
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.heartbeat import Heartbeat
from mvat_dist.runs.lock import RunLock

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""SIGTERM: preemption and scancel. SIGUSR2: Slurm's warning of the time limit. SIGINT: Ctrl-C."""

_LOCK_SECONDS = 30.0
"""How long to wait for the lock: a job may start while its submission still holds it."""

_CHECKS = 20
"""How often a watchdog looks within its limit."""
_LONGEST_PAUSE = 5.0
_LAST_SECONDS = 20.0
"""For what a rank does before its watchdog ends it; its disk may be what hangs."""


class StopRequest:
    """Remembers that somebody asked this process to stop, and when."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the last signal that asked; 0 where nobody did."""
        self._arrived: float | None = None

    def listen(self) -> None:
        """Take over the signals. A second Ctrl-C ends the process at once; Slurm repeats the others."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        # Python runs a handler only between two of its own instructions, so not while the main thread
        # waits in a collective. The interpreter writes to this socket at once.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), name="signals", daemon=True).start()

    def waited(self) -> float:
        """Seconds since the first signal reached this process; 0 where none has."""
        return time.monotonic() - self._arrived if self._arrived is not None else 0.0

    def _watch(self, receiver: socket.socket) -> None:
        while received := receiver.recv(1):
            if self._arrived is None and received[0] in STOP_SIGNALS:
                self._arrived = time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


class Watchdog(threading.Thread):
    """Ends this process where the training makes no progress for too long."""

    def __init__(self, limit: float, stacks: Path, before_abort: Callable[[str], None]) -> None:
        """Watch from :meth:`start` on.

        Args:
            limit: seconds without progress.
            stacks: the file that gets the stacks of all threads.
            before_abort: called with the reason before the process ends.
        """
        super().__init__(name="watchdog", daemon=True)
        self.limit = limit
        self._stacks = stacks
        self._before_abort = before_abort
        self._pause = min(_LONGEST_PAUSE, limit / _CHECKS)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._idle = 0.0
        self._phase = "starting"
        self._step = 0

    def progress(self, phase: str, step: int) -> None:
        """Something is done; from now on the training is in `phase`, with `step` steps done."""
        with self._lock:
            self._idle, self._phase, self._step = 0.0, phase, step

    def describe(self) -> tuple[int, str, float, float]:
        """Step, phase, seconds since the last progress, and the limit."""
        with self._lock:
            return self._step, self._phase, round(self._idle, 1), self.limit

    def run(self) -> None:
        """Count the time in which nothing is done; not that in which this whole process was suspended."""
        last_look = time.monotonic()
        while not self._ended.wait(self._pause):
            now = time.monotonic()
            with self._lock:
                self._idle += min(now - last_look, 2 * self._pause)
                hung = self._idle >= self.limit
            last_look = now
            if hung:
                self._abort()

    def stop(self) -> None:
        """The training has ended by itself."""
        self._ended.set()

    def _abort(self) -> None:
        step, phase, idle, _ = self.describe()
        reason = (
            f"no step, validation or save was completed for {idle:.0f} s while {phase} after step {step}; "
            f"the stacks are in {self._stacks}"
        )
        reporter = threading.Thread(target=self._report, args=(reason,), daemon=True)
        reporter.start()
        reporter.join(_LAST_SECONDS)
        # Not sys.exit: the main thread hangs, often outside of Python.
        os._exit(EXIT_HUNG)

    def _report(self, reason: str) -> None:
        print(f"error: hung: {reason}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._stacks.parent.mkdir(exist_ok=True)
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        self._before_abort(reason)


class FaultTolerance:
    """Lock and heartbeat of the run's folder on rank 0, a watchdog on every rank."""

    def __init__(self, run: RunDir, ranks: Ranks, limit: float) -> None:
        """Start the watchdog, with a limit of `limit` seconds; :meth:`close` ends it."""
        self._run = run
        self._rank = ranks.rank
        self._lock = RunLock(run.path, "train")
        self._watchdog = Watchdog(limit, run.logs / f"stacks-rank-{ranks.rank}.txt", self._before_abort)
        self._heartbeat: Heartbeat | None = None
        self.progress = self._watchdog.progress
        """``progress(phase, step)``: something is done, the next phase begins."""
        self._watchdog.start()

    def acquire_folder(self) -> str | None:
        """On rank 0, become the only writer of the run's folder.

        Returns:
            The owner, in words, where another living process has it; None on success.
        """
        if owner := self._lock.acquire(patience=_LOCK_SECONDS):
            return str(owner)
        for leftover in io.remove_leftovers(self._run.path):
            logger.info("removed %s, which a killed process had left half written", leftover)
        self._heartbeat = Heartbeat(self._run.path, self._lock.token, self._watchdog.describe)
        self._heartbeat.start()
        return None

    def owns_folder(self) -> bool:
        """On rank 0: whether the folder is still there and still ours."""
        return self._lock.held()

    def lost_folder(self) -> bool:
        """Whether this rank has owned the folder, and does so no more."""
        return self._heartbeat is not None and not self._lock.held()

    def folder_lost_error(self) -> UserError:
        """What to raise where the folder is lost."""
        return UserError(
            f"{self._run.path} was removed or taken over while it was being trained: nothing more is "
            "written there",
            say=self._rank == 0,
        )

    def close(self) -> None:
        """Stop watchdog and heartbeat and release the folder."""
        self._watchdog.stop()
        if self._heartbeat:
            self._heartbeat.stop()
        if self._rank:
            return  # the launcher's token, which all ranks have, would free the lock that rank 0 still needs
        try:
            self._lock.release()
        except OSError as error:
            # Full or gone. Whoever starts next finds that this process is no more.
            logger.warning("the lock of %s could not be released: %s", self._run.path, error)

    def _before_abort(self, reason: str) -> None:
        if self._rank == 0 and self._lock.held():
            status.record_end(self._run, f"hung: {reason}")
            self._lock.release()
