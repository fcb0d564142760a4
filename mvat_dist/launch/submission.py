"""Start a run once: a second start of the same run finds the first one and does nothing.

The tasks that fill a teacher cache are submitted here too.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvat_dist.config import parser
from mvat_dist.config.schema import Config
from mvat_dist.distributed import slurm
from mvat_dist.distributed.slurm import JobState
from mvat_dist.errors import EXIT_BUSY, EXIT_USER_ERROR, UserError
from mvat_dist.io import read_record, write_json
from mvat_dist.launch import processes
from mvat_dist.launch.slurm import Command, Executor, Resources, code_fingerprint
from mvat_dist.runs import records, status
from mvat_dist.runs.folder import RunDir, changed_keys
from mvat_dist.runs.lock import INHERITED, Purpose, RunLock
from mvat_dist.runs.records import JobRecord

_LOCK_SECONDS = 10.0
"""How long to wait for the lock, which another submission holds for a moment only."""

_ACCOUNTING_SECONDS = 15.0
"""How long accounting may lag behind the controller."""

_SILENCES = 20
"""Questions in a row that Slurm may leave unanswered while we wait for a job."""


def job_name(run: RunDir) -> str:
    """The job's name in squeue."""
    return _clean(f"mvat-{run.path.name}")


def _clean(name: str) -> str:
    """The name of a job in characters that sacct gives back unchanged."""
    return re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)


def locally(run: RunDir, config: Config, argv: list[str], resources: Resources) -> int:
    """Train in processes of this machine and return the exit code, 0 only for a finished run."""
    if _finished(run, config):
        return 0
    if job := _active_job(run):
        print(f"a job trains this run: nothing new was started\n{_follow(run, job)}")
        return EXIT_BUSY
    with _alone_in(run, "train") as (lock, is_new):
        if lock is None:
            return EXIT_BUSY
        if _finished(run, config):  # by another start, while this one waited for the lock
            return 0
        _record(run, argv, resources, cluster="local", pid=os.getpid())
        sys.stdout.flush()
        command = [sys.executable, "-m", "mvat_dist.train", *argv]
        os.environ[INHERITED] = lock.token
        try:
            code = processes.run_ranks(command, resources.processes, run.logs)
        finally:
            del os.environ[INHERITED]
        if code not in {0, EXIT_BUSY}:
            status.record_end(run, status.why(code))
        if is_new and code == EXIT_USER_ERROR and not run.status.exists():
            # Nothing was trained: leave nothing that looks like a run.
            for file in [run.job, *run.logs.glob("rank-*.log")]:
                file.unlink()
            with contextlib.suppress(OSError):
                run.logs.rmdir()
        return code


def on_slurm(run: RunDir, config: Config, resources: Resources) -> tuple[int, str | None]:
    """Submit the run, unless it is finished, queued or running.

    Returns:
        The exit code (`EXIT_BUSY` where a process of some machine trains the run without a job), and the
        number of the run's job (None where it has none).

    Raises:
        UserError: Slurm refused the job, or the run's job has another configuration.
    """
    if _finished(run, config):
        return 0, None
    job = _active_job(run)
    if job is None:
        with _alone_in(run, "start") as (lock, _):
            if _finished(run, config):
                return 0, None
            # Another submission may have been faster, and its job may train already.
            job = _active_job(run)
            if job is None:
                if lock is None:
                    return EXIT_BUSY, None
                job = _submit(run, config, resources)
                print(_follow(run, job))
                return 0, job
    _refuse_other_configuration(run, config, job)
    print("this run is in the queue already; nothing new was submitted")
    print(_follow(run, job))
    return 0, job


def _refuse_other_configuration(run: RunDir, config: Config, job: str) -> None:
    """Refuse to answer with a job that has another configuration than was asked for.

    Raises:
        UserError: with every key that differs.
    """
    differing = changed_keys(parser.parse(["--config", str(run.config)]), config)
    if differing:
        raise UserError(
            f"job {job} has {run.path} with another configuration ({', '.join(differing)}): "
            f"scancel {job} first, or choose another --name"
        )


def _command(run: RunDir) -> Command:
    """What every rank of the job runs."""
    return Command("mvat_dist.train", ["--config", str(run.config)])


def _executor(run: RunDir, resources: Resources) -> Executor:
    # A rank that was killed cannot have the job queued again, nor say how it ended.
    requeue = f'{shlex.quote(sys.executable)} -m mvat_dist.launch.requeue "$code" '
    requeue += shlex.join(_command(run).argv)
    after = ["code=$?", requeue, 'exit "$code"']
    return Executor(run.submitit, job_name(run), resources, after=after, requeues_itself=True)


def job_script(run: RunDir, resources: Resources) -> str:
    """The text that sbatch would get."""
    return _executor(run, resources).script()


def _submit(run: RunDir, config: Config, resources: Resources) -> str:
    """Submit the job and return its number; a refused one leaves no file behind."""
    command, executor = _command(run), _executor(run, resources)
    files = set(run.path.iterdir())
    # The job reads the resolved configuration: the user may edit the original while the job waits.
    run.create(config)
    try:
        [job] = executor.submit(command)
    except UserError:
        for path in set(run.path.iterdir()) - files:
            if path.is_file():
                path.unlink()
        raise
    _record(run, command.argv, resources, cluster="slurm", job_id=job, job_name=job_name(run))
    return job


def _record(run: RunDir, argv: list[str], resources: Resources, **where: Any) -> None:
    """Write how the run was started."""
    record = JobRecord(
        host=socket.gethostname(),
        time=records.now(),
        nodes=resources.nodes,
        tasks_per_node=resources.tasks_per_node,
        argv=argv,
        code=code_fingerprint(),
        **where,
    )
    write_json(run.job, asdict(record))


def _finished(run: RunDir, config: Config) -> bool:
    """Whether the run has done all its steps; if so, print it."""
    if not run.finished(config):
        return False
    print(f"this run is finished ({config.train.steps} steps): nothing to do")
    return True


def _active_job(run: RunDir) -> str | None:
    """Number of the Slurm job that waits for this run or trains it, if there is one.

    Raises:
        UserError: there may be one, but its cluster does not answer here.
    """
    if not run.job.exists():
        return None
    record = read_record(run.job, JobRecord)
    if record.cluster != "slurm":
        return None
    try:
        active = slurm.job_state(record.job_id, record.job_name).active
    except UserError as error:
        if run.read_status().get("state") in {"stopped", "failed"}:
            return None
        raise UserError(f"{error}; if that job is gone for good, delete {run.job}") from error
    return record.job_id if active else None


def _log(run: RunDir, job: str) -> Path:
    return run.submitit / f"{job}_0_log.out"


def _follow(run: RunDir, job: str) -> str:
    """What to type to watch and to cancel a job."""
    return "\n".join(
        [
            f"job      {job}",
            f"follow   tail -F {shlex.quote(str(_log(run, job)))}",
            f"         squeue -j {job}",
            f"cancel   scancel {job}",
        ]
    )


def wait_for(run: RunDir, job: str) -> int:
    """Wait until the job of a run has left the queue for good, and return its exit code."""
    print("waiting for the job; Ctrl-C stops the waiting, not the job", flush=True)
    try:
        state = _last_state(job, job_name(run))
    except KeyboardInterrupt:
        print(f"job {job} goes on; cancel it with: scancel {job}", file=sys.stderr)
        raise
    # Without accounting Slurm forgets a job after some minutes; the run's own record does not.
    finished = run.read_status().get("state") == "finished"
    if state.state == "COMPLETED" or (state.state == "UNKNOWN" and finished):
        return 0
    print(f"job {job} ended as {state.state}", file=sys.stderr)
    if _log(run, job).exists():
        lines = _log(run, job).read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"the end of {_log(run, job)}:", *lines[-15:], sep="\n", file=sys.stderr)
    return state.exit_code or 1


def _last_state(job: str, name: str) -> JobState:
    """Ask Slurm, ever less often, until the job is no longer active; print what changes."""
    began = time.monotonic()
    shown = ""
    silences = 0
    deadline = math.inf
    while True:
        try:
            state = slurm.job_state(job, name)
        except UserError:
            silences += 1
            if silences == _SILENCES:
                raise
        else:
            silences = 0
            words = state.state + (f" ({state.reason})" if state.active and state.reason != "None" else "")
            if words != shown:
                print(f"{time.strftime('%H:%M:%S')} job {job}: {words}", file=sys.stderr)
            shown = words
            if not state.active:
                deadline = min(deadline, time.monotonic() + _ACCOUNTING_SECONDS)
                # The controller knows that a job has failed before accounting knows its exit code.
                if state.state == "COMPLETED" or state.exit_code or time.monotonic() > deadline:
                    return state
        time.sleep(min(30.0, 1.0 + (time.monotonic() - began) / 20))


def cache_on_slurm(
    out: Path, argv: Sequence[str], tasks: int, resources: Resources, *, dry_run: bool
) -> None:
    """Fill the teacher cache in `out` by an array of `tasks` jobs, each with a part of the shards.

    Args:
        out: the cache's folder, absolute.
        argv: arguments of ``python -m mvat_dist.cache`` for all of them.
        tasks: jobs of the array.
        resources: of each job.
        dry_run: only show the job script.

    Raises:
        UserError: Slurm refused the job.
    """
    executor = Executor(out / "submitit", _clean(f"mvat-cache-{out.name}"), resources)
    parts = [f"--part={part}/{tasks}" for part in range(tasks)]
    print(f"cache    {out}: {tasks} tasks, each with every {tasks}th shard")
    if dry_run:
        print(f"\n{executor.script(parts)}")
        return
    number = executor.submit(Command("mvat_dist.cache", argv), parts)[0].split("_")[0]
    print(
        f"job      {number}\n"
        f"follow   tail -F {shlex.quote(str(executor.folder))}/{number}_*_log.out\n"
        f"         squeue -j {number}\n"
        f"cancel   scancel {number}"
    )


@contextlib.contextmanager
def _alone_in(run: RunDir, purpose: Purpose) -> Iterator[tuple[RunLock | None, bool]]:
    """Make the run's folder and hold its lock.

    Yields the lock (None where another process keeps it) and whether the folder is new. Folders made here
    that are still empty at the end are removed again.
    """
    is_new = not run.path.exists()
    lock = RunLock(run.path, purpose)
    owner = lock.acquire(patience=_LOCK_SECONDS)
    if owner:
        print(f"this run is being started or trained by {owner}: nothing new was started")
    try:
        yield None if owner else lock, is_new
    finally:
        lock.release()
