"""One trial of a sweep: what a W&B agent, or `mvat_dist.sweep`, starts for each point.

    python -m mvat_dist.trial TRAINING_OPTIONS... PARAMETERS...

Only this process deals with the agent. It starts the ranks, all with the same arguments: by srun over the
whole allocation where it runs in the shell of a Slurm job, else as processes of this machine. No torch.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mvat_dist.distributed import ranks, slurm
from mvat_dist.errors import UserError, exit_code
from mvat_dist.launch import processes, requeue, trials
from mvat_dist.launch.processes import Child, StopSignal, StopSignals
from mvat_dist.launch.slurm import check_folder
from mvat_dist.launch.trials import Trial, TrialRecord
from mvat_dist.runs.folder import run_folder

_STOPPED = 128 + signal.SIGINT


def main(argv: list[str] | None = None) -> None:
    """Train the trial that the environment names.

    Raises:
        UserError: not started by a sweep, or a parameter that is no option of the trainer.
        SystemExit: see --help.
    """
    given = sys.argv[1:] if argv is None else argv
    options, others = trials.parser().parse_known_args(given)
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: give at least 1")
    trial = Trial.read(os.environ)
    arguments, config = trial.arguments(others)
    folder = run_folder(config)
    record = TrialRecord(str(folder), config.track.objective, given, trial.environment)
    _write(record)
    code = _run(_command(arguments, folder.parent, options.processes))
    if code == _STOPPED:
        # For W&B's agent that is success: three failures would end it.
        print("this trial was stopped; what it has saved so far is kept")
        code = 0
    if code and _allocation():
        # A killed rank cannot have the job queued again, nor say how it ended.
        requeue.main([str(code), *arguments])
    _write(replace(record, exit_code=code))
    if code:
        raise SystemExit(code)


def _write(record: TrialRecord) -> None:
    if file := os.environ.get(trials.RECORD):
        record.write(Path(file))


def _allocation() -> str:
    """The Slurm job in whose shell this runs; empty elsewhere, and within a step."""
    if ranks.in_slurm_step(os.environ) or not shutil.which("srun"):
        return ""
    return os.environ.get("SLURM_JOB_ID", "")


def _command(arguments: Sequence[str], folder: Path, count: int) -> list[str]:
    """What starts the ranks: the tasks of the Slurm job, else `count` processes of this machine."""
    job = _allocation()
    if not job:
        size = ["--cluster=local", f"--tasks-per-node={count}"]
        return [sys.executable, "-m", "mvat_dist.submit", *size, *arguments]
    logs = folder / "slurm"
    check_folder(logs)
    logs.mkdir(parents=True, exist_ok=True)
    log = f"{logs}/{job}-%t.log"
    print(f"follow: tail -F {shlex.quote(log.replace('%t', '0'))}", flush=True)
    more = shlex.split(os.environ.get(trials.SRUN_ARGS, ""))
    srun = ["srun", "--export=ALL", "--unbuffered", "--open-mode=append", f"--output={log}", *more]
    return [*srun, sys.executable, "-m", "mvat_dist.train", *arguments]


def _run(command: Sequence[str]) -> int:
    """Run the ranks to their end, passing on what asks this process to stop; their exit code."""
    # `mvat_dist.sweep` passes on what it receives itself: only W&B's agent sends signals of its own.
    agent = os.getppid() if "WANDB_SWEEP_ID" in os.environ else -1

    def pass_on(child: Child, received: StopSignal) -> None:
        """Tell the ranks to stop.

        A signal from W&B's agent means that its sweep ends the trial, which is not to be resumed. Any other
        signal counts as a preemption, after which the trial may be resumed.
        """
        number = signal.SIGINT if received.sender == agent else received.number
        if job := _allocation():
            # srun would end the ranks at once; Slurm itself signals them one by one.
            slurm.signal_steps(job, number)
        else:
            child.send(number)

    with StopSignals() as signals:
        child = processes.start(
            command, ranks.without_ranks(os.environ), own_session=False, on_parent_death=signal.SIGTERM
        )
        return processes.wait_for(child, signals, pass_on)


if __name__ == "__main__":
    sys.exit(exit_code(main))
