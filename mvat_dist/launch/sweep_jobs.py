"""Sweeps on Slurm: an array of jobs, each of which is one trial on all its nodes.

    python -m mvat_dist.launch.sweep_jobs ENTITY/PROJECT/ID

is what ``slurm/sweep_agent.sh`` runs in the shell of such a job: one W&B agent, which asks for one trial.
A job that Slurm has started again goes on with its own trial and asks nobody.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvat_dist.config.cli import CommandParser
from mvat_dist.distributed import slurm
from mvat_dist.errors import EXIT_BUSY, UserError, exit_code
from mvat_dist.io import make_folder, write_text
from mvat_dist.launch import bayes, processes, sweep_file, trials
from mvat_dist.launch import slurm as slurmjob
from mvat_dist.launch.slurm import Resources
from mvat_dist.launch.sweep_folder import SweepFolder
from mvat_dist.launch.trials import TrialRecord

_SCRIPT = Path(__file__).parent.parent.parent / "slurm" / "sweep_agent.sh"

_USAGE = """usage: python -m mvat_dist.launch.sweep_jobs ENTITY/PROJECT/ID

slurm/sweep_agent.sh calls it in a job: one trial of a W&B sweep.

example:
  python -m mvat_dist.launch.sweep_jobs ann/mvat_dist/1a2b3c4d"""


# ---------------------------------------------------------------------------------------- submission


def on_slurm(
    target: str, count: int | None, resources: Resources, arguments: Sequence[str], *, dry_run: bool
) -> None:
    """Submit an array of jobs for a sweep, one for each trial.

    Args:
        target: as `checked` returns it.
        count: trials.
        resources: of each trial.
        arguments: further ones of `mvat_dist.sweep`.
        dry_run: only show what would be submitted.

    Raises:
        UserError: Slurm refused the job.
    """
    file = Path(target)
    trials = _trials(target, count if file.is_file() else count or 1, arguments)
    if file.is_file():
        sweep = sweep_file.read(file)
        count = sweep.size(count)
        target = str(Path("runs/slurm").absolute() / f"sweep-{sweep.fingerprint}.yaml")
    command = ["sbatch", "--parsable", *_options(count or 1, resources)]
    text = _script([target, *arguments], resources)
    if dry_run:
        print(f"{trials}\n\n{shlex.join(command)} <<'END'\n{text}END")
        return
    if file.is_file():  # the user may edit the original while the jobs wait
        make_folder(Path(target).parent)
        write_text(Path(target), file.read_text(encoding="utf-8"))
    with slurmjob.outside_of_jobs():
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"Slurm refused the job: {slurm.one_line(done.stderr)}")
    job = done.stdout.strip().split(";")[0]
    print(
        f"job      {job}: {count or 1} trials\n"
        f"follow   tail -F {shlex.quote(str(Path.cwd()))}/mvat-sweep-{job}_*.log\n"
        f"         squeue -j {job}\n"
        f"cancel   scancel {job}"
    )
    if file.is_file():
        again = shlex.join([str(file), f"--count={count}", *arguments])
        print(f"ranking  python -m mvat_dist.sweep {again} --ranking")


def locally(
    target: str, count: int | None, resources: Resources, arguments: Sequence[str], *, dry_run: bool
) -> None:
    """`on_slurm` without Slurm: the trials run on this machine, one after the other.

    Raises:
        SystemExit: the exit code of the agent or of `mvat_dist.sweep`.
    """
    ranks = resources.processes
    counted = [] if count is None else [f"--count={count}"]
    if Path(target).is_file():
        command = ["mvat_dist.sweep", target, *counted, f"--processes={ranks}", *arguments]
    else:
        command = ["wandb", "agent", *counted, target]
    if dry_run:
        print(f"start    python -m {shlex.join(command)}\n{_trials(target, count, arguments)}")
        return
    environment = {**_with_python(os.environ), trials.PROCESSES: str(ranks)}
    if code := processes.run_with_descendants([sys.executable, "-m", *command], environment):
        raise SystemExit(code)


def checked(target: str, arguments: Sequence[str], resources: Resources) -> str:
    """A sweep file whose first trial can train, or the ENTITY/PROJECT/ID of a W&B sweep.

    Args:
        target: such a file, such a path, or its address in the browser.
        arguments: further ones of `mvat_dist.sweep`.
        resources: of each trial.

    Raises:
        UserError: it is none of them, or `arguments` are not for it; see also `trials.check`.
    """
    file = Path(target)
    own, others = _parser().parse_known_args(arguments) if file.is_file() else (None, arguments)
    if own is None:
        target = sweep_path(target)
    if others:
        raise UserError(
            f"unknown option {others[0]}: training options belong into the command of the sweep file"
        )
    if own is not None:
        sweep = sweep_file.read(file)
        if sweep.method == "bayes":
            bayes.check_installed()
        folder = SweepFolder.of(sweep, own.seed, own.runs)
        trials.check(sweep, sweep.point(0, own.seed), folder.run_id(0), folder.path.name, resources)
    return target


def sweep_path(target: str) -> str:
    """ENTITY/PROJECT/ID of a W&B sweep, from that or its address in the browser.

    Raises:
        UserError: with what to give.
    """
    found = re.fullmatch(r"(?:https?://[^/]+/)?([\w.-]+/[\w.-]+/)(?:sweeps/)?([\w-]+)/?(?:\?.*)?", target)
    if not found:
        raise UserError(
            f"{target!r} is no sweep: give ENTITY/PROJECT/ID as `wandb sweep configs/sweep.yaml` prints it, "
            "or a sweep file"
        )
    return found[1] + found[2]


def _parser() -> CommandParser:
    """Options of `mvat_dist.sweep` that may stand beside a sweep file."""
    made = CommandParser("python -m mvat_dist.submit", "", "")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--runs", type=Path, default=Path("runs"))
    return made


def _trials(target: str, count: int | None, arguments: Sequence[str]) -> str:
    """How many trials there will be, and the points of those that are known before."""
    if not Path(target).is_file():
        return f"trials   {count}" if count else "trials   until the sweep ends"
    sweep, seed = sweep_file.read(Path(target)), _parser().parse_args(arguments).seed
    size = sweep.size(count)
    if sweep.method == "bayes":
        return f"trials   {size}, each with the point that Optuna proposes when it starts"
    points = [
        f"         {number}: {sweep_file.describe(sweep.point(number, seed))}" for number in range(size)
    ]
    return "\n".join([f"trials   {size}", *points])


def _options(count: int, resources: Resources) -> list[str]:
    """Options of sbatch."""
    given: dict[str, object] = {
        "job-name": "mvat-sweep",
        "array": f"0-{count - 1}",
        "output": "mvat-sweep-%A_%a.log",
        "open-mode": "append",
        **{name.replace("_", "-"): value for name, value in resources.options().items()},
        "signal": f"USR2@{resources.signal_delay}",
        "requeue": True,
        **resources.more,
    }
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None
    ]


def _script(arguments: Sequence[str], resources: Resources) -> str:
    """The shell of each job."""
    lines = ["#!/bin/bash", f"export MVAT_MAX_RESTARTS={resources.max_restarts}"]
    lines += [f"export MVAT_SIGNAL_LEAD={resources.signal_delay}"]
    if resources.srun_args:
        lines += [f"export {trials.SRUN_ARGS}={shlex.quote(shlex.join(resources.srun_args))}"]
    lines += [*resources.setup, f"exec bash {shlex.quote(str(_SCRIPT))} {shlex.join(arguments)}"]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------- the job


def main(argv: list[str] | None = None) -> None:
    """One trial, in the shell of a Slurm job.

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
    target = sweep_path(given[0])
    file = Path("runs/slurm").absolute() / f"trial-{job}.json"
    code = _my_own_again(file)
    if code is None:
        file.unlink(missing_ok=True)
        code = _ask_for_one(target, file)
    if code:
        raise SystemExit(code)


def _my_own_again(file: Path) -> int | None:
    """Go on with the trial of this job's former life; None where there is none, or somebody else has it."""
    found = TrialRecord.read(file) if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else None
    if found is None or found.exit_code == 0:
        return None
    print(f"start again: this job goes on with trial {found.environment['WANDB_RUN_ID']}", flush=True)
    environment = {**os.environ, **found.environment, trials.RECORD: str(file)}
    code = processes.run_with_descendants([sys.executable, "-m", "mvat_dist.trial", *found.argv], environment)
    return None if code == EXIT_BUSY else code


def _ask_for_one(target: str, file: Path) -> int:
    """Let an agent ask for one trial and start it; the trial's exit code."""
    environment = {**_with_python(os.environ), trials.RECORD: str(file)}
    # It kills a trial that has not ended so many seconds after it was asked: time for a step and a save.
    environment.setdefault("WANDB_AGENT_KILL_DELAY", "300")
    code = processes.run_with_descendants(
        [sys.executable, "-m", "wandb", "agent", "--count=1", target], environment
    )
    found = TrialRecord.read(file)
    if found is None:
        print("the agent has started no trial")
        return code
    return 1 if found.exit_code is None else found.exit_code


def _with_python(environ: Mapping[str, str]) -> dict[str, str]:
    """W&B's agent starts `python`: let it be this one."""
    return {**environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"}


if __name__ == "__main__":
    sys.exit(exit_code(main))
