"""A sweep without a server: ``python -m mvat_dist.sweep configs/sweep.yaml``.

It does for a sweep file what W&B's server and agent do together: it chooses the points, tells a trial its
parameters as the agent does, and starts the same command. W&B stays offline.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from mvat_dist import submit
from mvat_dist.config.cli import CommandParser
from mvat_dist.errors import EXIT_BUSY, UserError, exit_code
from mvat_dist.launch import bayes, processes, sweep_file, trials
from mvat_dist.launch.processes import StopSignals
from mvat_dist.launch.slurm import Resources
from mvat_dist.launch.sweep_file import Point, Sweep
from mvat_dist.launch.sweep_folder import SweepFolder
from mvat_dist.launch.trials import TrialRecord

PROG = "python -m mvat_dist.sweep"

_MAX_FAILURES = 3
"""Failed trials in a row after which the sweep ends, as W&B's agent does."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = CommandParser(
        PROG,
        "Run a sweep file without a W&B server: grid, random or Bayesian search (Optuna's TPE), one trial "
        "after the other on this machine, or as an array of Slurm jobs. The same command continues where it "
        "was interrupted: finished trials are not run again. At the end, and with --ranking, it lists the "
        "trials by the file's metric. Exit code: 0 when every trial is finished, 2 for a mistake, 128 plus "
        "the number of the signal that stopped it (SIGHUP counts as SIGTERM), else that of the last trial "
        "that failed.",
        f"{PROG} configs/sweep.yaml --count 20\n"
        f"  {PROG} configs/sweep.yaml --count 20 --cluster slurm --nodes 2 --gpus-per-node 8\n"
        f"  {PROG} configs/sweep.yaml --count 20 --ranking",
    )
    add = options.add_argument
    add("file", type=Path, metavar="FILE", help="a sweep file as W&B defines it")
    add(
        "--count", type=int, metavar="N", help="trials; the whole grid, or the file's run_cap, where left out"
    )
    add("--seed", type=int, default=0, help="of a random or Bayesian search (default: 0)")
    add("--runs", type=Path, default=Path("runs"), help="folder in which the sweep's is made (default: runs)")
    add(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="ranks of each trial on this machine (default: 1)",
    )
    add("--ranking", action="store_true", help="only list the trials that there are")
    add("--point", type=int, metavar="I", help="run this one trial only, counted from 0")
    add(
        "--cluster",
        choices=("local", "slurm"),
        default="local",
        help="slurm: an array of jobs, a trial each; other options are then those of mvat_dist.submit",
    )
    return options


def main(argv: list[str] | None = None) -> None:
    """Run, or with --ranking list, the trials of a sweep file.

    Raises:
        UserError: anything about the file or the options that the user can mend.
        SystemExit: see --help.
    """
    options, others = parser().parse_known_args(argv)
    for name, least in (("count", 1), ("processes", 1), ("seed", 0), ("point", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: give at least {least}")
    sweep = sweep_file.read(options.file)
    if options.cluster == "slurm" and not options.ranking:
        _submit_array(options, others)
        return
    if others:
        raise UserError(
            f"unknown option {others[0]}: training options belong into the command of {options.file}"
        )
    folder = SweepFolder.of(sweep, options.seed, options.runs)
    if options.ranking:
        print(folder.ranking(sweep.size(options.count)))
        return
    numbers = range(sweep.size(options.count)) if options.point is None else _only(sweep, options.point)
    os.environ[trials.PROCESSES] = str(options.processes)
    _check(folder, numbers, options.processes)
    code = _run(folder, numbers)
    if options.point is None:
        print(folder.ranking(len(numbers)))
    if code:
        raise SystemExit(code)


def _submit_array(options: argparse.Namespace, others: list[str]) -> None:
    """Submit one job of an array per trial, as `mvat_dist.submit` does for W&B's sweeps too."""
    count = [] if options.count is None else [f"--count={options.count}"]
    search = [f"--seed={options.seed}", f"--runs={options.runs.absolute()}"]
    submit.main([f"--sweep={options.file}", "--cluster=slurm", *count, *search, *others])


def _only(sweep: Sweep, number: int) -> range:
    """The one trial with this number; none in a task of an array that is longer than the sweep.

    Raises:
        UserError: outside of such a task, the sweep has no such point.
    """
    count = sweep.size(number + 1)
    if number < count:
        return range(number, number + 1)
    name = "grid" if sweep.method == "grid" else "sweep"
    numbers = f"the {name} has {count} points: 0 to {count - 1}"
    if os.environ.get("SLURM_ARRAY_TASK_ID") != str(number):
        raise UserError(f"--point {number}: {numbers}")
    print(f"nothing to do for task {number}: {numbers}")
    return range(0)


def _check(folder: SweepFolder, numbers: Iterable[int], ranks: int) -> None:
    """Check the first trial that will run, and warn of what needs a server."""
    sweep = folder.sweep
    if sweep.early_terminate:
        print(
            f"warning: without a W&B server early_terminate ({sweep.early_terminate}) ends no trial early: "
            "it compares trials that run at once",
            file=sys.stderr,
        )
    if sweep.method == "bayes":
        bayes.check_installed()
    first = next((number for number in numbers if folder.state(number) != "finished"), None)
    if first is not None:
        point = folder.point(first) or sweep.point(first, folder.seed)
        one_node = Resources(1, ranks, cpus_per_task=1, minutes=0, reader_processes=0)
        trials.check(sweep, point, folder.run_id(first), folder.path.name, one_node)


def _run(folder: SweepFolder, numbers: Iterable[int]) -> int:
    """Run the trials that are not finished, one after the other; the exit code."""
    code, failures_in_a_row = 0, 0
    with StopSignals() as signals:
        for number in numbers:
            if folder.state(number) == "finished":
                failures_in_a_row = 0
                continue
            point = folder.choose(number)
            print(f"trial {number}: {sweep_file.describe(point)}", flush=True)
            ended = _run_trial(folder, number, point, signals)
            if signals.received or signals.wait(0.0):
                print(f"stopped: the same command continues with trial {number}", file=sys.stderr)
                return 128 + signals.received[0].number
            if ended == EXIT_BUSY:  # another process with the same command runs it
                continue
            failures_in_a_row = failures_in_a_row + 1 if ended else 0
            code = ended or code
            if failures_in_a_row == _MAX_FAILURES:
                print(f"{_MAX_FAILURES} trials in a row have failed: the sweep ends", file=sys.stderr)
                break
    return code


def _run_trial(folder: SweepFolder, number: int, point: Point, signals: StopSignals) -> int:
    """Run one trial to its end, as W&B's agent would; its exit code."""
    line = trials.command_line(folder.sweep, point)
    child = processes.start(line, folder.environment(number), on_parent_death=signal.SIGTERM)
    code = processes.wait_for(child, signals)
    if code and not signals.received and folder.record(number) is None:  # it failed before it wrote its own
        run = folder.path / folder.run_id(number)
        TrialRecord(str(run), "", [], {}, code).write(folder.record_file(number))
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main))
