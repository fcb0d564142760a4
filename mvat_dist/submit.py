"""Start a run on a cluster, or on this machine: ``python -m mvat_dist.submit``.

Its own options say where and on what. Every other option is the trainer's and is checked here, before a job
waits in a queue. On Slurm the run is one job on all nodes; without Slurm its processes run here.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from mvat_dist import cache
from mvat_dist.config.cli import CommandParser
from mvat_dist.config.parser import parse
from mvat_dist.config.schema import Config
from mvat_dist.data.pool import available_cores
from mvat_dist.distributed import slurm
from mvat_dist.errors import UserError, exit_code
from mvat_dist.launch import preflight, submission, sweep_jobs
from mvat_dist.launch.slurm import Resources
from mvat_dist.runs.folder import RunDir, run_folder

_SLURM_ONLY = ("partition", "account", "qos", "mem", "constraint", "exclude", "wckey", "time")


def parser() -> argparse.ArgumentParser:
    """The options that are not the trainer's."""
    command = CommandParser(
        "python -m mvat_dist.submit",
        "Start a training run on Slurm, or as processes on this machine. Every option that is not listed "
        "belongs to the trainer: python -m mvat_dist.train --help. Exit code: 0 when the job is queued (with "
        "--wait, and on this machine, when the run is finished), 2 for a mistake in the options or the "
        "data, 3 when another process trains this run already, else the training's own: 128 plus the "
        "number of the signal that stopped it.",
        "python -m mvat_dist.submit --nodes 4 --gpus-per-node 8 --time 2-00:00:00 \\\n"
        "      --config configs/distil.yaml --teacher runs/teacher --student all",
    )
    add = command.add_argument
    add(
        "--cluster",
        choices=("auto", "slurm", "local"),
        default="auto",
        help="where; auto is Slurm where there is one, else this machine (default: auto)",
    )
    add("--dry-run", action="store_true", help="show the plan and the job script; start and write nothing")
    add(
        "--cache",
        type=int,
        metavar="TASKS",
        help="fill a teacher cache by an array of so many jobs; the other options are then those of "
        "python -m mvat_dist.cache",
    )
    add(
        "--sweep",
        metavar="SWEEP",
        help="run trials of a W&B sweep (ENTITY/PROJECT/ID or its address) or a sweep file: an array of jobs",
    )
    add(
        "--count",
        type=int,
        metavar="N",
        help="of --sweep: trials, each a job on all nodes (default: all points of a file; for W&B's one, on "
        "this machine until the sweep ends)",
    )
    add("--wait", action="store_true", help="wait for the job; the exit code is that of the training")
    _add_size(command)
    _add_slurm(command)
    return command


def _add_size(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("size of the job").add_argument
    add("--nodes", type=int, default=1, help="default: 1")
    add("--gpus-per-node", type=int, help="one task runs per GPU")
    add("--tasks-per-node", type=int, help="processes per node (default: --gpus-per-node, else 1)")
    add("--cpus-per-task", type=int, help="default: --data.workers + 1")
    add("--mem", help="memory per node, as sbatch takes it: 64G")
    add("--time", default="1-00:00:00", help="limit in minutes or as D-HH:MM:SS (default: 1-00:00:00)")


def _add_slurm(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("Slurm (the site's defaults where left out)").add_argument
    add("--partition")
    add("--account")
    add("--qos")
    add("--constraint", help="features that the nodes must have")
    add("--exclude", help="nodes to leave out")
    add("--wckey")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line run before the ranks start")
    add("--srun-args", default="", metavar="ARGS", help="of srun, as in --srun-args='--mpi=none'")
    add("--slurm", action="append", default=[], metavar="KEY[=VALUE]", help="any other option of sbatch")
    add(
        "--signal-delay",
        type=int,
        default=120,
        metavar="SECONDS",
        help="warning before the time limit: more than the slowest step and a save take (default: 120)",
    )
    add(
        "--max-restarts",
        type=int,
        default=1000,
        help="times the job is queued again after its time limit or a preemption (default: 1000)",
    )


def main(argv: list[str] | None = None) -> None:
    """Start, or with --dry-run describe, what the command line says.

    Raises:
        UserError: anything the user can mend, before a job waits for it.
        SystemExit: the training's exit code where this process has waited for it and it failed, or
            `errors.EXIT_BUSY`.
    """
    options, rest = parser().parse_known_args(argv)
    if options.cache is not None:
        _fill_cache(options, rest)
        return
    if options.sweep is not None:
        _start_sweep(options, rest)
        return
    config = parse(rest, prog="python -m mvat_dist.submit")
    resources = _resources(options, config)
    preflight.check_inputs(config)
    preflight.check_sharing(config, resources)
    reason = _why_local(options)
    run = RunDir(run_folder(config))
    print(preflight.text(config, resources))
    if reason:
        _print_local(reason, resources, options)
    if options.dry_run:
        if not reason:
            print(f"\n{submission.job_script(run, resources)}")
        return
    if reason:
        code = submission.locally(run, config, rest, resources)
    else:
        code, job = submission.on_slurm(run, config, resources)
        if job and options.wait:
            code = submission.wait_for(run, job)
    if code:
        raise SystemExit(code)


def _fill_cache(options: argparse.Namespace, rest: list[str]) -> None:
    if options.cache < 1:
        raise UserError(f"--cache {options.cache}: give at least one task")
    if options.nodes != 1 or (options.tasks_per_node or 1) != 1 or (options.gpus_per_node or 1) != 1:
        raise UserError(
            "--cache TASKS: each task is one process with at most one GPU; leave --nodes and "
            "--tasks-per-node out, and give --gpus-per-node 1 or none"
        )
    if options.wait:
        raise UserError("--wait is for training; watch the array with squeue")
    cache_options, config = cache.parse(rest)
    resources = _resources(options, config)
    preflight.check_teacher_file(config.teacher.file)
    if reason := _why_local(options):
        print(f"local    {reason}: the cache is filled by this machine's cores")
        cache.main([*rest, "--dry-run"] if options.dry_run else rest)
        return
    preflight.check_cache(config)
    out = Path(cache_options.out).absolute()
    submission.cache_on_slurm(out, rest, options.cache, resources, dry_run=options.dry_run)


def _start_sweep(options: argparse.Namespace, rest: list[str]) -> None:
    resources = _resources(options, Config())
    reason = _why_local(options)
    target = sweep_jobs.read_target(options.sweep, rest, resources)
    if reason:
        _print_local(reason, resources, options)
    start = sweep_jobs.locally if reason else sweep_jobs.on_slurm
    start(target, options.count, resources, dry_run=options.dry_run)


def minutes(text: str) -> int:
    """Whole minutes, rounded up, of a time limit in Slurm's syntax.

    ``90`` and ``90:00`` are minutes (and seconds), ``1:30:00`` hours, ``2-12``, ``2-12:00`` and
    ``2-12:00:00`` days and hours.

    Raises:
        UserError: no such form, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise UserError(f"--time {text!r}: give minutes (90), H:MM:SS (1:30:00) or D-HH:MM:SS (2-12:00:00)")
    days, *numbers = match.groups()
    given = [int(number) for number in numbers if number is not None]
    if days is not None:  # D-H, D-H:M, D-H:M:S
        hours, mins, seconds = (*given, 0, 0)[:3]
    elif len(given) == 3:
        hours, mins, seconds = given
    else:  # M, M:S
        hours, (mins, seconds) = 0, (*given, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    if total == 0:
        raise UserError(f"--time {text!r} is no time: a job needs a limit above 0")
    return -(-total // 60)


def _check_counts(options: argparse.Namespace) -> None:
    at_least = {
        "nodes": 1,
        "gpus_per_node": 0,
        "tasks_per_node": 1,
        "cpus_per_task": 1,
        "signal_delay": 1,
        "max_restarts": 0,
        "count": 1,
    }
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least {least}")


def _other_options(pairs: list[str]) -> dict[str, str | bool]:
    """sbatch's long options by name, from KEY or KEY=VALUE each."""
    more: dict[str, str | bool] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not re.fullmatch(r"(--)?[A-Za-z][A-Za-z0-9-]*", key):
            raise UserError(f"--slurm {pair!r}: give KEY or KEY=VALUE, as in --slurm mail-type=END")
        more[key.removeprefix("--")] = value if equals else True
    return more


def _resources(options: argparse.Namespace, config: Config) -> Resources:
    """What Slurm is asked for, with the options that were left out filled in."""
    _check_counts(options)
    gpus = options.gpus_per_node or None
    tasks = options.tasks_per_node or gpus or 1
    if gpus and tasks > gpus:
        raise UserError(
            f"--tasks-per-node {tasks} for {gpus} GPUs per node: every task needs a GPU of its own"
        )
    try:
        srun_args = tuple(shlex.split(options.srun_args))
    except ValueError as error:
        raise UserError(f"--srun-args {options.srun_args!r}: {error}") from error
    return Resources(
        nodes=options.nodes,
        tasks_per_node=tasks,
        cpus_per_task=options.cpus_per_task or config.data.workers + 1,
        minutes=minutes(options.time),
        reader_processes=config.data.workers,
        gpus_per_node=gpus,
        signal_delay=options.signal_delay,
        max_restarts=options.max_restarts,
        setup=tuple(options.setup),
        srun_args=srun_args,
        more=_other_options(options.slurm),
        **{name: getattr(options, name) for name in _SLURM_ONLY if name != "time"},
    )


def _why_local(options: argparse.Namespace) -> str | None:
    """Why the run stays on this machine; None where it goes to Slurm."""
    if options.cluster == "local":
        return "as asked"
    if options.cluster == "auto":
        return slurm.why_unavailable()
    reason = slurm.why_unavailable()
    if reason:
        raise UserError(f"--cluster slurm: {reason}; choose --cluster local to train on this machine")
    return None


def _print_local(reason: str, resources: Resources, options: argparse.Namespace) -> None:
    count = resources.processes
    what = "1 local process" if count == 1 else f"{count} local processes"
    print(f"local    {reason}: {preflight.shape(resources)} run as {what}")
    if count > available_cores():
        print(f"         they share {available_cores()} cores: expect it to be slow")
    defaults = parser().parse_args([])
    ignored = [f"--{name}" for name in _SLURM_ONLY if getattr(options, name) != getattr(defaults, name)]
    if ignored:
        print(f"         without Slurm these mean nothing: {', '.join(ignored)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
