"""Run the trials of a sweep as an array of Slurm jobs, a trial on all nodes of each, or on this machine.

    python -m mvat_dist.launch.sweep_jobs ENTITY/PROJECT/ID

is what a job of a W&B sweep runs in its shell: one agent, which asks the server for one trial. A job that
Slurm has started again goes on with its own trial and asks nobody. A job of a sweep file runs
``mvat_dist.sweep FILE --point I``.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mvat_dist.config.cli import CommandParser
from mvat_dist.errors import EXIT_BUSY, UserError, exit_code
from mvat_dist.io import make_folder, write_text
from mvat_dist.launch import bayes, processes, sweep_file, trials
from mvat_dist.launch.processes import StopSignals
from mvat_dist.launch.slurm import Command, Executor, Resources
from mvat_dist.launch.sweep_folder import SweepFolder
from mvat_dist.launch.trials import TrialRecord

_MODULE = "mvat_dist.launch.sweep_jobs"
_SWEEP_COMMAND = "mvat_dist.sweep"

_USAGE = f"""usage: python -m {_MODULE} ENTITY/PROJECT/ID

In a Slurm job (slurm/sweep_agent.sh): one trial of a W&B sweep.

example:
  python -m {_MODULE} ann/mvat_dist/1a2b3c4d"""


@dataclass(frozen=True)
class Target:
    """What ``--sweep`` names: a sweep file, or a sweep of a W&B server."""

    name: str
    """Path of the file, or ENTITY/PROJECT/ID."""
    folder: SweepFolder | None
    """Of a file."""
    options: tuple[str, ...] = ()
    """Of `mvat_dist.sweep`, for a file."""

    @property
    def path(self) -> Path:
        """Folder of the sweep's trials; of W&B's sweep where its command names no other ``--runs``."""
        return self.folder.path if self.folder else sweep_runs(self.name)

    def describe(self, count: int | None) -> str:
        """How many trials there will be, and the points that are known before."""
        if self.folder is None:
            return f"trials   {count}" if count else "trials   until the sweep ends"
        size = self.folder.sweep.size(count)
        if self.folder.sweep.method == "bayes":
            return f"trials   {size}, each with the point that Optuna proposes when it starts"
        lines = [f"         {n}: {sweep_file.describe(self.folder.point(n))}" for n in range(size)]
        return "\n".join([f"trials   {size}", *lines])


def read_target(name: str, options: Sequence[str], resources: Resources) -> Target:
    """A sweep file whose first trial can train, or the ENTITY/PROJECT/ID of a W&B sweep.

    Args:
        name: such a file, such a path, or its address in the browser.
        options: beside a file, the ``--seed`` and ``--runs`` of `mvat_dist.sweep`.
        resources: of each trial.

    Raises:
        UserError: it is none of them, or `options` are not for it; see also `trials.check`.
    """
    if not Path(name).is_file():
        path = sweep_path(name)
        _refuse(options)
        return Target(path, None)
    parser = CommandParser("python -m mvat_dist.submit", "", "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    known, others = parser.parse_known_args(options)
    _refuse(others)
    sweep = sweep_file.read(Path(name))
    if sweep.method == "bayes":
        bayes.check_installed()
    folder = SweepFolder.of(sweep, known.seed, known.runs)
    trials.check(sweep, sweep.point(0, known.seed), folder.run_id(0), folder.path.name, resources)
    return Target(name, folder, tuple(options))


def _refuse(options: Sequence[str]) -> None:
    if options:
        raise UserError(
            f"unknown option {options[0]}: training options belong into the command of the sweep file"
        )


def sweep_path(name: str) -> str:
    """ENTITY/PROJECT/ID of a W&B sweep, from that or its address in the browser.

    Raises:
        UserError: with what to give.
    """
    match = re.fullmatch(r"(?:https?://[^/]+/)?([\w.-]+/[\w.-]+/)(?:sweeps/)?([\w-]+)/?(?:\?.*)?", name)
    if not match:
        raise UserError(
            f"{name!r} is no sweep: give ENTITY/PROJECT/ID as `wandb sweep configs/sweep.yaml` prints it, "
            "or a sweep file"
        )
    return match[1] + match[2]


def sweep_runs(path: str) -> Path:
    """The folder in which trials of the sweep ENTITY/PROJECT/ID lie by default."""
    return Path("runs").absolute() / f"sweep-{path.rpartition('/')[2]}"


# ---------------------------------------------------------------------------------------- submission


def on_slurm(target: Target, count: int | None, resources: Resources, *, dry_run: bool) -> None:
    """Submit an array of jobs for a sweep, one for each trial.

    Args:
        target: the sweep.
        count: trials; None for all of a file, or for one of W&B's.
        resources: of each trial.
        dry_run: only show what would be submitted.

    Raises:
        UserError: Slurm refused the job.
    """
    size = target.folder.sweep.size(count) if target.folder else count or 1
    command, array = Command(_MODULE, []), [target.name] * size
    file = target.path / "slurm" / "sweep.yaml"
    if target.folder:
        command = Command(_SWEEP_COMMAND, [str(file), *target.options])
        array = [f"--point={number}" for number in range(size)]
    executor = _executor(target.path / "slurm", resources)
    if dry_run:
        print(f"{target.describe(size)}\n\n{executor.script(array)}")
        return
    if target.folder:  # the user may edit the original while the jobs wait
        make_folder(file.parent)
        write_text(file, Path(target.name).read_text(encoding="utf-8"))
    job = executor.submit(command, array)[0].split("_")[0]
    print(
        f"job      {job}: {size} trials\n"
        f"follow   tail -F {shlex.quote(str(executor.folder))}/{job}_*_log.out\n"
        f"         squeue -j {job}\n"
        f"cancel   scancel {job}"
    )
    if target.folder:
        again = shlex.join([target.name, f"--count={size}", *target.options])
        print(f"ranking  python -m {_SWEEP_COMMAND} {again} --ranking")


def _executor(folder: Path, resources: Resources) -> Executor:
    """An executor of jobs whose shell runs a trial, which calls srun itself and has the job queued again."""
    # A shell that dies of a signal takes the job with it, before the trial has saved.
    setup = ["trap : TERM INT USR2"]
    if resources.srun_args:
        setup.append(f"export {trials.SRUN_ARGS}={shlex.quote(shlex.join(resources.srun_args))}")
    resources = replace(resources, setup=(*setup, *resources.setup))
    return Executor(folder, "mvat-sweep", resources, in_shell=True, requeues_itself=True)


def locally(target: Target, count: int | None, resources: Resources, *, dry_run: bool) -> None:
    """Run the trials on this machine, one after the other.

    Raises:
        SystemExit: the exit code of the agent or of `mvat_dist.sweep`.
    """
    ranks = resources.processes
    limit = [] if count is None else [f"--count={count}"]
    if target.folder:
        command = [_SWEEP_COMMAND, target.name, *limit, f"--processes={ranks}", *target.options]
    else:
        command = ["wandb", "agent", *limit, target.name]
    if dry_run:
        print(f"start    python -m {shlex.join(command)}\n{target.describe(count)}")
        return
    line = [sys.executable, "-m", *command]
    environment = {**_with_python(os.environ), trials.PROCESSES: str(ranks)}
    if target.folder:  # it passes a signal on to its trial and waits for that
        with StopSignals() as signals:
            sweep = processes.start(line, environment, on_parent_death=signal.SIGTERM)
            code = processes.wait_for(sweep, signals)
    else:
        code = processes.run_with_descendants(line, environment)
    if code:
        raise SystemExit(code)


# -------------------------------------------------------------------------------------------- the job


def main(argv: list[str] | None = None) -> None:
    """Run one trial of a W&B sweep, in the shell of a Slurm job.

    Raises:
        UserError: outside of jobs.
        SystemExit: the trial's exit code.
    """
    given = sys.argv[1:] if argv is None else argv
    if given[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    job = os.environ.get("SLURM_JOB_ID")
    if len(given) != 1 or not job:
        raise UserError("this is for slurm/sweep_agent.sh: sbatch slurm/sweep_agent.sh ENTITY/PROJECT/ID")
    path = sweep_path(given[0])
    file = sweep_runs(path) / "slurm" / f"trial-{job}.json"
    code = _resume_own_trial(file)
    if code is None:
        file.unlink(missing_ok=True)
        code = _run_agent(path, file)
    if code:
        raise SystemExit(code)


def _resume_own_trial(file: Path) -> int | None:
    """Go on with the trial that this job had before its restart; its exit code.

    None where the job has had no trial or another process runs it.
    """
    record = TrialRecord.read(file) if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else None
    if record is None or record.exit_code == 0:
        return None
    print(f"start again: this job goes on with trial {record.environment['WANDB_RUN_ID']}", flush=True)
    environment = {**os.environ, **record.environment, trials.RECORD: str(file)}
    command = [sys.executable, "-m", trials.MODULE, *record.argv]
    code = processes.run_with_descendants(command, environment)
    return None if code == EXIT_BUSY else code


def _run_agent(path: str, file: Path) -> int:
    """Let an agent ask for one trial, which writes its record to `file`, and run it; its exit code."""
    environment = {**_with_python(os.environ), trials.RECORD: str(file)}
    # The agent kills a trial that has not ended so many seconds after it was asked to: time to save.
    environment.setdefault("WANDB_AGENT_KILL_DELAY", "300")
    command = [sys.executable, "-m", "wandb", "agent", "--count=1", path]
    code = processes.run_with_descendants(command, environment)
    record = TrialRecord.read(file)
    if record is None:
        print("the agent has started no trial")
        return code
    return 1 if record.exit_code is None else record.exit_code


def _with_python(environ: Mapping[str, str]) -> dict[str, str]:
    """W&B's agent starts `python`: let it be this one."""
    return {**environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"}


if __name__ == "__main__":
    sys.exit(exit_code(main))
