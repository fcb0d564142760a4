"""Put a run together on one rank: open and check its inputs, find its checkpoint, build its fleet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvat_dist.config import sizes as students
from mvat_dist.config.schema import Config
from mvat_dist.data.clips import ValidationClips
from mvat_dist.data.loader import TrainingData, check_batch, split_batch
from mvat_dist.data.mixing.checks import check_readers
from mvat_dist.data.shards.corpus import Corpus, cache_of, fingerprints, locate
from mvat_dist.data.shards.folders import Folder
from mvat_dist.data.shards.targets import Lessons
from mvat_dist.distributed.collectives import batchnorms, broadcast_object, run_on_all_ranks
from mvat_dist.distributed.device import Precision
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError
from mvat_dist.io import check_space, read_json, write_json
from mvat_dist.losses.objective import Objective
from mvat_dist.models import weights as modelfile
from mvat_dist.models.manner import Manner
from mvat_dist.runs import weights as weightsfile
from mvat_dist.runs.folder import RunDir
from mvat_dist.training import checkpoint
from mvat_dist.training.checkpoint import StudentState
from mvat_dist.training.engine import StudentEngine, deepspeed_config
from mvat_dist.training.seeds import seed_for
from mvat_dist.training.students import Fleet, Student
from mvat_dist.training.teacher import CachedTeacher, LiveTeacher, Teacher


@dataclass(frozen=True)
class Inputs:
    """What a run learns from."""

    data: TrainingData
    clips: ValidationClips
    teacher: Teacher | None
    objectives: dict[str, Objective]
    """Loss of each student, by name, in the order of the fleet."""


def open_inputs(config: Config, world_size: int, device: torch.device, precision: Precision) -> Inputs:
    """Open everything a run reads, and check that it fits together, before anything is written.

    Raises:
        UserError: nothing packed there, a batch that ranks cannot share, fewer shards than readers, a
            teacher that is none, or one without a multi-view block in common with a student, or a teacher
            cache of other segments or by another teacher.
    """
    check_readers(config.data, world_size)
    lessons = _open_cache(config, precision)
    data = TrainingData(config.data, config.seed, lessons)
    split_batch(config.train.batch, world_size, config.train.micro_batch)
    check_batch(data, config.train.batch)
    clips = ValidationClips(_held_out(config), limit=config.valid.clips, max_seconds=config.valid.max_seconds)
    teacher: Teacher | None = None
    if lessons is not None:
        teacher = CachedTeacher(lessons)
    elif config.distil.method != "none":
        teacher = LiveTeacher(weightsfile.resolve(Path(config.teacher.file)), device, precision)
    objectives = {
        name: Objective(config.distil, size, teacher.size if teacher else None, config.loss)
        for name, size in students.select(config.student, config.sizes).items()
    }
    if teacher:
        maps = {key for objective in objectives.values() for key in objective.keys}
        teacher.want(maps, output="output" in config.distil.method)
    return Inputs(data, clips, teacher, objectives)


def _open_cache(config: Config, precision: Precision) -> Lessons | None:
    """The teacher cache, where the run learns from one; it is that of the named teacher, if one is named."""
    if config.distil.method == "none" or config.teacher.source != "cache":
        return None
    lessons = Lessons(config.teacher.cache)
    lessons.check_precision(precision)
    if config.teacher.file:
        file = weightsfile.resolve(Path(config.teacher.file))
        lessons.check_teacher(modelfile.fingerprint(modelfile.load(file).model), file)
    return lessons


def _held_out(config: Config) -> list[Folder]:
    if config.data.valid:
        return locate("--data.valid", config.data.valid, cache_of(config.data))
    if folders := Corpus.of(config.data).subset("valid"):
        return folders
    raise UserError(
        f"{config.data.train} has no subset valid: give one, or a folder of pairs, by --data.valid"
    )


def claim_folder(run: RunDir, config: Config, inputs: Inputs, ranks: Ranks) -> Path | None:
    """Make the run's folder and choose the checkpoint to go on from, the same on every rank.

    Raises:
        UserError: `resume` forbids what was found, another run lies there, the data or the teacher has
            changed since, the disk is too full, or a rank does not see rank 0's folder.
    """
    found = run_on_all_ranks(lambda: _claim(run, config, inputs) if ranks.rank == 0 else None)
    found = broadcast_object(found)
    stamp = broadcast_object(run.stamp())
    run_on_all_ranks(lambda: run.await_stamp(stamp))
    return found


def _claim(run: RunDir, config: Config, inputs: Inputs) -> Path | None:
    """`claim_folder` on rank 0."""
    found = checkpoint.newest(run.checkpoints)
    if config.resume == "must" and found is None:
        raise UserError(
            f"--resume must, but {run.path} holds no complete checkpoint: start with --resume auto"
        )
    if config.resume == "never" and found is not None:
        raise UserError(f"--resume never, but {found} is there: choose another --name or --resume auto")
    read = {
        "teacher": inputs.teacher.describe() if inputs.teacher else None,
        "data": fingerprints([*Corpus.of(config.data).all_folders(), *_held_out(config)]),
    }
    given = _given_weights(config, found)
    if found:
        run.check_inputs(read)
    _check_disk(run.path, config)
    run.create(config)
    known = read_json(run.inputs).get("init", {}) if found and run.inputs.exists() else {}
    for name, loaded in given.items():
        # A copy: a rollback, or a node that comes later, must not depend on what lies elsewhere.
        state = loaded.model.state_dict()
        modelfile.save(run.weights(name, "first"), state, name=name, size=loaded.model.size, step=None)
        known[name] = {"name": loaded.name, "sha256": modelfile.fingerprint(loaded.model)}
    run.record_inputs(read | {"init": known})
    return found


def _given_weights(config: Config, found: Path | None) -> dict[str, modelfile.LoadedModel]:
    """What `train.init` gives the students that the checkpoint `found` does not hold yet, by name.

    Raises:
        UserError: nothing that fits one of them.
    """
    if not config.train.init:
        return {}
    begun = checkpoint.progress_of(found) if found else {}
    given = {}
    for name, size in students.select(config.student, config.sizes).items():
        if name not in begun:
            file = weightsfile.first_weights(config.train.init, name, size)
            given[name] = modelfile.load(file)
            if (its := given[name].model.size) != size:  # a checkpoint of the authors says so only when read
                raise UserError(f"--train.init {file} is {its}, but the student {name} is {size}")
    return given


def position(config: Config, found: Path | None) -> int:
    """Steps that the student furthest behind has done; one that joins now has done none.

    The others wait for it: it hears what it would have heard in the fleet from the start. Students that were
    given up do not count.
    """
    progress = checkpoint.progress_of(found) if found else {}
    new = {"steps": 0, "given_up": False}
    mine: list[dict[str, Any]] = [
        progress.get(name, new) for name in students.select(config.student, config.sizes)
    ]
    return min(int(one["steps"]) for one in [one for one in mine if not one["given_up"]] or mine)


def healthy_state(run: RunDir, config: Config, name: str, ranks: Ranks) -> StudentState:
    """A student as the newest checkpoint has it in which its last gradient was finite, or as it began.

    The same on every rank.
    """
    healthy = partial(checkpoint.is_well, name=name)
    chosen = run_on_all_ranks(
        lambda: checkpoint.newest(run.checkpoints, healthy) if ranks.rank == 0 else None
    )
    found = broadcast_object(chosen)
    # Together: the next save removes checkpoints, and no rank may still be reading one.
    state = run_on_all_ranks(lambda: checkpoint.load(found, name) if found else None)
    return state or StudentState(dict(_network(config, run, name, None).state_dict()), {}, {})


def left_out(found: Path | None, config: Config) -> dict[str, StudentState]:
    """States of the students that the checkpoint `found` holds and the run no longer trains.

    Later checkpoints keep them, so that such a student can come back.
    """
    training = students.select(config.student, config.sizes)
    absent = checkpoint.progress_of(found).keys() - training.keys() if found else set()
    return {name: state for name in absent if found and (state := checkpoint.load(found, name))}


def build_fleet(
    config: Config,
    ranks: Ranks,
    run: RunDir,
    inputs: Inputs,
    found: Path | None,
    device: torch.device,
    precision: Precision,
) -> Fleet:
    """Every student in its engine, new or as the checkpoint `found` has it, beside the teacher."""
    micro_batch, accumulation = split_batch(config.train.batch, ranks.world_size, config.train.micro_batch)
    fleet: list[Student] = []
    described: dict[str, dict[str, Any]] = {}
    for name, objective in inputs.objectives.items():
        size = students.get(name, config.sizes)
        state = checkpoint.load(found, name) if found else None
        described[name] = deepspeed_config(
            config.engine,
            config.optim,
            parameters=students.parameters(size),
            micro_batch=micro_batch,
            accumulation=accumulation,
            precision=precision,
        )
        module = _network(config, run, name, state.weights if state else None)
        engine = StudentEngine(module, described[name], config.optim, device)
        engine.module.train()
        if config.engine.freeze_batchnorm:
            for norm in batchnorms(engine.module):
                norm.eval()
        student = Student(name, size, engine, objective)
        if state:
            student.restore(state)
        fleet.append(student)
    run_on_all_ranks(lambda: write_json(run.deepspeed, described) if ranks.rank == 0 else None)
    return Fleet(fleet, inputs.teacher, config)


def _network(config: Config, run: RunDir, name: str, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    """The student's network with `weights`, or as it begins.

    That is as it was given, or from the seed and its name alone, so that it is the same in every fleet.
    """
    torch.manual_seed(seed_for(config.seed, name))
    module: nn.Module = Manner(students.get(name, config.sizes))
    if weights is None and config.train.init:
        weights = dict(modelfile.load(run.weights(name, "first")).model.state_dict())
    if weights is not None:
        module.load_state_dict(weights)
    if config.train.batchnorm_momentum:
        for norm in batchnorms(module):
            norm.momentum = config.train.batchnorm_momentum
    if config.engine.sync_batchnorm:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return module


def _check_disk(folder: Path, config: Config) -> None:
    """Refuse to start a run whose checkpoints cannot fit.

    Raises:
        UserError: with the space needed and the space there.
    """
    sizes = students.select(config.student, config.sizes).values()
    parameters = sum(students.parameters(size) for size in sizes)
    # fp32 weights and two moments per checkpoint, one more while it is written, and best and last.
    needed = 4 * parameters * (3 * (config.train.keep + 1) + 2)
    there = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    check_space(folder, needed - there, f"the checkpoints of {folder}", "choose another --runs")
