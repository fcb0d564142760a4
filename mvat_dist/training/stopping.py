"""Signals only set a flag; ranks agree on it at a step boundary, save together and leave.

submitit's own handler is replaced: it would call `checkpoint()` on rank 0 alone, in the middle of
whatever the rank is doing, while a save needs every rank.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from types import FrameType

from mvat_dist.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

MAX_RESTARTS = "MVAT_MAX_RESTARTS"
"""Environment variable: how often a job may ask to be requeued (`mvat_dist.submit --max-restarts`)."""

_DEFAULT_MAX_RESTARTS = 1000

# SIGTERM: preemption and scancel. SIGUSR2: Slurm's warning of the time limit. SIGINT: Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Remembers that somebody asked this process to stop, and when."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the last signal that asked; 0 where nobody did."""
        self._arrived: float | None = None

    def listen(self) -> None:
        """Take over the signals. A second Ctrl-C ends the process at once; Slurm repeats the others."""
        for number in _SIGNALS:
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
            if self._arrived is None and received[0] in _SIGNALS:
                self._arrived = time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def allowed_restarts() -> tuple[int, int]:
    """How often Slurm has restarted this job, and how often it may."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(
        os.environ.get(MAX_RESTARTS, _DEFAULT_MAX_RESTARTS)
    )


def requeue(reason: int, ranks: Ranks, *, progressed: bool) -> None:
    """Ask Slurm for the job again after its time limit or a preemption. Rank 0 asks, for all.

    A cancelled job must stay ended, and so must one that gets no further. Slurm requeues a preempted
    job itself only if it does not end in its grace time, which a job that has saved does.

    Args:
        reason: the signal on which the ranks agreed.
        ranks: this process's place.
        progressed: whether this start has made a step.
    """
    if ranks.launcher == "slurm" and ranks.rank == 0:
        requeue_job(reason, progressed=progressed)


def requeue_job(reason: int, *, progressed: bool) -> None:
    """`requeue`, by the one process that asks for the job in which it runs."""
    job = os.environ["SLURM_JOB_ID"]
    wanted = reason == signal.SIGUSR2 or (reason == signal.SIGTERM and _preempted(job))
    if not wanted:
        return
    restarts, allowed = allowed_restarts()
    if not progressed or restarts >= allowed:
        why = f"{restarts} restarts of {allowed}" if progressed else "it made no step"
        logger.warning("the state is saved; job %s is not requeued: %s", job, why)
        return
    try:
        scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        # No scontrol in most containers, and some sites forbid it.
        logger.warning("the state is saved, but job %s could not be requeued: %s", job, error)


def _preempted(job: str) -> bool:
    """Whether Slurm has asked this job to make room; scancel sends the same signal."""
    try:
        told = scontrol("show", "job", job)
    except (OSError, subprocess.SubprocessError):
        return False
    found = re.search(r"\bPreemptTime=(\S+)", told)
    return found is not None and found.group(1) not in {"None", "Unknown"}


def scontrol(*arguments: str) -> str:
    """What scontrol prints.

    Raises:
        OSError: there is none here.
        subprocess.SubprocessError: it refused or did not answer.
    """
    done = subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout
