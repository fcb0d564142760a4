"""One trial of a sweep: what a W&B agent, or `mvat_dist.sweep`, starts for each point.

    python -m mvat_dist.trial TRAINING_OPTIONS... PARAMETERS...

This one process has to do with the agent. It starts the ranks, all with the same arguments: by srun over
the whole allocation where it runs in the shell of a Slurm job, else as processes of this machine. No torch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvat_dist.config import parser as configfile
from mvat_dist.config import sizes
from mvat_dist.config.cli import CommandParser
from mvat_dist.config.schema import Config
from mvat_dist.distributed import ranks
from mvat_dist.errors import UserError, exit_code
from mvat_dist.launch import requeue, trial_record
from mvat_dist.launch.processes import without_ranks
from mvat_dist.launch.trial_record import TrialRecord
from mvat_dist.runs.folder import run_folder

PROG = "python -m mvat_dist.trial"
PROCESSES = "MVAT_PROCESSES"
"""Environment variable: ranks of a trial where no Slurm job has nodes for it."""
SRUN_ARGS = "MVAT_SRUN_ARGS"
"""Environment variable: further options of srun."""

_POLL_SECONDS = 0.5
_LISTENED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
_STOPPED = 128 + signal.SIGINT
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def parser() -> argparse.ArgumentParser:
    """The options that are not the trainer's."""
    made = CommandParser(
        PROG,
        "Train one trial of a sweep. A W&B agent or mvat_dist.sweep starts it: it is the command of a sweep "
        "file (configs/sweep.yaml). All other options are the trainer's (python -m mvat_dist.train --help); "
        "the parameters of the sweep come after them and win. Exit code: 0 when the trial is finished or was "
        "stopped by its agent, 128 plus a signal's number when it was preempted and may go on, else the "
        "training's own.",
        "wandb sweep configs/sweep.yaml\n  wandb agent ENTITY/PROJECT/ID",
    )
    made.add_argument(
        "--processes",
        type=int,
        default=os.environ.get(PROCESSES, "1"),
        metavar="N",
        help=f"ranks on this machine; in a Slurm job its tasks are (default: ${PROCESSES}, else 1)",
    )
    return made


def main(argv: list[str] | None = None) -> None:
    """Train the trial that the environment names.

    Raises:
        UserError: not started by a sweep, or a parameter that is no option of the trainer.
        SystemExit: see --help.
    """
    given = sys.argv[1:] if argv is None else argv
    options, rest = parser().parse_known_args(given)
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: give at least 1")
    trial = Trial.read(os.environ)
    arguments, config = trial.arguments(rest)
    folder = run_folder(config)
    record = TrialRecord(str(folder), config.track.objective, given, trial.environment)
    trial_record.write(record)
    code = _as_agent_reads_it(_run(_command(arguments, folder.parent, options.processes)))
    if code and _allocation():
        # A killed rank cannot have the job queued again, nor say how it ended.
        requeue.main([str(code), *arguments])
    trial_record.write(replace(record, exit_code=code))
    if code:
        raise SystemExit(code)


@dataclass(frozen=True)
class Trial:
    """What the agent says about the trial."""

    run_id: str
    """Of the W&B run that the sweep looks at, and name of the trial's folder."""
    sweep: str
    """Name of the folder of all trials."""
    parameters: dict[str, Any] | None
    """By name; None where the agent has left no file of them."""
    environment: dict[str, str]
    """The variables that say all this."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Trial:
        """The trial of this process.

        Raises:
            UserError: nobody has named one, or the file of its parameters cannot be read.
        """
        run_id, sweep_id = environ.get("WANDB_RUN_ID"), environ.get("WANDB_SWEEP_ID")
        sweep = f"sweep-{sweep_id}" if sweep_id else environ.get("WANDB_RUN_GROUP")
        if not run_id or not sweep:
            raise UserError(
                "this is no trial of a sweep (no WANDB_RUN_ID and WANDB_SWEEP_ID): start it by wandb agent "
                "or python -m mvat_dist.sweep, or train with python -m mvat_dist.train"
            )
        for name in (run_id, sweep):
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise UserError(f"{name!r} cannot name a folder: a sweep and its runs have plain ids")
        file = environ.get("WANDB_SWEEP_PARAM_PATH")
        parameters = trial_record.read_parameters(Path(file)) if file else None
        names = [name for name in trial_record.VARIABLES if name in environ]
        return cls(run_id, sweep, parameters, {name: environ[name] for name in names})

    def arguments(self, given: Sequence[str]) -> tuple[list[str], Config]:
        """The command line of every rank, and the configuration that it means.

        The parameters are read from the agent's file, which keeps their types; the same names in `given`
        are what the agent made of them, and are left out.

        Raises:
            UserError: the trainer knows no such key (the nearest is named), or refuses its value.
        """
        fixed = _without(given, self.parameters or {})
        made = [
            # true, null, 1e-05, {"lr": 0.1}: as the trainer takes them
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in (self.parameters or {}).items()
            if not name.startswith("_wandb")
        ]
        config = configfile.parse([*fixed, *made], prog=PROG)
        if config.name:
            raise UserError(
                f"--name {config.name}: a trial's folder has the name of its W&B run; leave --name out"
            )
        if config.parts:
            raise UserError(
                f"--parts {config.parts}: the students of a trial are trained together; leave it out"
            )
        config.runs, config.name = str(Path(config.runs) / self.sweep), self.run_id
        config.track.objective = config.track.objective or next(
            iter(sizes.select(config.student, config.sizes))
        )
        ours = {"runs": config.runs, "name": config.name, "track.objective": config.track.objective}
        # Where the sweep is: also for what is sent later, when no agent says it.
        for key in ("project", "entity", "group"):
            variable = "WANDB_RUN_GROUP" if key == "group" else f"WANDB_{key.upper()}"
            if told := self.environment.get(variable):
                setattr(config.track, key, told)
                ours[f"track.{key}"] = told
        return [*fixed, *made, *(f"--{name}={value}" for name, value in ours.items())], config


def _without(given: Sequence[str], parameters: Mapping[str, Any]) -> list[str]:
    """`given` without what repeats `parameters`, in any of the forms of W&B's ``${args...}``."""
    kept: list[str] = []
    value_follows = False
    for token in given:
        name, equals, _ = token.lstrip("-+").partition("=")
        if value_follows and not token.startswith("--"):
            value_follows = False
            continue
        value_follows = name in parameters and not equals
        if name not in parameters and not name.startswith("_wandb"):
            kept.append(token)
    return kept


def _allocation() -> str:
    """The Slurm job in whose shell this runs; empty elsewhere, and within a step."""
    if ranks.in_slurm_step(os.environ) or not shutil.which("srun"):
        return ""
    return os.environ.get("SLURM_JOB_ID", "")


def _command(arguments: Sequence[str], folder: Path, processes: int) -> list[str]:
    """What starts the ranks."""
    job = _allocation()
    if not job:
        size = ["--cluster=local", f"--tasks-per-node={processes}", "--placement=together"]
        return [sys.executable, "-m", "mvat_dist.submit", *size, *arguments]
    logs = folder / "slurm"
    if set("%\\\n\r") & set(str(logs)):
        raise UserError(f"Slurm cannot write to {str(logs)!r}: choose --runs without %, \\ and line breaks")
    logs.mkdir(parents=True, exist_ok=True)
    log = f"{logs}/{job}-%t.log"
    print(f"follow: tail -F {shlex.quote(log.replace('%t', '0'))}", flush=True)
    more = shlex.split(os.environ.get(SRUN_ARGS, ""))
    srun = ["srun", "--export=ALL", "--unbuffered", "--open-mode=append", f"--output={log}", *more]
    return [*srun, sys.executable, "-m", "mvat_dist.train", *arguments]


def _run(command: Sequence[str]) -> int:
    """Run the ranks to their end and pass on what this process is told; a shell's exit code."""
    # Our own sweep passes on what it is told itself, and has no wishes.
    agent = os.getppid() if "WANDB_SWEEP_ID" in os.environ else None
    # Blocked from the start, and taken from the queue below: no signal finds us without a child to tell.
    signal.pthread_sigmask(signal.SIG_BLOCK, _LISTENED)
    child = subprocess.Popen(command, env=without_ranks(os.environ), preexec_fn=_as_child)
    while child.poll() is None:
        told = signal.sigtimedwait(_LISTENED, _POLL_SECONDS)
        if told:
            _pass_on(child, told.si_signo, by_agent=told.si_pid == agent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LISTENED)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _pass_on(child: subprocess.Popen[bytes], number: int, *, by_agent: bool) -> None:
    """Tell the ranks to stop.

    What W&B's agent sends is its sweep's wish: the trial is over, and nobody is to go on with it. Anything
    else is taken for a preemption, after which the trial goes on some day.
    """
    number = signal.SIGINT if by_agent else number
    job = _allocation()
    if job:
        # srun would end the ranks at once; Slurm itself signals them one by one.
        name = signal.Signals(number).name.removeprefix("SIG")
        subprocess.run(["scancel", f"--signal={name}", job], capture_output=True, check=False)
    else:
        child.send_signal(number)


def _as_child() -> None:
    """In the child: hear signals again, and do not outlive this process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LISTENED)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _as_agent_reads_it(code: int) -> int:
    """0 for a trial that its sweep, or somebody, has stopped: three failures would end the agent."""
    if code == _STOPPED:
        print("this trial was stopped; what it has saved so far is kept")
        return 0
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main))
