"""Ask Slurm's programs about jobs and nodes, and have a job queued again: the one module that calls them.

No torch: login nodes and the scripts of jobs use it too. Where a program is missing or Slurm does not
answer, functions say so in their result unless they raise; most containers have no programs of Slurm.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mvat_dist.errors import UserError

logger = logging.getLogger(__name__)

ACTIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
    "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
}  # fmt: skip
"""States from which a job still goes on, or comes back."""

WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
"""Of these, the states in which no process of the job runs."""

MAX_RESTARTS = "MVAT_MAX_RESTARTS"
"""Environment variable: how often a job may ask to be queued again (`mvat_dist.submit --max-restarts`)."""

_DEFAULT_MAX_RESTARTS = 1000
_ANSWER_SECONDS = 60.0
_NO_CONFIGURATION = "Could not establish a configuration source"


# ------------------------------------------------------------------------------------ the state of a job


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
    answer = run(command, seconds=seconds)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"squeue cannot say whether job {job_id} still runs: {one_line(answer.stderr)}")
    return [Queued(*line.split("\t", 2)) for line in answer.stdout.splitlines()]


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job, in the queue or after it."""

    state: str
    """As in ``squeue -o %T``; UNKNOWN where Slurm has forgotten the job."""
    reason: str = ""
    """Why it waits."""
    exit_code: int | None = None
    """Of the job's script, where accounting tells."""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def job_state(job_id: str, job_name: str) -> JobState:
    """The state of the job of that number and name.

    The name is compared because numbers start again where a cluster is set up anew.

    Raises:
        UserError: the controller does not answer.
    """
    state = JobState("UNKNOWN")
    for row in queued(job_id):
        if row.name == job_name:
            state = JobState(row.state, row.reason)
    if state.active:
        return state
    columns = "--format=State,ExitCode,JobName"
    answer = run(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={job_id}", columns])
    for ended, code, name in (line.split("|", 2) for line in answer.stdout.splitlines()):
        if name == job_name:
            returned, ended_by = (int(number) for number in code.split(":"))
            return JobState(ended.split()[0], exit_code=returned or (128 + ended_by if ended_by else 0))
    return state


def job_fields(job_id: str) -> dict[str, str]:
    """The ``Key=Value`` fields of ``scontrol show job``; empty where it cannot say."""
    answer = run(["scontrol", "show", "job", job_id])
    if answer.returncode:
        return {}
    # The number of an array is that of one of its jobs too: Slurm shows all of them.
    records = [dict(re.findall(r"(?<!\S)(\w+)=(\S*)", text)) for text in answer.stdout.split("\n\n")]
    return next((fields for fields in records if fields.get("JobId") == job_id), records[0])


def was_preempted(job_id: str) -> bool:
    """Whether Slurm has asked this job to make room; scancel sends the same signal."""
    return job_fields(job_id).get("PreemptTime", "None") not in {"None", "Unknown"}


# ------------------------------------------------------------------------------------- what a job may do


def allowed_restarts() -> tuple[int, int]:
    """How often Slurm has restarted the job of this process, and how often it may."""
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
    if number != signal.SIGUSR2 and not (number == signal.SIGTERM and was_preempted(job)):
        return
    restarts, allowed = allowed_restarts()
    if not progressed or restarts >= allowed:
        why = f"{restarts} restarts of {allowed}" if progressed else "it made no step"
        logger.warning("the state is saved; job %s is not requeued: %s", job, why)
    elif refusal := requeue(job):
        logger.warning("the state is saved, but job %s could not be requeued: %s", job, refusal)


def requeue(job_id: str) -> str | None:
    """Have a running job queued again; None where Slurm agreed, else why not (some sites forbid it)."""
    answer = run(["scontrol", "requeue", job_id])
    return one_line(answer.stderr) if answer.returncode else None


def signal_steps(job_id: str, number: int) -> None:
    """Have Slurm send a signal to every rank of a job; its batch script does not get it."""
    run(["scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", job_id])


# ----------------------------------------------------------------------------------------- the cluster


def why_unavailable() -> str | None:
    """None where a Slurm cluster answers; else why there is none, for ``--cluster auto``.

    Raises:
        UserError: there is a cluster, but it does not answer; training on its login node is no substitute.
    """
    if not (shutil.which("sbatch") and shutil.which("srun")):
        return "no Slurm here"
    answer = run(["scontrol", "ping"])
    if "is UP" in answer.stdout:
        return None
    if _NO_CONFIGURATION in answer.stderr:
        return "Slurm's programs are here, but no cluster is configured"
    raise UserError(
        f"Slurm is configured but does not answer ({one_line(answer.stderr or answer.stdout)}): "
        "try again when it does, or choose --cluster local"
    )


def host_names(node_list: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Slurm's own reading of a node list like ``gpu[01-03,7]``; empty where it cannot be asked."""
    answer = run(["scontrol", "show", "hostnames", node_list], environ=environ)
    return [] if answer.returncode else answer.stdout.split()


def node_address(host: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The address by which Slurm reaches a node; None where it cannot be asked."""
    answer = run(["scontrol", "show", "node", host], environ=environ)
    address = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return address[1] if address and not answer.returncode else None


# ---------------------------------------------------------------------------------------- its programs


def run(
    command: list[str], *, seconds: float = _ANSWER_SECONDS, environ: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; one that is missing or silent counts as one that failed."""
    configuration = environ.get("SLURM_CONF")
    if configuration and not Path(configuration).exists():  # Slurm would wait a minute for it
        reason = f"SLURM_CONF names {configuration}, which is not there"
        return subprocess.CompletedProcess(command, 1, "", reason)
    try:
        return subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def one_line(words: str) -> str:
    """``sbatch: error: a`` and ``sbatch: error: b`` become ``a; b``."""
    lines = [line.split("error: ", 1)[-1].strip() for line in words.splitlines()]
    return "; ".join(line for line in lines if line) or "no reason given"
