"""A sweep without a server: ``python -m mvat_dist.sweep configs/sweep.yaml``.

It does for a sweep file what W&B's server and agent do together: chooses the points, tells a trial its
parameters as the agent does, and starts the same command. Offline, and point i is always the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from tabulate import tabulate

from mvat_dist import submit, trial
from mvat_dist.config.cli import CommandParser
from mvat_dist.errors import EXIT_BUSY, UserError, exit_code
from mvat_dist.io import write_json
from mvat_dist.launch import sweep_file, sweep_jobs, trial_command, trial_record
from mvat_dist.launch.slurm import Resources
from mvat_dist.launch.sweep_file import Point, Sweep
from mvat_dist.launch.trial_record import TrialRecord
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History

PROG = "python -m mvat_dist.sweep"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FAILURES = 3
"""Failed trials in a row after which the sweep ends, as W&B's agent does."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = CommandParser(
        PROG,
        "Run a sweep file without a W&B server: grid and random search, one trial after the other on this "
        "machine, or as an array of Slurm jobs. The same command goes on where it was interrupted: finished "
        "trials are not run again. At the end, and with --ranking, it lists the trials by the file's metric. "
        "Exit code: 0 when every trial is finished, 2 for a mistake, 128 plus the number of the signal that "
        "stopped it, else that of the last trial that failed.",
        f"{PROG} configs/sweep.yaml --count 20\n"
        f"  {PROG} configs/sweep.yaml --count 20 --cluster slurm --nodes 2 --gpus-per-node 8\n"
        f"  {PROG} configs/sweep.yaml --count 20 --ranking",
    )
    add = made.add_argument
    add("file", type=Path, metavar="FILE", help="a sweep file as W&B defines it")
    add(
        "--count", type=int, metavar="N", help="trials; the whole grid, or the file's run_cap, where left out"
    )
    add("--seed", type=int, default=0, help="of the points of a random search (default: 0)")
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
    return made


@dataclass(frozen=True)
class Plan:
    """A sweep, and where its trials lie."""

    sweep: Sweep
    seed: int
    folder: Path

    def run_id(self, number: int) -> str:
        return f"{self.folder.name}-{number:04}"

    def point(self, number: int) -> Point:
        return self.sweep.point(number, self.seed)

    def parameters(self, number: int) -> Path:
        """The file that tells the trial its parameters."""
        return self.folder / f"config-{self.run_id(number)}.yaml"

    def record(self, number: int) -> Path:
        """The file into which the trial writes itself."""
        return self.folder / f"trial-{self.run_id(number)}.json"


def main(argv: list[str] | None = None) -> None:
    """Run, or with --ranking list, the trials of a sweep file.

    Raises:
        UserError: anything about the file or the options that the user can mend.
        SystemExit: see --help.
    """
    given = sys.argv[1:] if argv is None else argv
    options, rest = parser().parse_known_args(given)
    for name, least in (("count", 1), ("processes", 1), ("seed", 0), ("point", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: give at least {least}")
    sweep = sweep_file.read(options.file)
    if options.cluster == "slurm" and not options.ranking:
        _as_array(options, rest)
        return
    if rest:
        raise UserError(
            f"unknown option {rest[0]}: training options belong into the command of {options.file}"
        )
    plan = Plan(sweep, options.seed, sweep_jobs.folder(sweep, options.seed, options.runs))
    if options.ranking:
        _print_ranking(plan, sweep.points(options.count))
        return
    code = _run(plan, options)
    if code:
        raise SystemExit(code)


def _as_array(options: argparse.Namespace, rest: list[str]) -> None:
    """One job of an array per trial, as submit starts them for W&B's sweeps too."""
    count = [] if options.count is None else [f"--count={options.count}"]
    mine = [f"--seed={options.seed}", f"--runs={options.runs.absolute()}"]
    submit.main([f"--sweep={options.file}", "--cluster=slurm", *count, *mine, *rest])


def _run(plan: Plan, options: argparse.Namespace) -> int:
    """One trial, or all that are not finished one after the other."""
    sweep = plan.sweep
    numbers = range(sweep.points(options.count)) if options.point is None else _only(sweep, options.point)
    _say_what_is_ignored(sweep)
    os.environ[trial.PROCESSES] = str(options.processes)
    if (first := next((n for n in numbers if _state(plan, n) != "finished"), None)) is not None:
        one_node = Resources(1, options.processes, cpus_per_task=1, minutes=0, reader_processes=0)
        trial_command.check(sweep, plan.point(first), plan.run_id(first), plan.folder.name, one_node)
    code, failed_in_row, stop = 0, 0, _Stop()
    with stop.listening():
        for number in numbers:
            if _state(plan, number) == "finished":
                continue
            print(f"trial {number}: {sweep_file.in_words(plan.point(number))}", flush=True)
            ended = _start(plan, number, stop)
            if stop.told:
                code = 128 + stop.told[0]
                print(f"stopped: the same command goes on with trial {number}", file=sys.stderr)
                break
            if ended == EXIT_BUSY:  # by another process with the same command
                continue
            failed_in_row = failed_in_row + 1 if ended else 0
            code = ended or code
            if failed_in_row == _FAILURES:
                print(f"{_FAILURES} trials in a row have failed: the sweep ends", file=sys.stderr)
                break
    if options.point is None:
        _print_ranking(plan, len(numbers))
    return code


def _only(sweep: Sweep, number: int) -> range:
    """The point of this number; none in a task of an array that is longer than the sweep."""
    count = sweep.points(number + 1)
    if number < count:
        return range(number, number + 1)
    has = f"the {sweep.method if sweep.method == 'grid' else 'sweep'} has {count} points: 0 to {count - 1}"
    if os.environ.get("SLURM_ARRAY_TASK_ID") != str(number):
        raise UserError(f"--point {number}: {has}")
    print(f"nothing to do for task {number}: {has}")
    return range(0)


def _say_what_is_ignored(sweep: Sweep) -> None:
    ignored = []
    if sweep.method == "bayes":
        ignored.append("method bayes asks what other trials have found: the points are random")
    if sweep.early_terminate:
        ignored.append(
            f"early_terminate ({sweep.early_terminate}) compares trials that run at once: none is ended early"
        )
    if ignored:
        print(f"warning: without a W&B server {'; '.join(ignored)}", file=sys.stderr)


def _start(plan: Plan, number: int, stop: _Stop) -> int:
    """Run one trial to its end, as W&B's agent would; a shell's exit code."""
    point = plan.point(number)
    trial_record.write_parameters(plan.parameters(number), point)
    line = trial_command.command_line(plan.sweep, point)
    # In a session of its own, so that Ctrl-C reaches it once, through us.
    child = subprocess.Popen(line, env=_environment(plan, number), start_new_session=True)
    code = stop.wait_for(child)
    if code and not stop.told and not plan.record(number).exists():  # it failed before it wrote its own
        failed = TrialRecord(str(plan.folder / plan.run_id(number)), "", [], {}, code)
        write_json(plan.record(number), asdict(failed))
    return code


def _environment(plan: Plan, number: int) -> dict[str, str]:
    """What a trial hears; without WANDB_SWEEP_ID, for no server knows this sweep."""
    environment = {name: value for name, value in os.environ.items() if name not in trial_record.VARIABLES}
    environment |= {
        "WANDB_RUN_ID": plan.run_id(number),
        "WANDB_SWEEP_PARAM_PATH": str(plan.parameters(number)),
        "WANDB_RUN_GROUP": plan.folder.name,
        trial_record.RECORD: str(plan.record(number)),
    }
    environment.setdefault("WANDB_MODE", "offline")
    return environment


@dataclass
class _Stop:
    """Who asks this process to stop asks the trial that runs."""

    told: list[int] = field(default_factory=list)
    """Signals so far."""
    child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals until the block ends."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.told.append(number)
        if self.child:
            self.child.send_signal(number)

    def wait_for(self, child: subprocess.Popen[bytes]) -> int:
        """Its exit code, as a shell says it."""
        self.child = child
        if self.told:  # before there was anybody to pass it on to
            child.send_signal(self.told[-1])
        code = child.wait()
        self.child = None
        return code if code >= 0 else 128 - code


def _state(plan: Plan, number: int) -> str:
    """`new`, or the state of the trial's run; `failed` too where it did not get so far as to make one."""
    if (found := trial_record.read(plan.record(number))) is None:
        return "new"
    return str(RunDir(Path(found.run)).read_status().get("state", "failed" if found.exit_code else "new"))


def _print_ranking(plan: Plan, count: int) -> None:
    """All trials by the last value of the metric, as W&B's summary has it; those without one at the end."""
    sweep = plan.sweep
    sign = -1 if sweep.goal == "maximize" else 1
    scores = {number: _score(plan, number) for number in range(count)}
    order = sorted(scores, key=lambda number: (scores[number][0] is None, sign * (scores[number][0] or 0.0)))
    states = {number: _state(plan, number) for number in order}
    rows = [[n, *scores[n], states[n], sweep_file.in_words(plan.point(n))] for n in order]
    headers = ["trial", f"{sweep.metric} {'↑' if sign < 0 else '↓'}", "step", "state", "parameters"]
    print(tabulate(rows, headers, floatfmt=".4g", missingval="-", tablefmt="github"))
    if scores[order[0]][0] is None:
        if "finished" in states.values():
            print(
                f"no finished trial has logged {sweep.metric!r}: is it the name of a score in history.jsonl?",
                file=sys.stderr,
            )
    elif best := trial_record.read(plan.record(order[0])):
        print(f"best: {RunDir(Path(best.run)).weights(best.student, 'best')}")


def _score(plan: Plan, number: int) -> tuple[float | None, int | None]:
    """The last value of the metric, and its step."""
    found = trial_record.read(plan.record(number))
    if found:
        for row in reversed(History(RunDir(Path(found.run)).history(found.student)).rows()):
            if isinstance(value := row.get(plan.sweep.metric), (int, float)):
                return value, row["step"]
    return None, None


if __name__ == "__main__":
    sys.exit(exit_code(main))
