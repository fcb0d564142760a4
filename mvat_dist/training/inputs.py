"""Open what a run learns from - data, validation clips, teacher, losses - and check that it fits together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mvat_dist.config import sizes
from mvat_dist.config.schema import Config
from mvat_dist.data.clips import ValidationClips
from mvat_dist.data.loader import check_batch, split_batch
from mvat_dist.data.mixing.checks import check_readers
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.shards.corpus import Corpus, cache_of, locate
from mvat_dist.data.shards.manifest import Folder
from mvat_dist.data.shards.targets import TeacherCache, cache_folder
from mvat_dist.distributed.device import Precision
from mvat_dist.errors import UserError
from mvat_dist.losses.objective import Objective
from mvat_dist.models import weights as model_files
from mvat_dist.runs import weights as run_weights
from mvat_dist.training.teacher import CachedTeacher, LiveTeacher, Teacher


@dataclass(frozen=True)
class Inputs:
    """What a run learns from."""

    data: TrainingData
    clips: ValidationClips
    teacher: Teacher | None
    objectives: dict[str, Objective]
    """Loss of each student, by name, in the order of the run."""


def open_inputs(config: Config, world_size: int, device: torch.device, precision: Precision) -> Inputs:
    """Open everything a run reads, and check that it fits together, before anything is written.

    Raises:
        UserError: nothing packed there, a batch that ranks cannot share, fewer shards than readers, a
            teacher that is none, or one without a multi-view block in common with a student, or a teacher
            cache of other segments or by another teacher.
    """
    check_readers(config.data, world_size)
    cache = _open_cache(config, precision)
    data = TrainingData(config.data, config.seed, cache)
    split_batch(config.train.batch, world_size, config.train.micro_batch)
    check_batch(data, config.train.batch)
    clips = ValidationClips(held_out(config), limit=config.valid.clips, max_seconds=config.valid.max_seconds)
    teacher: Teacher | None = None
    if cache is not None:
        teacher = CachedTeacher(cache)
    elif config.distil.method != "none":
        teacher = LiveTeacher(run_weights.resolve(Path(config.teacher.file)), device, precision)
    objectives = {
        name: Objective(config.distil, size, teacher.size if teacher else None, config.loss)
        for name, size in sizes.select(config.student, config.sizes).items()
    }
    if teacher:
        maps = {key for objective in objectives.values() for key in objective.keys}
        teacher.select(maps, output="output" in config.distil.method)
    return Inputs(data, clips, teacher, objectives)


def _open_cache(config: Config, precision: Precision) -> TeacherCache | None:
    """The teacher cache, where the run learns from one; it must be the named teacher's, if one is named."""
    if config.distil.method == "none" or config.teacher.source != "cache":
        return None
    cache = TeacherCache(cache_folder(config.teacher.cache, cache_of(config.data)))
    cache.check_precision(precision)
    if config.teacher.file:
        file = run_weights.resolve(Path(config.teacher.file))
        cache.check_teacher(model_files.fingerprint(model_files.load(file).model), file)
    return cache


def held_out(config: Config) -> list[Folder]:
    """The folders of the validation subset.

    Raises:
        UserError: the corpus has none, and none is given.
    """
    if config.data.valid:
        return locate("--data.valid", config.data.valid, cache_of(config.data))
    if folders := Corpus.of(config.data).subset("valid"):
        return folders
    raise UserError(
        f"{config.data.train} has no subset valid: give one, or a folder of pairs, by --data.valid"
    )
