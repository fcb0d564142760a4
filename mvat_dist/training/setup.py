"""Put a run together on one rank: claim its folder, find its checkpoint, build its students and the rest."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvat_dist.config import sizes
from mvat_dist.config.schema import Config
from mvat_dist.data.clips import ValidationClips
from mvat_dist.data.loader import split_batch
from mvat_dist.data.shards.corpus import Corpus, fingerprints
from mvat_dist.distributed.collectives import (
    batchnorms,
    broadcast_object,
    run_on_all_ranks,
    run_on_rank_zero,
)
from mvat_dist.distributed.device import Precision
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import BusyError, UserError
from mvat_dist.io import check_space, read_json, write_json
from mvat_dist.models import weights as model_files
from mvat_dist.models.manner import Manner
from mvat_dist.runs import environment
from mvat_dist.runs import weights as run_weights
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.status import RunState, words_of
from mvat_dist.training import checkpoint
from mvat_dist.training.checkpoint import Progress, StudentState
from mvat_dist.training.engine import StudentEngine, deepspeed_config
from mvat_dist.training.fault_tolerance import FaultTolerance
from mvat_dist.training.inputs import Inputs, held_out, open_inputs
from mvat_dist.training.prefetch import Prefetcher
from mvat_dist.training.recorder import Examples, Recorder
from mvat_dist.training.recovery import Recovery
from mvat_dist.training.schedule import Schedule
from mvat_dist.training.students import Student, StudentGroup
from mvat_dist.training.throughput import Stopwatch, clock_of


@dataclass(frozen=True)
class Components:
    """Everything a trainer works with, opened and checked."""

    ranks: Ranks
    run: RunDir
    device: torch.device
    step: int
    """Steps that were done before this start."""
    students: StudentGroup
    inactive: dict[str, StudentState]
    """On rank 0: students of the checkpoint that the run no longer trains."""
    recovery: Recovery
    prefetcher: Prefetcher
    clips: ValidationClips
    audio_per_step: float
    """Seconds of audio in a global batch."""
    status: RunState | None
    """On rank 0."""
    recorder: Recorder | None
    """On rank 0."""


def open_run(
    config: Config,
    ranks: Ranks,
    run: RunDir,
    device: torch.device,
    precision: Precision,
    fault_tolerance: FaultTolerance,
) -> Components:
    """Open everything, on all ranks together.

    Raises:
        UserError: anything about the data, the teacher or the folder that the user can mend.
        BusyError: another process trains the run.
    """
    inputs = run_on_all_ranks(lambda: open_inputs(config, ranks.world_size, device, precision))
    fault_tolerance.progress("starting", 0)
    if owner := broadcast_object(run_on_rank_zero(fault_tolerance.acquire_folder)):
        raise BusyError(
            f"{run.path} is being started or trained by {owner}: nothing new was started",
            say=ranks.rank == 0,
        )
    saved = claim_folder(run, config, inputs)
    step = resume_step(config, saved)
    status = run_on_rank_zero(lambda: _note_start(run, config, step))
    try:
        students = build_students(config, ranks, run, inputs, saved, device, precision)
        inactive = run_on_rank_zero(lambda: inactive_students(saved, config)) or {}
        recovery = Recovery(config.train, run, students, partial(_first_state, config, run))
        prefetcher = Prefetcher(inputs.data, config.data, config.train, ranks, step)
        # Last, because nobody closes the recorder where something after it fails.
        recorder = run_on_rank_zero(lambda: _open_recorder(config, ranks, run, inputs, students))
    except Exception as error:
        if status and fault_tolerance.owns_folder():  # STATUS says already that the run has begun
            code = error.code if isinstance(error, UserError) else 1
            with suppress(OSError):
                status.write("failed", step, exit_code=code, reason=words_of(error))
        raise
    return Components(
        ranks=ranks,
        run=run,
        device=device,
        step=step,
        students=students,
        inactive=inactive,
        recovery=recovery,
        prefetcher=prefetcher,
        clips=inputs.clips,
        audio_per_step=config.train.batch * config.data.segment_seconds,
        status=status,
        recorder=recorder,
    )


def _note_start(run: RunDir, config: Config, step: int) -> RunState:
    """Note in STATUS that this start has begun, before anything else can fail."""
    status = RunState(run, config.train.steps, step)
    status.write("running", step)
    return status


def _open_recorder(
    config: Config, ranks: Ranks, run: RunDir, inputs: Inputs, students: StudentGroup
) -> Recorder:
    environment.record(run.environment, ranks)
    examples = None
    if config.track.examples:
        examples = Examples(run, inputs.clips, config.track.examples, inputs.teacher)
    return Recorder(config.track, run, students.students, examples)


def claim_folder(run: RunDir, config: Config, inputs: Inputs) -> Path | None:
    """Make the run's folder and choose the checkpoint to go on from, the same on every rank.

    Raises:
        UserError: `resume` forbids what was found, another run lies there, the data or the teacher has
            changed since, the disk is too full, or a rank does not see rank 0's folder.
    """
    saved = broadcast_object(run_on_rank_zero(lambda: _claim(run, config, inputs)))
    stamp = broadcast_object(run.stamp())
    run_on_all_ranks(lambda: run.await_stamp(stamp))
    return saved


def _claim(run: RunDir, config: Config, inputs: Inputs) -> Path | None:
    """`claim_folder` on rank 0."""
    saved = checkpoint.newest(run.checkpoints)
    if config.resume == "must" and saved is None:
        raise UserError(
            f"--resume must, but {run.path} holds no complete checkpoint: start with --resume auto"
        )
    if config.resume == "never" and saved is not None:
        raise UserError(f"--resume never, but {saved} is there: choose another --name or --resume auto")
    record = {
        "teacher": inputs.teacher.describe() if inputs.teacher else None,
        "data": fingerprints([*Corpus.of(config.data).all_folders(), *held_out(config)]),
    }
    given = _given_weights(config, saved)
    if saved:
        run.check_inputs(record)
    _check_disk(run.path, config)
    run.create(config)
    known = read_json(run.inputs).get("init", {}) if saved and run.inputs.exists() else {}
    for name, loaded in given.items():
        # A copy: a rollback, or a node that comes later, must not depend on files elsewhere.
        weights = loaded.model.state_dict()
        file = run.weights(name, "first")
        model_files.save(file, weights, name=name, size=loaded.model.size, step=None)
        known[name] = {"name": loaded.name, "sha256": model_files.fingerprint(loaded.model)}
    run.record_inputs(record | {"init": known})
    return saved


def _given_weights(config: Config, saved: Path | None) -> dict[str, model_files.LoadedModel]:
    """What `train.init` gives the students that the checkpoint `saved` does not hold yet, by name.

    Raises:
        UserError: nothing that fits one of them.
    """
    if not config.train.init:
        return {}
    begun = checkpoint.progress_of(saved) if saved else {}
    given = {}
    for name, size in sizes.select(config.student, config.sizes).items():
        if name not in begun:
            file = run_weights.first_weights(config.train.init, name, size)
            given[name] = model_files.load(file)
            given_size = given[name].model.size
            if given_size != size:  # a checkpoint of the authors says so only when read
                raise UserError(f"--train.init {file} is {given_size}, but the student {name} is {size}")
    return given


def resume_step(config: Config, saved: Path | None) -> int:
    """Steps that the student furthest behind has done; one that joins now has done none.

    The others wait for it: it gets the batches that it would have got in the group from the start. Students
    that were given up do not count.
    """
    known = checkpoint.progress_of(saved) if saved else {}
    progress = [known.get(name, Progress()) for name in sizes.select(config.student, config.sizes)]
    active = [student for student in progress if not student.given_up]
    return min(student.steps for student in active or progress)


def inactive_students(saved: Path | None, config: Config) -> dict[str, StudentState]:
    """States of the students that the checkpoint `saved` holds and the run no longer trains.

    Later checkpoints keep them, so that such a student can come back.
    """
    if saved is None:
        return {}
    absent = checkpoint.progress_of(saved).keys() - sizes.select(config.student, config.sizes).keys()
    return {name: state for name in absent if (state := checkpoint.load(saved, name))}


def build_students(
    config: Config,
    ranks: Ranks,
    run: RunDir,
    inputs: Inputs,
    saved: Path | None,
    device: torch.device,
    precision: Precision,
) -> StudentGroup:
    """Every student in its engine, new or as the checkpoint `saved` has it, beside the teacher."""
    micro_batch, accumulation = split_batch(config.train.batch, ranks.world_size, config.train.micro_batch)
    stopwatch = Stopwatch(clock_of(device))
    students: list[Student] = []
    described_engines: dict[str, dict[str, Any]] = {}
    for name, objective in inputs.objectives.items():
        size = sizes.get(name, config.sizes)
        state = checkpoint.load(saved, name) if saved else None
        engine_config = deepspeed_config(
            config.engine,
            config.optim,
            parameters=sizes.parameters(size),
            micro_batch=micro_batch,
            accumulation=accumulation,
            precision=precision,
        )
        module = _network(config, run, name, state.weights if state else None)
        engine = StudentEngine(module, engine_config, config.optim, device)
        engine.module.train()
        if config.engine.freeze_batchnorm:
            for norm in batchnorms(engine.module):
                norm.eval()
        student = Student(name, size, engine, objective, stopwatch)
        if state:
            student.restore(state)
        students.append(student)
        described_engines[name] = engine_config
    run_on_rank_zero(lambda: write_json(run.deepspeed, described_engines))
    schedule = Schedule(config.train.steps, config.optim, config.distil, config.loss)
    return StudentGroup(students, inputs.teacher, schedule, config.loss, stopwatch)


def _network(config: Config, run: RunDir, name: str, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    """The student's network with `weights`, or as it begins.

    That is as it was given, or from the seed and its name alone, so that it is the same in every group.
    """
    torch.manual_seed(seed_for(config.seed, name))
    module: nn.Module = Manner(sizes.get(name, config.sizes))
    if weights is None and config.train.init:
        weights = dict(model_files.load(run.weights(name, "first")).model.state_dict())
    if weights is not None:
        module.load_state_dict(weights)
    if config.train.batchnorm_momentum:
        for norm in batchnorms(module):
            norm.momentum = config.train.batchnorm_momentum
    if config.engine.sync_batchnorm:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return module


def _first_state(config: Config, run: RunDir, name: str) -> StudentState:
    """The state in which the student began."""
    weights = dict(_network(config, run, name, None).state_dict())
    return StudentState(weights, {}, Progress(), [])


def seed_for(seed: int, name: str) -> int:
    """A 63-bit seed that depends on `seed` and `name`, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _check_disk(folder: Path, config: Config) -> None:
    """Refuse to start a run whose checkpoints cannot fit.

    Raises:
        UserError: with the space needed and the space there.
    """
    students = sizes.select(config.student, config.sizes).values()
    parameters = sum(sizes.parameters(size) for size in students)
    # fp32 weights and two moments per checkpoint, one more while it is written, and best and last.
    needed = 4 * parameters * (3 * (config.train.keep + 1) + 2)
    used = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    check_space(folder, needed - used, f"the checkpoints of {folder}", "choose another --runs")
