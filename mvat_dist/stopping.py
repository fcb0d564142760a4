"""Signals only set a flag; ranks agree on it at a step boundary, save together and leave.

submitit's own handler is replaced: it would call `checkpoint()` on rank 0 alone, in the middle of
whatever the rank is doing, while a save needs every rank.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from types import FrameType

from mvat_dist.ranks import Ranks

logger = logging.getLogger(__name__)

MAX_RESTARTS = "MVAT_MAX_RESTARTS"
"""Environment variable: how often a job may ask to be requeued (`mvat_dist.submit --max-restarts`)."""

_DEFAULT_MAX_RESTARTS = 1000

# SIGTERM: preemption and scancel. SIGUSR2: Slurm's warning of the time limit. SIGINT: Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Remembers that somebody asked this process to stop."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the last signal that asked; 0 where nobody did."""

    def listen(self) -> None:
        """Take over the signals. A second Ctrl-C ends the process at once; Slurm repeats the others."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def requeue(reason: int, ranks: Ranks, *, progressed: bool) -> None:
    """Ask Slurm for the job again after its time limit or a preemption. Rank 0 asks, for all.

    A cancelled job must stay ended, and so must one that gets no further. Slurm requeues a preempted
    job itself only if it does not end in its grace time, which a job that has saved does.

    Args:
        reason: the signal on which the ranks agreed.
        ranks: this process's place.
        progressed: whether this start has made a step.
    """
    if ranks.launcher != "slurm" or ranks.rank != 0:
        return
    job = os.environ["SLURM_JOB_ID"]
    wanted = reason == signal.SIGUSR2 or (reason == signal.SIGTERM and _preempted(job))
    if not wanted:
        return
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    allowed = int(os.environ.get(MAX_RESTARTS, _DEFAULT_MAX_RESTARTS))
    if not progressed or restarts >= allowed:
        why = f"{restarts} restarts of {allowed}" if progressed else "it made no step"
        logger.warning("the state is saved; job %s is not requeued: %s", job, why)
        return
    try:
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        # No scontrol in most containers, and some sites forbid it.
        logger.warning("the state is saved, but job %s could not be requeued: %s", job, error)


def _preempted(job: str) -> bool:
    """Whether Slurm has asked this job to make room; scancel sends the same signal."""
    try:
        told = _scontrol("show", "job", job)
    except (OSError, subprocess.SubprocessError):
        return False
    found = re.search(r"\bPreemptTime=(\S+)", told)
    return found is not None and found.group(1) not in {"None", "Unknown"}


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout
