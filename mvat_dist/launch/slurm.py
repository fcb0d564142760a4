"""Write and submit Slurm jobs through submitit: the one module that imports it.

A training, the filling of a teacher cache and the trials of a sweep are all submitted alike::

    executor = Executor(folder, "mvat-cache-dns", resources)
    print(executor.script())                                                   # --dry-run
    [job] = executor.submit(Command("mvat_dist.cache", ["--out", "cache/dns"]))

submitit writes the script, pickles the task and starts it on every rank; what it gets wrong for a training
on many nodes is set right here (each place says why). No torch: this runs on login nodes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import io
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from mvat_dist.distributed import ranks, slurm
from mvat_dist.errors import UserError, exit_code
from mvat_dist.io import read_record
from mvat_dist.runs.records import JobRecord

_NO_LIMIT = 1_000_000
"""Restarts after which submitit gives up, where what runs in the job counts them itself."""


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for; None leaves a matter to the site's defaults."""

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    minutes: int
    """Time limit."""
    reader_processes: int
    """Per task: they take their share of `cpus_per_task`."""
    gpus_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    wckey: str | None = None
    signal_delay: int = 120
    """Seconds before the time limit at which the ranks get SIGUSR2."""
    max_restarts: int = 1000
    """How often the trainer may have the job queued again, after its time limit or a preemption."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run in the job before the ranks start."""
    srun_args: tuple[str, ...] = ()
    more: Mapping[str, str | bool] = field(default_factory=dict)
    """Any other sbatch option, by its long name; True for one without a value."""

    @property
    def processes(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node

    def options(self) -> dict[str, Any]:
        """What sbatch is asked for, by its long options with underscores; None leaves it to the site."""
        return {
            "time": self.minutes,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "gpus_per_node": self.gpus_per_node,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "mem": self.mem,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "wckey": self.wckey,
        }


# ------------------------------------------------------------------------------------ what a task runs


class Command:
    """A command of this package as a task of a job: ``python -m MODULE ARGUMENTS``.

    submitit pickles it and loads it again whenever the job starts. It is two plain values, so the pickle
    never grows stale, and the module is imported by the job alone.
    """

    def __init__(self, module: str, argv: Sequence[str]) -> None:
        self.module = module
        """Its ``main(argv)`` is called."""
        self.argv = list(argv)

    def __call__(self, *more: str) -> None:
        """Run it, with `more` arguments at the end where the job is one of an array.

        Raises:
            SystemExit: its exit code where that is not 0.
        """
        # submitit has a handler of its own: each of its lines would come twice once the command logs too.
        logging.getLogger("submitit").propagate = False
        if code := exit_code(self._run, [*self.argv, *more]):
            # SystemExit passes through submitit, which would print any other exception as a traceback.
            raise SystemExit(code)

    def _run(self, argv: list[str] | None) -> None:
        if ranks.read().rank == 0:
            _warn_of_changed_code()
        importlib.import_module(self.module).main(argv)

    def checkpoint(self, *more: str) -> DelayedSubmission:
        """What submitit runs after it has had the job queued again: the same. All state is on disk already.

        submitit calls this on rank 0 alone, inside a signal handler: nothing that other ranks have to take
        part in may happen here.
        """
        return DelayedSubmission(self, *more)


# -------------------------------------------------------------------------------------------- submission


class Executor:
    """Submits jobs of one kind: their script, and the folder of their pickles and logs.

    Args:
        folder: where submitit keeps its files; the output of rank R of job J is ``J_R_log.out`` there, that
            of an array's task K is ``J_K_0_log.out``. Made by `submit`.
        job_name: what squeue shows.
        resources: what Slurm is asked for.
        after: lines of shell that run after the ranks; ``$?`` is their exit code at first, and the job's is
            that of the last line.
        in_shell: run the task once, in the shell of the job on its first node, instead of on every rank by
            srun: for a task that calls srun itself.
        requeues_itself: whether what runs in the job has it queued again and counts the restarts; else
            submitit does at the time limit, at most `Resources.max_restarts` times.

    Raises:
        UserError: a value that cannot stand in a job script.
    """

    def __init__(
        self,
        folder: Path,
        job_name: str,
        resources: Resources,
        *,
        after: Sequence[str] = (),
        in_shell: bool = False,
        requeues_itself: bool = False,
    ) -> None:
        self.folder = folder
        parameters = _checked_parameters(folder, job_name, resources)
        restarts = _NO_LIMIT if requeues_itself else resources.max_restarts
        self._submitit = SlurmExecutor(folder, max_num_timeout=restarts)
        self._submitit.update_parameters(
            **parameters,
            setup=[*_setup(folder, resources), *resources.setup],
            srun_args=list(resources.srun_args),
            use_srun=not in_shell,
            teardown=list(after) or None,
        )

    def script(self, array: Sequence[str] = ()) -> str:
        """The text that sbatch would get for a job, or for an array of jobs as in `submit`."""
        executor = copy.copy(self._submitit)
        executor.parameters = {**executor.parameters, **_array_parameters(array)}
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
        return text

    def submit(self, task: Callable[..., None], array: Sequence[str] = ()) -> list[str]:
        """Submit a job, or an array of jobs, and return their numbers; a refusal leaves no file behind.

        Args:
            task: what every rank of the job runs, as a rule a `Command`; it is pickled.
            array: one job for each of these, which `task` gets as its argument; empty for one job without.

        Raises:
            UserError: sbatch refused, in Slurm's own words.
        """
        files = set(self.folder.iterdir()) if self.folder.exists() else set()
        if array:
            self._submitit.update_parameters(array_parallelism=len(array))
        try:
            # submitit prints what sbatch said, and raises it too: once is enough.
            with contextlib.redirect_stderr(io.StringIO()), outside_of_jobs():
                jobs = self._submitit.map_array(task, array) if array else [self._submitit.submit(task)]
                return [str(job.job_id) for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            for left in set(self.folder.iterdir()) - files:
                left.unlink()
            if not files:
                self.folder.rmdir()
            raise UserError(f"Slurm refused the job: {slurm.one_line(str(error))}") from error


def _array_parameters(array: Sequence[str]) -> dict[str, int]:
    """submitit's parameters for an array of which all jobs may run at once."""
    return {"map_count": len(array), "array_parallelism": len(array)} if array else {}


def check_folder(folder: Path) -> None:
    """Refuse a folder into which Slurm cannot write a log.

    Raises:
        UserError: with what its path must not hold.
    """
    # Slurm replaces %-patterns in paths and takes a backslash as its own escape; a line break would
    # end a line of the script, and what follows would run as a command.
    if set("%\\\n\r\0") & set(str(folder)):
        raise UserError(f"Slurm cannot write to {str(folder)!r}: choose --runs without %, \\ and line breaks")


def _checked_parameters(folder: Path, job_name: str, resources: Resources) -> dict[str, Any]:
    """submitit's parameters for what Slurm is asked for.

    Raises:
        UserError: a value that cannot stand in a job script.
    """
    check_folder(folder)
    parameters: dict[str, Any] = {
        "job_name": job_name,
        # None too: without a "wckey" submitit sends one of its own, which some sites refuse.
        **resources.options(),
        "signal_delay_s": resources.signal_delay,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **resources.more},
    }
    for key, value in [*parameters.items(), *resources.more.items()]:
        if set("\n\r\0") & set(str(value)):
            raise UserError(f"the value of {key.replace('_', '-')} holds a line break: {value!r}")
    return parameters


def _setup(folder: Path, resources: Resources) -> list[str]:
    """Lines of shell that run before the ranks."""
    threads = max(1, resources.cpus_per_task - resources.reader_processes)
    pickles = shlex.quote(str(folder))
    return [
        "# Since Slurm 22.05 srun does not take over sbatch's --cpus-per-task.",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"',
        "# Once a rank has ended, the others get this many seconds to end as well. Not --kill-on-bad-exit:",
        "# a killed rank's code would hide that of the failed one, which is 2 for a mistake of the user.",
        'export SLURM_WAIT="${SLURM_WAIT:-180}" SLURM_KILL_BAD_EXIT="${SLURM_KILL_BAD_EXIT:-0}"',
        f"export MVAT_MAX_RESTARTS={resources.max_restarts} MVAT_SIGNAL_LEAD={resources.signal_delay}",
        "ulimit -c 0",
        "# What a killed submitit leaves half-written would make its next try fail.",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}",
        f'pickle={pickles}/"$job"_submitted.pkl; [ -e "$pickle" ] || [ ! -e "$pickle.save_tmp" ] || '
        'mv "$pickle.save_tmp" "$pickle"',
        f'rm -f "$pickle.save_tmp" {pickles}/"$job"_*_result.pkl.save_tmp',
    ]


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide what a surrounding job or launcher has put into the environment: a new job inherits it all."""
    clean = ranks.without_ranks(os.environ)
    if "SLURM_JOB_ID" in clean:
        of_job = ("SLURM_", "SLURMD_", "SRUN_")
        clean = {k: v for k, v in clean.items() if k == "SLURM_CONF" or not k.startswith(of_job)}
    hidden = {name: os.environ.pop(name) for name in os.environ.keys() - clean.keys()}
    try:
        yield
    finally:
        os.environ.update(hidden)


# -------------------------------------------------------------------------------------- changed code


def code_fingerprint() -> str:
    """SHA-256 over the source files of this package, to notice a change between submission and start."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for source in sorted(package.rglob("*.py")):
        digest.update(str(source.relative_to(package)).encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def _warn_of_changed_code() -> None:
    """Warn where a training runs other code than was submitted: Slurm keeps the script, not the package."""
    file = Path(os.environ.get("SUBMITIT_FOLDER", "")).parent / "job.json"
    if file.exists() and read_record(file, JobRecord).code != code_fingerprint():
        print("warning: mvat_dist has changed since this job was submitted", file=sys.stderr)
