"""One training job on Slurm through submitit: its script, its submission, its state.

submitit writes the script, pickles the job and starts it on every task; what it gets wrong for a
training job on many nodes is set right here (each place says why). No torch: this runs on login nodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from mvat_dist.distributed import ranks, slurm
from mvat_dist.errors import UserError, exit_code
from mvat_dist.io import read_json
from mvat_dist.launch.processes import without_ranks

_NO_CONFIGURATION = "Could not establish a configuration source"
_ENDED = "State,ExitCode,JobName"
_TIMEOUTS = 1_000_000
"""submitit's own count of restarts, by which it would give up after three: where there is a trainer, its is
the one."""


class TrainJob:
    """What every task of the job runs. Its pickle holds the command line only, so it never grows stale."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self) -> None:
        """Train, as ``python -m mvat_dist.train`` with these arguments."""
        code = exit_code(_train, self.argv)
        if code:
            # SystemExit passes through submitit, which would print any other exception as a traceback.
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after a requeue: the same. The state of the run is on disk already.

        submitit calls this on rank 0 alone, inside a signal handler: nothing that other ranks have
        to take part in may happen here.
        """
        return DelayedSubmission(self)


def _train(argv: list[str] | None) -> None:
    # submitit has a handler of its own: each of its lines would come twice once the trainer logs too.
    logging.getLogger("submitit").propagate = False
    if ranks.read().rank == 0:
        _warn_of_changed_code()
    # Imported late: this module is loaded on login nodes, where torch may be slow or missing.
    from mvat_dist import train

    train.main(argv)


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


def executor(folder: Path, job_name: str, resources: Resources, argv: Sequence[str] = ()) -> SlurmExecutor:
    """The submitit executor that writes its files to `folder`; the training's arguments are `argv`.

    Raises:
        UserError: a value that cannot stand in a job script.
    """
    # Slurm replaces %-patterns in paths and takes a backslash as its own escape; a line break would
    # end a line of the script, and what follows would run as a command.
    if set("%\\\n\r\0") & set(str(folder)):
        raise UserError(f"Slurm cannot write to {str(folder)!r}: choose --runs without %, \\ and line breaks")
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
    made = SlurmExecutor(folder, max_num_timeout=_TIMEOUTS if argv else resources.max_restarts)
    made.update_parameters(
        **parameters,
        setup=[*_setup(folder, resources), *resources.setup],
        srun_args=list(resources.srun_args),
    )
    if argv:
        made.update_parameters(teardown=_teardown(argv))
    return made


def _setup(folder: Path, resources: Resources) -> list[str]:
    threads = max(1, resources.cpus_per_task - resources.reader_processes)
    job = f'{shlex.quote(str(folder))}/"$SLURM_JOB_ID"'
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
        f'pickle={job}_submitted.pkl; [ -e "$pickle" ] || [ ! -e "$pickle.save_tmp" ] || '
        'mv "$pickle.save_tmp" "$pickle"',
        f'rm -f "$pickle.save_tmp" {job}_*_result.pkl.save_tmp',
    ]


def _teardown(argv: Sequence[str]) -> list[str]:
    """After the ranks: a rank that was killed cannot have the job queued again, nor say how it ended."""
    python = shlex.quote(sys.executable)
    return ["code=$?", f'{python} -m mvat_dist.launch.requeue "$code" {shlex.join(argv)}', 'exit "$code"']


def script(made: SlurmExecutor) -> str:
    """The text that sbatch would get."""
    text: str = made._make_submission_file_text(made._submitit_command_str, "")
    return text


def submit(made: SlurmExecutor, task: Callable[..., None], array: Sequence[str] = ()) -> list[str]:
    """Submit a job, or an array of jobs, and return their numbers; on a refusal leave no file behind.

    Args:
        made: from `executor`.
        task: what every rank of the job runs; it is pickled.
        array: one job for each of these, which `task` gets as its argument; empty for one job without.

    Raises:
        UserError: sbatch refused, in Slurm's own words.
    """
    folder = Path(made.folder)
    before = set(folder.iterdir()) if folder.exists() else set()
    words = io.StringIO()
    try:
        # submitit prints what sbatch said, and raises it too: once is enough.
        with contextlib.redirect_stderr(words), outside_of_jobs():
            jobs = made.map_array(task, array) if array else [made.submit(task)]
            return [str(job.job_id) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        for left in set(folder.iterdir()) - before:
            left.unlink()
        if not before:
            folder.rmdir()
        raise UserError(f"Slurm refused the job: {slurm.one_line(str(error))}") from error


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide what a surrounding job or launcher has put into the environment: a new job inherits it all."""
    clean = without_ranks(os.environ)
    if "SLURM_JOB_ID" in clean:
        mine = ("SLURM_", "SLURMD_", "SRUN_")
        clean = {k: v for k, v in clean.items() if k == "SLURM_CONF" or not k.startswith(mine)}
    hidden = {name: os.environ.pop(name) for name in os.environ.keys() - clean.keys()}
    try:
        yield
    finally:
        os.environ.update(hidden)


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job."""

    state: str
    """As in ``squeue -o %T``; UNKNOWN where Slurm has forgotten the job."""
    reason: str = ""
    """Why it waits."""
    exit_code: int | None = None
    """Of the job's script, where accounting tells."""

    @property
    def active(self) -> bool:
        return self.state in slurm.ACTIVE


def job_state(job_id: str, job_name: str) -> JobState:
    """The state of the job of that number and name.

    The name is compared because numbers start again where a cluster is set up anew.

    Raises:
        UserError: the controller does not answer.
    """
    seen = JobState("UNKNOWN")
    for row in slurm.queued(job_id):
        if row.name == job_name:
            seen = JobState(row.state, row.reason)
    if seen.active:
        return seen
    told = slurm.run(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={job_id}", f"--format={_ENDED}"])
    for state, code, name in (line.split("|", 2) for line in told.stdout.splitlines()):
        if name == job_name:
            returned, ended_by = (int(number) for number in code.split(":"))
            return JobState(state.split()[0], exit_code=returned or (128 + ended_by if ended_by else 0))
    return seen


def why_not_here() -> str | None:
    """None where a Slurm cluster answers; else why there is none, for ``--cluster auto``.

    Raises:
        UserError: there is a cluster, but it does not answer; training on its login node is no substitute.
    """
    if not (shutil.which("sbatch") and shutil.which("srun")):
        return "no Slurm here"
    told = slurm.run(["scontrol", "ping"])
    if "is UP" in told.stdout:
        return None
    if _NO_CONFIGURATION in told.stderr:
        return "Slurm's programs are here, but no cluster is configured"
    raise UserError(
        f"Slurm is configured but does not answer ({slurm.one_line(told.stderr or told.stdout)}): "
        "try again when it does, or choose --cluster local"
    )


def code_fingerprint() -> str:
    """SHA-256 over the source files of this package, to notice a change between submission and start."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for source in sorted(package.rglob("*.py")):
        digest.update(str(source.relative_to(package)).encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def _warn_of_changed_code() -> None:
    """Say so where a job runs other code than was submitted: Slurm keeps the script, not the package."""
    record = Path(os.environ.get("SUBMITIT_FOLDER", "")).parent / "job.json"
    if record.exists() and read_json(record).get("code") not in {None, code_fingerprint()}:
        print("warning: mvat_dist has changed since this job was submitted", file=sys.stderr)
