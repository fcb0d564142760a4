"""Check what a job will need before it waits in a queue, and print what it will do. No torch."""

from __future__ import annotations

from pathlib import Path

from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.data.mixing.checks import check_config, check_readers
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.shards.corpus import cache_of
from mvat_dist.data.shards.targets import cache_folder, read_cache_manifest
from mvat_dist.errors import UserError
from mvat_dist.launch.slurm import Resources
from mvat_dist.runs import weights
from mvat_dist.runs.folder import RunDir, run_folder


def check_inputs(config: Config) -> None:
    """Check data, teacher, first weights and run folder, as far as a login node can.

    Raises:
        UserError: with the fix.
    """
    check_config(config.data)
    _check_teacher(config)
    run = RunDir(run_folder(config))
    run.check_config(config)
    if config.train.init and not run.checkpoints.exists():
        for name, size in sizes.select(config.student, config.sizes).items():
            weights.first_weights(config.train.init, name, size)


def check_cache(config: Config) -> None:
    """Check whether a teacher cache can be filled for this configuration, as far as a login node can.

    Raises:
        UserError: no such teacher, or segments that no cache can hold.
    """
    check_teacher_file(config.teacher.file)
    TrainingData(config.data, config.seed).check_numbered()


def check_sharing(config: Config, resources: Resources) -> None:
    """Check whether the processes can share the batch and the shards.

    Raises:
        UserError: with the fix.
    """
    processes = resources.processes
    if config.train.batch % processes:
        raise UserError(
            f"--train.batch {config.train.batch} cannot be shared by {processes} processes "
            f"({resources.nodes} nodes x {resources.tasks_per_node} tasks): choose a multiple of {processes}"
        )
    check_readers(config.data, processes)


def _check_teacher(config: Config) -> None:
    teacher = config.teacher
    if config.distil.method == "none":
        return
    if teacher.source == "cache":
        read_cache_manifest(cache_folder(teacher.cache, cache_of(config.data)))
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


def text(config: Config, resources: Resources) -> str:
    """Describe what will be trained, on how many processes and in which folder."""
    samples = round(config.data.segment_seconds * SAMPLE_RATE)
    batch, processes = config.train.batch, resources.processes
    method = config.distil.method + _teacher_in_words(config)
    lines = [f"train    {method}, {config.train.steps} steps of {batch} segments"]
    lines += [
        f"         {name}: {sizes.parameters(size) / 1e6:.2f} M parameters, "
        f"{sizes.macs(size, samples) / 1e9:.3g} GMAC per {config.data.segment_seconds:g} s"
        for name, size in sizes.select(config.student, config.sizes).items()
    ]
    gpus = f", {resources.gpus_per_node} GPUs per node" if resources.gpus_per_node else ""
    lines.append(
        f"on       {shape(resources)}{gpus}: {batch // processes} of the {batch} segments per process"
    )
    return "\n".join([*lines, f"run      {run_folder(config)}"])


def _teacher_in_words(config: Config) -> str:
    if config.distil.method == "none":
        return ""
    if config.teacher.source == "cache":
        manifest = read_cache_manifest(cache_folder(config.teacher.cache, cache_of(config.data)))
        name, megabytes = manifest.teacher.name, manifest.bytes / 1e6
        return f" beside {name} as cached in {config.teacher.cache} ({megabytes:.0f} MB)"
    return f" beside {config.teacher.file}"


def shape(resources: Resources) -> str:
    """``4 nodes x 1 task``."""
    nodes, tasks = resources.nodes, resources.tasks_per_node
    return f"{nodes} {'node' if nodes == 1 else 'nodes'} x {tasks} {'task' if tasks == 1 else 'tasks'}"
