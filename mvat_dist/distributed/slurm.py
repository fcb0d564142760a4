"""Ask Slurm's programs about jobs; without Slurm there is an answer too, namely none."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mvat_dist.errors import UserError

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
