"""A job's script calls this after its ranks: record their end, and queue the job again if that helps.

    python -m mvat_dist.launch.requeue EXIT_CODE TRAINING_OPTIONS...

Signals that ask to stop are the trainer's matter (`slurm.requeue_after_signal`), once it has begun. This is
for ends of which the trainer cannot speak: a rank killed or out of memory, a hang that its watchdog ended, a
crash. A job comes back while it gets on, and a few times, ever later, while it does not. No torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from mvat_dist.config import parser
from mvat_dist.distributed import slurm
from mvat_dist.errors import EXIT_BUSY, EXIT_USER_ERROR, UserError, exit_code
from mvat_dist.runs import lock, status
from mvat_dist.runs.folder import RunDir, run_folder

FRUITLESS = 3
"""Restarts in a row that may begin at the same checkpoint."""

_BACK_OFF_SECONDS = (0.0, 20.0, 60.0)
"""Seconds to wait before a restart, by the fruitless ones so far; short, because the job keeps its nodes."""

# 0: finished. 2 and 3: a restart would meet the same mistake, or the same owner.
_SETTLED = {0, EXIT_USER_ERROR, EXIT_BUSY}
_ASKED = {128 + number for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}

_USAGE = """usage: python -m mvat_dist.launch.requeue EXIT_CODE TRAINING_OPTIONS...

A job's script calls it when the ranks have ended with EXIT_CODE.

example:
  python -m mvat_dist.launch.requeue 137 --config runs/students/config.yaml"""


def main(argv: list[str] | None = None) -> None:
    """Decide for the job in whose script this runs.

    Raises:
        UserError: no exit code, or options that the trainer does not know.
    """
    given = sys.argv[1:] if argv is None else argv
    if given[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    if not given or not given[0].isdecimal():
        raise UserError("give the exit code of the ranks first: python -m mvat_dist.launch.requeue --help")
    code = int(given[0])
    if code in _SETTLED:
        return
    config = parser.parse(given[1:], prog="python -m mvat_dist.launch.requeue")
    run = RunDir(run_folder(config))
    if code in _ASKED and _begun(run.read_status()):
        return
    ended = f"the ranks ended with exit code {code}"
    if _superseded():
        print(f"{ended}: the job was started again in the meantime")
        return
    outcome, wait = _settle(run, code)
    job = os.environ.get("SLURM_JOB_ID")
    if outcome is None:
        outcome = _again(job, wait) if job else "this is no job, start it again yourself"
    print(f"{ended}: {outcome}")


def _settle(run: RunDir, code: int) -> tuple[str | None, float]:
    """Record how the run ended, and return what `decide` says of it."""
    owner = lock.holder(run.path)
    if owner and owner.job != os.environ.get("SLURM_JOB_ID", "") and not lock.why_gone(owner):
        return f"{run.path} is trained by {owner}", 0.0
    status.record_end(run, status.why(code))
    record = run.read_status()
    if run.path.is_dir() and not _begun(record):
        record = {"step": 0, **record, "state": "failed", "reason": status.why(code)}
        run.replace_status({**record, "fruitless": _fruitless(record)})
    return decide(record)


def _superseded() -> bool:
    """Whether the job has been started again since: on a node that Slurm gave up, the old script goes on."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    times = slurm.job_fields(os.environ["SLURM_JOB_ID"]).get("Restarts", "0")
    return int(times) > slurm.allowed_restarts()[0]


def decide(record: dict[str, Any]) -> tuple[str | None, float]:
    """Decide whether a job is queued again, from the run's STATUS.

    Returns:
        The reason why not, or None where it is queued again; and the seconds to wait before that.
    """
    restarts, allowed = slurm.allowed_restarts()
    if record.get("state") == "finished":
        return "the run is finished", 0.0
    if restarts >= allowed:
        return f"not queued again after {restarts} restarts of {allowed}", 0.0
    fruitless = _fruitless(record)
    if fruitless > FRUITLESS:
        return f"not queued again: {fruitless} starts in a row ended without a new checkpoint", 0.0
    return None, _BACK_OFF_SECONDS[max(0, fruitless - 1)]


def _begun(record: dict[str, Any]) -> bool:
    """Whether this start of the job got as far as to record itself."""
    starts: list[dict[str, Any]] = record.get("starts", [])
    return bool(starts) and status.life().items() <= starts[-1].items()


def _fruitless(record: dict[str, Any]) -> int:
    """How many starts in a row, up to this one, have ended without a new checkpoint."""
    saved = record.get("checkpoint")
    if _begun(record) and saved and saved["step"] > record["starts"][-1]["step"]:
        return 0
    return int(record.get("fruitless", 0)) + 1


def _again(job: str, wait: float) -> str:
    """Have the job queued again unless it is being cancelled, and return what came of it in words."""
    time.sleep(wait)
    state = slurm.job_fields(job).get("JobState", "unknown")
    if state != "RUNNING":
        return f"job {job} is {state} and is not queued again"
    if refused := slurm.requeue(job):
        return f"job {job} could not be queued again: {refused}"
    return f"job {job} is queued again"


if __name__ == "__main__":
    sys.exit(exit_code(main))
