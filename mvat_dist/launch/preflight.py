"""What `mvat_dist.submit` is about to do: checked before a job waits for it, and put in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mvat_dist.config import sizes as students
from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.data.mixing.checks import check_config, check_readers, readable_shards
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.shards.targets import read_header
from mvat_dist.errors import UserError
from mvat_dist.launch import forecast, placement
from mvat_dist.launch.cost_model import Machine
from mvat_dist.launch.forecast import Option
from mvat_dist.launch.placement import Part, Placement
from mvat_dist.launch.slurm import Resources
from mvat_dist.runs import weights
from mvat_dist.runs.folder import RunDir, run_folder


def check_inputs(config: Config) -> None:
    """What can be known of data, teacher and folder without torch, so that no job starts for nothing.

    Raises:
        UserError: with the fix.
    """
    check_config(config.data)
    _check_teacher(config)
    run = RunDir(run_folder(config))
    run.check_config(config)
    begun = any(one.checkpoints.exists() for one in (run, *map(RunDir, run.part_folders())))
    if config.train.init and not begun:
        for name, size in students.select(config.student, config.sizes).items():
            weights.first_weights(config.train.init, name, size)


def check_cache(config: Config) -> None:
    """Whether a teacher cache can be filled for this configuration, as far as a login node can know.

    Raises:
        UserError: no such teacher, or segments that no cache can hold.
    """
    check_teacher_file(config.teacher.file)
    TrainingData(config.data, config.seed).check_numbered()


def check_shares(placed: Placement, config: Config, resources: Resources) -> None:
    """Whether the processes can share the batch and the shards, and the folder is divided as asked.

    Raises:
        UserError: with the fix.
    """
    processes, parts = resources.nodes * resources.tasks_per_node, placement.parse(config)
    counts = placement.processes(parts, processes) if placed == "split" else [processes]
    for count in counts:
        if config.train.batch % count:
            raise UserError(
                f"--train.batch {config.train.batch} cannot be shared by {count} processes "
                f"({resources.nodes} nodes x {resources.tasks_per_node} tasks): choose a multiple of {count}"
            )
    check_readers(config.data, max(counts))
    placement.check(config)


def _check_teacher(config: Config) -> None:
    teacher = config.teacher
    if config.distil.method == "none":
        return
    if teacher.source == "cache":
        read_header(Path(teacher.cache))
    if teacher.file or teacher.source == "live":
        check_teacher_file(teacher.file)


def check_teacher_file(file: str) -> None:
    """Refuse a teacher that is not there.

    Raises:
        UserError: with the option.
    """
    if not file or not Path(file).exists():
        raise UserError(
            f"no such teacher: {file or 'none was given'}; give a run folder or a checkpoint with --teacher"
        )


def place(
    asked: Placement | None,
    config: Config,
    resources: Resources,
    machine: Machine | None,
    *,
    measured: bool,
    one_machine: bool,
) -> tuple[Placement, Config, list[Option]]:
    """How the students are placed, the configuration with its groups, and forecasts (none without a machine).

    What is asked for is done. Else a run that has begun stays as it is, ``--parts`` means `split`, a forecast
    from `measured` rates decides, and without one the students are together.

    Raises:
        UserError: groups for students that are to be together.
    """
    if asked == "together" and config.parts:
        raise UserError(f"--placement together: leave --parts {config.parts} out, or choose split or jobs")
    processes = resources.nodes * resources.tasks_per_node
    run = RunDir(run_folder(config))
    groups: Sequence[Part] = placement.parse(config) or placement.divided(run)
    per_node = processes if one_machine else resources.tasks_per_node
    options = _forecasts(config, processes, per_node, machine, groups)
    chosen = forecast.best(options)
    if asked is None and groups:
        asked = "split"
    elif asked is None:
        asked = chosen.placement if measured and chosen and not run.checkpoints.exists() else "together"
    if asked == "together":
        return asked, replace(config, parts=""), options
    groups = groups or _groups(asked, config, processes, options)
    return asked, replace(config, parts=placement.in_words(groups)), options


def _groups(asked: Placement, config: Config, processes: int, options: Sequence[Option]) -> Sequence[Part]:
    """The students' groups where the user gave none: as forecast, else each alone."""
    found = next((option for option in options if option.placement == asked), None)
    if found:
        return found.parts
    names = list(students.select(config.student, config.sizes))
    if asked == "split" and len(names) > 1:
        count = max((n for n in range(1, len(names) + 1) if processes % n == 0), default=1)
        return [Part(tuple(names[first::count])) for first in range(count)]
    return [Part((name,)) for name in names]


def _forecasts(
    config: Config, processes: int, per_node: int, machine: Machine | None, groups: Sequence[Part]
) -> list[Option]:
    if machine is None:
        return []
    fleet = forecast.Fleet(config, forecast.teacher_size(config), readable_shards(config.data), machine)
    return fleet.options(processes, per_node, groups)


def machine_of(file: Path | None, resources: Resources) -> Machine | None:
    """Rates to forecast with: measured ones, or a CPU node's; None for GPUs that nobody has measured."""
    if file:
        return Machine.read(file)
    return None if resources.gpus_per_node else Machine()


def text(config: Config, resources: Resources, placed: Placement) -> str:
    """What will be trained, on what, and where it will lie."""
    samples = round(config.data.segment_seconds * SAMPLE_RATE)
    sizes = students.select(config.student, config.sizes)
    processes = resources.nodes * resources.tasks_per_node
    batch = config.train.batch
    what = config.distil.method + _teacher_in_words(config)
    lines = [f"train    {what}, {config.train.steps} steps of {batch} segments"]
    lines += [
        f"         {name}: {students.parameters(size) / 1e6:.2f} M parameters, "
        f"{students.macs(size, samples) / 1e9:.3g} GMAC per {config.data.segment_seconds:g} s"
        for name, size in sizes.items()
    ]
    gpus = f", {resources.gpus_per_node} GPUs per node" if resources.gpus_per_node else ""
    if placed == "together":
        each = f"{batch // processes} of the {batch} segments per process"
    elif placed == "jobs":
        each = f"a job for each group of students: {config.parts}"
    else:
        each = f"processes dealt to groups of students: {config.parts}"
    return "\n".join([*lines, f"on       {shape(resources)}{gpus}: {each}", f"run      {run_folder(config)}"])


def forecast_text(options: Sequence[Option], machine: Machine | None, resources: Resources) -> str:
    """What each placement would cost."""
    if machine is None:
        return "forecast none: these GPUs have not been measured (--machine FILE, docs/performance.md)"
    lines = forecast.table(options).splitlines()
    chosen = forecast.best(options)
    lines.append(f"best: {chosen.placement}" if chosen else "none of them is possible")
    head = f"forecast for {machine.name}, {shape(resources)} (rates by benchmarks/scaling.py)"
    return "\n".join([head, *(f"         {line}" for line in lines)])


def _teacher_in_words(config: Config) -> str:
    if config.distil.method == "none":
        return ""
    if config.teacher.source == "cache":
        header = read_header(Path(config.teacher.cache))
        name, megabytes = header["teacher"]["name"], header["bytes"] / 1e6
        return f" beside {name} as cached in {config.teacher.cache} ({megabytes:.0f} MB)"
    return f" beside {config.teacher.file}"


def shape(resources: Resources) -> str:
    """``4 nodes x 1 task``."""
    nodes, tasks = resources.nodes, resources.tasks_per_node
    return f"{nodes} {'node' if nodes == 1 else 'nodes'} x {tasks} {'task' if tasks == 1 else 'tasks'}"
