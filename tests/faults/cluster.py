"""Faults that need the Slurm of ``slurm/devcluster.sh``: it strikes while the ranks are held at a moment."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from mvat_dist.distributed.slurm import job_state
from mvat_dist.launch import submission
from mvat_dist.runs.folder import RunDir
from tests.conftest import REPOSITORY
from tests.faults.group import STUDENTS, TIMING, Bench, assert_same
from tests.faults.matrix import Moment, Outcome, cannot, fault
from tests.faults.processes import MissedError, await_rows, lives, pending, rows, send, until
from tests.wandb_runs import rows_of, same_rows

_TO_SAVED = "seconds from signal to saved state"

BEFORE, MIDDLE, LAST = Moment.BEFORE, Moment.MIDDLE, Moment.LAST


def slurm(*command: str) -> str:
    """What one of Slurm's programs prints; it has to succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def shown(job: str, field: str) -> str:
    """A field of ``scontrol show job``."""
    found = re.search(rf"\b{field}=(\S*)", slurm("scontrol", "show", "job", job))
    assert found is not None, field
    return found[1]


class Job:
    """A run on two nodes, one rank each, that can be held at a step."""

    def __init__(self, bench: Bench, run: RunDir, *more: str) -> None:
        if "SLURM_CONF" not in os.environ:
            cannot("no cluster: start one with slurm/devcluster.sh up")
        self.run = run
        started = bench.start(run, "--cluster=slurm", "--time=10", *more, variables={"WANDB_MODE": "offline"})
        started.ended(0)
        self.number: str = json.loads(run.job.read_text())["job_id"]
        self.ranks: dict[int, int] = {}

    def alive(self) -> bool:
        return job_state(self.number, submission.job_name(self.run)).active

    def hold_after(self, step: int) -> None:
        """Stop all ranks when `step` steps are recorded and the next one is not."""
        until(self._ranks_run, "the ranks run", pause=0.1)
        until(lambda: rows(self.run) > 0 or step == 0, "a first step", pause=0.005)
        await_rows(self.run, step, lambda: all(lives(pid) for pid in self.ranks.values()))
        send(list(self.ranks.values()), signal.SIGSTOP)
        if rows(self.run) != step:
            slurm("scancel", self.number)
            send(list(self.ranks.values()), signal.SIGCONT)
            self.await_end()
            raise MissedError(f"step {rows(self.run)} instead of {step}")

    def _ranks_run(self) -> bool:
        assert self.alive(), self.log()
        self.ranks = ranks_of(self.number)
        return len(self.ranks) == 2

    def release(self) -> None:
        send(list(self.ranks.values()), signal.SIGCONT)

    def await_signal(self, number: int) -> None:
        """Wait until a signal of Slurm's has reached both ranks; Slurm wakes those that it ends."""

        def arrived() -> bool:
            try:
                return all(pending(pid, number) for pid in self.ranks.values())
            except FileNotFoundError:
                return True

        until(lambda: arrived() or (rows(self.run) > 0 and not self._held()), f"signal {number}")

    def _held(self) -> bool:
        return all(" T" in Path(f"/proc/{pid}/stat").read_text()[:60] for pid in self.ranks.values())

    def await_end(self) -> None:
        until(lambda: not self.alive(), f"job {self.number} ends", pause=0.3)

    def log(self) -> str:
        file = self.run.submitit / f"{self.number}_0_log.out"
        return file.read_text()[-3000:] if file.exists() else "no log yet"

    def came_back(self) -> None:
        """Wait until Slurm has queued the job again."""
        until(lambda: shown(self.number, "Restarts") == "1", f"job {self.number} is queued again", pause=0.2)

    def went_on(self, bench: Bench, starts: int) -> None:
        """The job came back by itself, once; with so many starts more the run ends as the undisturbed one."""
        self.came_back()
        self.await_end()
        status = self.run.read_status()
        assert status["state"] == "finished", f"{status}\n{self.log()}"
        assert shown(self.number, "Restarts") == "1", self.log()
        assert status["restarts"] == starts, status["starts"]
        assert_same(self.run, bench.undisturbed)
        # The starts' W&B runs of a student have one id, and together every row once: `wandb sync` joins them.
        for student in STUDENTS:
            run_id = self.run.history(student).with_suffix(".wandb-id").read_text().strip()
            logs = sorted(self.run.path.glob(f"wandb/offline-run-*-{run_id}/*.wandb"))
            same_rows(
                [row for log in logs for row in rows_of(log)], self.run.history(student), but_for=TIMING
            )


def ranks_of(job: str) -> dict[int, int]:
    """Process ids of a job's ranks; the nodes of the development cluster are this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"submitit.core._submit" not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        variables = dict(word.split(b"=", 1) for word in words if b"=" in word)
        if variables.get(b"SLURM_JOB_ID") == job.encode() and b"SLURM_PROCID" in variables:
            found[int(variables[b"SLURM_PROCID"])] = int(folder.name)
    return found


def _struck(bench: Bench, run: RunDir, moment: Moment, strike: Callable[[Job], None]) -> Outcome:
    """Hold the ranks, have Slurm signal them, release them, and see the job come back by itself."""
    job = Job(bench, run, "--signal-delay=30")
    job.hold_after(moment.step)
    strike(job)
    job.release()
    until(lambda: run.read_status().get("state") in {"stopped", "finished"}, "it has stopped", pause=0.02)
    told = run.read_status()
    if moment is LAST:  # nothing to stop: it is through
        job.await_end()
        assert told["state"] == "finished"
        assert_same(run, bench.undisturbed)
        return Outcome("finished all the same")
    assert moment.step <= told["step"] <= moment.step + 2
    job.went_on(bench, 1)
    return Outcome("came back by itself, same end", {_TO_SAVED: told["signal"]["seconds_to_saved"]})


@fault("preempted by a partition of higher priority", ci=[MIDDLE], slurm=True)
def preempted(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    def strike(job: Job) -> None:
        flags = ["--job-name=mvat-urgent", "--partition=urgent", "--nodes=4", "--cpus-per-task=8"]
        slurm("sbatch", "--parsable", *flags, "--output=/dev/null", "--wrap=true")
        job.await_signal(signal.SIGTERM)

    return _struck(bench, run, moment, strike)


@fault("time limit", ci=[BEFORE], slurm=True)
def time_limit(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    def strike(job: Job) -> None:
        # 29 s before the end, Slurm owes its warning of 30 s before.
        slurm("scontrol", "update", f"JobId={job.number}", "EndTime=now+29seconds")
        job.await_signal(signal.SIGUSR2)

    return _struck(bench, run, moment, strike)


@fault("scontrol requeue", ci=[MIDDLE], slurm=True)
def requeued(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    job = Job(bench, run)
    job.hold_after(moment.step)
    slurm("scontrol", "requeue", job.number)
    job.release()
    job.came_back()
    job.went_on(bench, 0 if moment is LAST else 1)
    return Outcome(
        "finished all the same; the new start finds nothing to do" if moment is LAST else "same end"
    )


@fault("slurmd of one node killed", ci=[LAST], slurm=True)
def node_lost(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    job = Job(bench, run)
    job.hold_after(moment.step)
    rank = 0 if moment is MIDDLE else 1
    words = Path(f"/proc/{job.ranks[rank]}/environ").read_bytes().split(b"\0")
    node = next(word for word in words if word.startswith(b"SLURMD_NODENAME=")).decode().partition("=")[2]
    daemon = Path(os.environ["SLURM_CONF"]).parent / "run" / f"{node}.pid"
    try:
        send([int(daemon.read_text())], signal.SIGKILL)
        # As the controller does by itself when it has not heard from the node for SlurmdTimeout.
        slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")
        job.release()
        job.came_back()
        job.await_end()
        assert_same(run, bench.undisturbed)
        assert run.read_status()["restarts"] <= 1, run.read_status()
    finally:
        script = REPOSITORY / "slurm" / "devcluster.sh"
        subprocess.run([script, "up"], check=True, capture_output=True, timeout=200)
    return Outcome(f"rank {rank} was there: came back on other nodes, same end")
