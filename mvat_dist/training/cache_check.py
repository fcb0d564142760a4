"""Check a teacher cache against its teacher, and measure whether one pays."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from tqdm import tqdm

from mvat_dist.config import sizes
from mvat_dist.config.schema import Config
from mvat_dist.data.batch import TeacherTargets
from mvat_dist.data.shards.manifest import describe_shard
from mvat_dist.data.shards.target_codec import NORM_FLOOR, Codec, encode, map_name, unit_step
from mvat_dist.data.shards.targets import CACHE_MANIFEST, TeacherCache, target_shard, write_targets
from mvat_dist.errors import UserError
from mvat_dist.io import sha256, write_record
from mvat_dist.losses.objective import BatchTargets, Objective, prepare_targets
from mvat_dist.models.manner import Manner
from mvat_dist.training.teacher_cache import CacheSpec, CacheWorker, cache_worker, segments_by_shard

CHECKED_SHARE = 0.01
"""Share of the segments for which the teacher is run again."""
_FEWEST, _MOST = 3, 500
_TOLERANCE: dict[Codec, float] = {"fp32": 1e-4, "fp16": 2e-3, "compact": 1e-3}
"""Largest 2-norm of the difference of two maps of 2-norm one, beside the step of `compact`: another batch
size or another processor rounds the teacher's arithmetic differently."""
_HALF_PRECISION = 0.1
"""The same where the teacher runs in bf16 (design choice; not tried on a GPU)."""
_MOST_PROBLEMS = 20
_REPEATS = 3


def verify(spec: CacheSpec, out: Path) -> str:
    """Compare a cache with its checksums, and a share of its targets with what the teacher computes again.

    Raises:
        UserError: with every problem.
    """
    worker = cache_worker(spec)
    cache = TeacherCache(out)
    manifest = cache.manifest
    cache.check(worker.data.fingerprint())
    cache.check_teacher(worker.describe().teacher.sha256, worker.teacher.file)
    if manifest.precision != worker.precision:
        raise UserError(
            f"{out} was made in {manifest.precision}, here the teacher runs in {worker.precision}: "
            f"verify it with --engine.precision {manifest.precision}, or where it was made"
        )
    worker.teacher.select(worker.maps, output=manifest.output)
    cache.select(worker.maps, output=manifest.output)
    problems = _checksum_problems(cache, out)
    count = len(cache)
    checked = min(max(_FEWEST, round(CHECKED_SHARE * count)), _MOST, count)
    largest = 0.0
    for number in tqdm(np.linspace(0, count - 1, checked).astype(np.int64), "teacher's maps", unit="segment"):
        distance, differences = _compare(worker, cache, int(number))
        largest = max(largest, distance)
        problems += differences
    if problems:
        shown = [*problems[:_MOST_PROBLEMS], *(["and more"] if len(problems) > _MOST_PROBLEMS else [])]
        raise UserError(
            f"{out} is damaged:\n  " + "\n  ".join(shown) + "\nremove the files named and make it again by "
            "the same command without --verify, which keeps the others"
        )
    return (
        f"{out} is whole: {count} segments in {len(manifest.shards)} shards; the teacher was run again on "
        f"{checked} of them: maps of 2-norm one differ by at most {largest:.2g}"
    )


def _checksum_problems(cache: TeacherCache, out: Path) -> list[str]:
    problems = []
    for shard in tqdm(cache.manifest.shards, "checksums", unit="shard"):
        path = out / shard.name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif sha256(path) != shard.sha256:
            problems.append(f"{path}: its SHA-256 is not the manifest's")
    return problems


def _compare(worker: CacheWorker, cache: TeacherCache, number: int) -> tuple[float, list[str]]:
    """The largest distance of a stored map from the teacher's, both of 2-norm one; and every problem."""
    (noisy,), (exact,) = worker.forward(np.array([number]))
    try:
        stored = cache.read(number, noisy)
    except UserError as error:
        return 0.0, [str(error)]
    tolerance = _TOLERANCE[cache.codec] + (_HALF_PRECISION if worker.precision == "bf16" else 0.0)
    # Rounding moves a map by at most this, and its norm, by which it is divided again, as much.
    step = unit_step(max(worker.maps.values()), cache.manifest.coarseness or 0.0)
    largest, problems = 0.0, []
    for key, values in exact.maps.items():
        distance = float(np.linalg.norm(_unit(values) - _unit(stored.maps[key])))
        if distance > tolerance + step * float(np.sqrt(values.size)):
            problems.append(f"segment {number}, {map_name(key)}: {distance:.2g} from the teacher's map")
        largest = max(largest, distance)
    if exact.output is not None and stored.output is not None:
        peak = max(float(np.abs(exact.output).max()), NORM_FLOOR)
        distance = float(np.abs(exact.output - stored.output).max()) / peak
        if distance > tolerance:
            problems.append(
                f"segment {number}: its output is {distance:.2g} of full scale from the teacher's"
            )
    return largest, problems


def _unit(values: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    return exact / max(float(np.linalg.norm(exact)), NORM_FLOOR)


def compare(spec: CacheSpec) -> str:
    """Describe what a cache would take, and when it pays, measured here on a few segments."""
    worker = cache_worker(spec)
    forecast = worker.forecast(list(segments_by_shard(worker.data)))
    times = _measure(worker)
    batch = spec.config.train.batch
    live, cached = times.teacher + times.students, times.read + times.students
    rows = [
        ("live", live * batch, times.teacher / live, times.students / live),
        ("cached", cached * batch, times.read / cached, times.students / cached),
    ]
    table = tabulate(
        rows,
        ["teacher", f"seconds per step of {batch}", "share of teacher or reading", "share of students"],
        floatfmt=("", ".3f", ".1%", ".1%"),
    )
    names = ", ".join(sizes.select(spec.config.student, spec.config.sizes))
    return (
        f"{forecast}\n\nOn one process of this machine, for {names}:\n{table}\n\n"
        f"Reading takes {times.read / times.teacher:.1%} of the teacher's time. The cache has paid for "
        f"itself after {break_even(times, worker.data.variants):.2f} epochs of {len(worker.data)} segments."
    )


class Times(NamedTuple):
    """Seconds per segment on this machine."""

    teacher: float
    write: float
    read: float
    students: float


def break_even(times: Times, variants: int) -> float:
    """Epochs after which a cache of `variants` segments of every item has saved what filling it took.

    Filling runs the teacher on every variant, an epoch on one of them.
    """
    saved = times.teacher - times.read
    return variants * (times.teacher + times.write) / saved if saved > 0 else float("inf")


def _measure(worker: CacheWorker) -> Times:
    spec, device = worker.spec, worker.device
    total = worker.data.segments_per_corpus or 0
    numbers = np.arange(min(spec.config.train.micro_batch, total))
    segments = [worker.data.segment(int(number)) for number in numbers]
    noisy = torch.from_numpy(np.stack([segment.noisy for segment in segments])).to(device)
    clean = torch.from_numpy(np.stack([segment.clean for segment in segments])).to(device)
    _, targets = worker.forward(numbers)
    count = len(numbers)
    with tempfile.TemporaryDirectory() as folder:
        cache = _small_cache(worker, numbers, Path(folder))
        read = _seconds(
            lambda: [cache.read(place, segment.noisy) for place, segment in enumerate(segments)], device
        )
        cache.close()
    write = _seconds(lambda: [encode(each, spec.codec, spec.coarseness) for each in targets], device)
    return Times(
        teacher=_seconds(lambda: worker.teacher.forward(noisy), device) / count,
        write=write / count,
        read=read / count,
        students=_student_seconds(worker, spec.config, (noisy, clean), worker.teacher.forward(noisy)) / count,
    )


def _small_cache(worker: CacheWorker, numbers: NDArray[np.int64], folder: Path) -> TeacherCache:
    """A real cache of a few segments, which start at 0."""
    shard = target_shard(folder, 0)
    write_targets(shard, worker.encode(numbers))
    record = describe_shard(shard, len(numbers))
    manifest = replace(worker.describe(), segments=len(numbers), bytes=record.bytes or 0, shards=(record,))
    write_record(folder / CACHE_MANIFEST, manifest)
    return TeacherCache(folder, worker.maps, worker.spec.output)


def _student_seconds(
    worker: CacheWorker, config: Config, pair: tuple[torch.Tensor, torch.Tensor], targets: TeacherTargets
) -> float:
    """Forward, loss and backward of every student on one micro-batch."""
    noisy, clean = pair
    seconds = 0.0
    for size in sizes.select(config.student, config.sizes).values():
        network = Manner(size).to(worker.device)
        objective = Objective(config.distil, size, worker.teacher.size)
        prepared = prepare_targets(noisy, clean, targets.maps, targets.output)

        def step(
            network: Manner = network, objective: Objective = objective, prepared: BatchTargets = prepared
        ) -> None:
            estimate, views = network(noisy, return_views=True)
            torch.autograd.backward(objective(estimate, views, prepared)["loss"])

        seconds += _seconds(step, worker.device)
    return seconds


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few calls after one that warms up."""
    durations = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return min(durations[1:])
