"""What rank 0 writes to ``STATUS``: state, progress, why a run stopped, and how often it was restarted.

A start carries over what the starts before it have left: the list of starts and why each ended, and
the slowest step, validation and save, from which follows how long before the time limit the warning
has to come.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from typing import Any

from mvat_dist.errors import EXIT_HUNG, UserError
from mvat_dist.runs import records
from mvat_dist.runs.folder import RunDir, State

logger = logging.getLogger(__name__)

LEAD = "MVAT_SIGNAL_LEAD"
"""Environment variable: seconds before the time limit at which Slurm warns (``--signal=USR2@SECONDS``)."""

LOST = "ended without a word (killed, or its node failed)"

_REST_SECONDS = 5.0
"""Between two notes of mere progress: the flush to disk may take as long as a step."""
_STARTS = 20
"""Starts that STATUS remembers; all are counted."""


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15; the number where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def why(exit_code: int) -> str:
    """What an exit code says about how a process ended."""
    if exit_code == EXIT_HUNG:
        return "hung: a watchdog ended it, see logs/stacks-rank-*.txt"
    if exit_code > 128:
        return f"ended by {signal_name(exit_code - 128)}"
    return f"failed with exit code {exit_code}"


def words_of(error: BaseException) -> str:
    """What STATUS says about an error, in one line."""
    words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return words.strip().partition("\n")[0][:500]


def life() -> dict[str, Any]:
    """The Slurm job of this process and how often it was restarted; empty outside of jobs."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    return {}


def record_end(run: RunDir, reason: str) -> None:
    """Note how a training ended that could not say so itself; one that did is left alone."""
    found = run.read_status()
    if found.get("state") == "running":
        found |= {"state": "failed", "reason": reason, "time": records.now()}
        run.replace_status(found)


class RunState:
    """The run's status as this start of rank 0 knows it."""

    def __init__(self, run: RunDir, steps: int, step: int) -> None:
        """Take over what earlier starts left.

        `steps` is the length of the run, `step` where this start begins.
        """
        before = run.read_status()
        self._run = run
        self._lead = int(os.environ.get(LEAD) or 0)
        self._warned = False
        self._written = -_REST_SECONDS
        self._began = time.monotonic()
        self._first = step
        starts: list[dict[str, Any]] = list(before.get("starts", []))
        if starts:
            starts[-1] |= {"to_step": before["step"], "ended": before.get("reason") or _ended(before)}
        start = {"time": records.now(), "step": step, "host": socket.gethostname(), **life()}
        self.slowest: dict[str, float] = dict(before.get("slowest", {}))
        """Seconds of the slowest step, validation and save of all starts."""
        self._known: dict[str, Any] = {
            "steps": steps,
            "restarts": before.get("restarts", -1) + 1,
            # Starts in a row that began where the one before had begun: nothing was gained.
            "fruitless": before.get("fruitless", 0) + 1 if starts and starts[-1]["step"] >= step else 0,
            "checkpoint": before.get("checkpoint") if step else None,
            "slowest": self.slowest,
            "starts": [*starts, start][-_STARTS:],
            "students": before.get("students", {}),
        }
        self._check_lead()

    def write(self, state: State, step: int, *, at_once: bool = True, **more: Any) -> None:
        """Write STATUS, or where not `at_once` do so within seconds; `more` stays until it is given anew."""
        self._known |= more
        elapsed = time.monotonic() - self._began
        if not at_once and elapsed - self._written < _REST_SECONDS:
            return
        self._written = elapsed
        if step > self._first:
            self._known["steps_per_second"] = (step - self._first) / elapsed
        self._run.write_status(state, step, **self._known)

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is complete."""
        self._known["checkpoint"] = {"step": step, "time": records.now()}

    def took(self, what: str, seconds: float) -> None:
        """Remember the slowest step, validation and save."""
        if seconds > self.slowest.get(what, 0.0):
            self.slowest[what] = round(seconds, 3)
            self._check_lead()

    def _check_lead(self) -> None:
        """Warn once where a warning of the time limit would come too late to save."""
        # It may come when a validation has just begun; a step follows, and only then the save.
        needed = sum(self.slowest.values())
        if self._lead and needed > self._lead and not self._warned:
            self._warned = True
            logger.warning(
                "Slurm warns %d s before the time limit, but the slowest step, validation and save take "
                "%.0f s together (%s): submit with --signal-delay %d, or sbatch --signal=USR2@%d",
                self._lead,
                needed,
                ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.slowest.items()),
                *[round(2 * needed)] * 2,
            )


def _ended(before: dict[str, Any]) -> str:
    return LOST if before["state"] == "running" else str(before["state"])
