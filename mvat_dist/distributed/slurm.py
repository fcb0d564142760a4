"""Ask Slurm's programs about jobs and have jobs queued again; where there is no Slurm, nothing is known."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mvat_dist.errors import UserError

logger = logging.getLogger(__name__)

MAX_RESTARTS = "MVAT_MAX_RESTARTS"
"""Environment variable: how often a job may ask to be requeued (`mvat_dist.submit --max-restarts`)."""

_DEFAULT_MAX_RESTARTS = 1000

ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
    "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
}  # fmt: skip
"""States from which a job still goes on, or comes back."""

WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
"""Of these, the states in which no process of the job runs."""

_ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Queued:
    """A job as squeue shows it."""

    state: str
    """As in ``squeue -o %T``."""
    reason: str
    """Why it waits."""
    name: str


def queued(job_id: str, *, seconds: float = _ANSWER_SECONDS) -> list[Queued]:
    """The rows of squeue for a job; empty where Slurm has forgotten it.

    Raises:
        UserError: the controller does not answer within `seconds`.
    """
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T\t%r\t%j"]
    told = run(command, seconds=seconds)
    if told.returncode and "Invalid job id" not in told.stderr:
        raise UserError(f"squeue cannot say whether job {job_id} still runs: {one_line(told.stderr)}")
    return [Queued(*line.split("\t", 2)) for line in told.stdout.splitlines()]


def allowed_restarts() -> tuple[int, int]:
    """How often Slurm has restarted this job, and how often it may."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return restarts, int(os.environ.get(MAX_RESTARTS, _DEFAULT_MAX_RESTARTS))


def requeue_after_signal(number: int, *, progressed: bool) -> None:
    """Ask Slurm to queue this job again after its time limit or a preemption; one process asks for all.

    A cancelled job stays ended, and so does one that makes no progress. Slurm requeues a preempted job itself
    only if it does not end within its grace time, which a job that has saved does.

    Args:
        number: the signal that stopped the job.
        progressed: whether this start has made a step.
    """
    job = os.environ["SLURM_JOB_ID"]
    if number != signal.SIGUSR2 and not (number == signal.SIGTERM and _preempted(job)):
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
        record = scontrol("show", "job", job)
    except (OSError, subprocess.SubprocessError):
        return False
    time = re.search(r"\bPreemptTime=(\S+)", record)
    return time is not None and time.group(1) not in {"None", "Unknown"}


def scontrol(*arguments: str) -> str:
    """Return what scontrol prints.

    Raises:
        OSError: there is none here.
        subprocess.SubprocessError: it refused or did not answer.
    """
    done = subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


def run(command: list[str], *, seconds: float = _ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; one that is missing or silent is one that failed."""
    configuration = os.environ.get("SLURM_CONF")
    if configuration and not Path(configuration).exists():  # Slurm would wait a minute for it
        return subprocess.CompletedProcess(
            command, 1, "", f"SLURM_CONF names {configuration}, which is not there"
        )
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def one_line(words: str) -> str:
    """``sbatch: error: a`` and ``sbatch: error: b`` become ``a; b``."""
    lines = [line.split("error: ", 1)[-1].strip() for line in words.splitlines()]
    return "; ".join(line for line in lines if line) or "no reason given"
