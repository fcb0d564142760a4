"""Put a run together on one rank: open and check its inputs, find its checkpoint, build its fleet."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mvat_dist import checkpoint, modelfile, students
from mvat_dist.collectives import batchnorms, from_rank_zero, gather
from mvat_dist.config import Config
from mvat_dist.data.stream import TrainingData, check_batch, check_readers, split_batch
from mvat_dist.data.validation import ValidationClips
from mvat_dist.devices import Precision
from mvat_dist.engine import StudentEngine, deepspeed_config
from mvat_dist.errors import UserError
from mvat_dist.files import write_json
from mvat_dist.fleet import Fleet, Student
from mvat_dist.losses import Objective
from mvat_dist.models import Manner
from mvat_dist.ranks import Ranks
from mvat_dist.rundir import RunDir
from mvat_dist.seeds import seed_for
from mvat_dist.teacher import LiveTeacher

T = TypeVar("T")


def together(build: Callable[[], T]) -> T:
    """``build()`` on every rank; where one refuses, all do, with the first refusal's words.

    Raises:
        UserError: some rank's; without this the others would wait for that rank.
    """
    refusal, found = None, []
    try:
        found.append(build())
    except UserError as error:
        refusal = str(error)
    refusals = [said for said in gather(refusal) if said]
    if refusals:
        raise UserError(refusals[0])
    return found[0]


def open_data(config: Config, world_size: int) -> tuple[TrainingData, ValidationClips]:
    """Training and validation data, checked against the run's shape.

    Raises:
        UserError: nothing packed there, a batch that ranks cannot share, fewer shards than readers.
    """
    data = TrainingData(config.data, config.seed)
    split_batch(config.train.batch, world_size, config.train.micro_batch)
    check_batch(data, config.train.batch)
    check_readers(data, world_size, config.data.workers)
    held_out = Path(config.data.valid) if config.data.valid else Path(config.data.train) / "valid"
    clips = ValidationClips(held_out, limit=config.valid.clips, max_seconds=config.valid.max_seconds)
    return data, clips


def open_teacher(config: Config, device: torch.device, precision: Precision) -> LiveTeacher | None:
    """The teacher, if the method has one.

    Raises:
        UserError: no such teacher, a file that is something else, or several to choose from.
    """
    if config.distil.method == "none":
        return None
    return LiveTeacher(modelfile.resolve(Path(config.teacher)), device, precision)


def prepare_folder(run: RunDir, config: Config) -> Path | None:
    """Make the run's folder and find the checkpoint to go on from. Called on rank 0.

    Raises:
        UserError: `resume` forbids what was found, another run lies there, or the disk is too full.
    """
    found = checkpoint.newest(run.checkpoints)
    if config.resume == "must" and found is None:
        raise UserError(
            f"--resume must, but {run.path} holds no complete checkpoint: start with --resume auto"
        )
    if config.resume == "never" and found is not None:
        raise UserError(f"--resume never, but {found} is there: choose another --name or --resume auto")
    _check_disk(run.path, config)
    run.create(config)
    return found


def build_fleet(
    config: Config,
    ranks: Ranks,
    run: RunDir,
    teacher: LiveTeacher | None,
    found: Path | None,
    device: torch.device,
    precision: Precision,
) -> Fleet:
    """Every student in its engine, new or as the checkpoint `found` has it, beside the teacher."""
    micro_batch, accumulation = split_batch(config.train.batch, ranks.world_size, config.train.micro_batch)
    fleet: list[Student] = []
    described: dict[str, dict[str, Any]] = {}
    for name, size in students.select(config.student, config.sizes).items():
        objective = Objective(config.distil, size, teacher.model.size if teacher else None)
        state = checkpoint.load(found, name) if found else None
        described[name] = deepspeed_config(
            config.engine,
            config.optim,
            parameters=students.parameters(size),
            micro_batch=micro_batch,
            accumulation=accumulation,
            precision=precision,
        )
        module = _network(config, name, state.weights if state else None)
        engine = StudentEngine(module, described[name], config.optim, device)
        engine.module.train()
        if config.engine.freeze_batchnorm:
            for norm in batchnorms(engine.module):
                norm.eval()
        student = Student(name, size, engine, objective)
        if state:
            student.restore(state)
        fleet.append(student)
    if ranks.rank == 0:
        write_json(run.deepspeed, described)
        if teacher:
            write_json(run.teacher, teacher.describe())
    return Fleet(fleet, teacher, config)


def _network(config: Config, name: str, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    """The student's network: from the seed and its name alone, so it starts the same in every fleet."""
    torch.manual_seed(seed_for(config.seed, name))
    module: nn.Module = Manner(students.get(name, config.sizes))
    if weights is not None:
        module.load_state_dict(weights)
    if config.train.batchnorm_momentum:
        for norm in batchnorms(module):
            norm.momentum = config.train.batchnorm_momentum
    if config.engine.sync_batchnorm:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return module


def choose_checkpoint(run: RunDir, config: Config, rank: int) -> Path | None:
    """Rank 0's `prepare_folder` for all ranks: they must not see different files."""
    return from_rank_zero(together(lambda: prepare_folder(run, config) if rank == 0 else None))


def _check_disk(folder: Path, config: Config) -> None:
    """Refuse to start a run whose checkpoints cannot fit.

    Raises:
        UserError: with the space needed and the space there.
    """
    sizes = students.select(config.student, config.sizes).values()
    parameters = sum(students.parameters(size) for size in sizes)
    # fp32 weights and two moments per checkpoint, one more while it is written, and best and last.
    needed = 4 * parameters * (3 * (config.train.keep + 1) + 2)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{existing} has {free / 1e9:.1f} GB free, the run's checkpoints need {needed / 1e9:.1f} GB: "
            "free space or choose another --runs"
        )
