"""Is a teacher cache right, and does it pay? Both are answered by asking the teacher."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
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
from mvat_dist.data.shards import target_shards
from mvat_dist.data.shards.target_codec import NORM_FLOOR, Codec, encode, map_name, unit_step
from mvat_dist.data.shards.targets import HEADER, Lessons
from mvat_dist.errors import UserError
from mvat_dist.io import sha256, write_json
from mvat_dist.losses.objective import BatchTargets, Objective, prepare_targets
from mvat_dist.models.manner import Manner
from mvat_dist.training.teacher_cache import (
    Colleague,
    Order,
    colleague,
    describe,
    forecast_of,
    numbers_by_shard,
)

ASKED_AGAIN = 0.01
"""Share of the segments of which the teacher is asked again."""
_FEWEST, _MOST = 3, 500
_TOLERANCE: dict[Codec, float] = {"fp32": 1e-4, "fp16": 2e-3, "compact": 1e-3}
"""Largest 2-norm of the difference of two maps of 2-norm one, beside the step of `compact`: another batch
size or another processor rounds the teacher's arithmetic differently."""
_HALF_PRECISION = 0.1
"""The same where the teacher runs in bf16 (design choice; not tried on a GPU)."""
_ENOUGH = 20
_REPEATS = 3


def verify(order: Order, out: Path) -> str:
    """Compare a cache with its checksums, and a share of its lessons with what the teacher says again.

    Raises:
        UserError: with every problem found.
    """
    here = colleague(order)
    lessons = Lessons(out)
    lessons.check(here.data.fingerprint())
    lessons.check_teacher(describe(here)["teacher"]["sha256"], here.teacher.file)
    if lessons.header["precision"] != here.precision:
        raise UserError(
            f"{out} was made in {lessons.header['precision']}, here the teacher runs in {here.precision}: "
            f"verify it with --engine.precision {lessons.header['precision']}, or where it was made"
        )
    here.teacher.select(here.maps, output=lessons.header["output"])
    lessons.want(here.maps, output=lessons.header["output"])
    problems = []
    for shard in tqdm(lessons.header["shards"], "checksums", unit="shard"):
        path = out / shard["name"]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif sha256(path) != shard["sha256"]:
            problems.append(f"{path}: its SHA-256 is not the header's")
    count = len(lessons)
    again = min(max(_FEWEST, round(ASKED_AGAIN * count)), _MOST, count)
    worst = 0.0
    for number in tqdm(np.linspace(0, count - 1, again).astype(np.int64), "asking again", unit="segment"):
        worst = max(worst, _error(here, lessons, int(number), problems))
    if problems:
        shown = [*problems[:_ENOUGH], *(["and more"] if len(problems) > _ENOUGH else [])]
        raise UserError(
            f"{out} is not right:\n  " + "\n  ".join(shown) + "\nremove the files named and make it again by "
            "the same command without --verify, which keeps the others"
        )
    return (
        f"{out} is whole: {count} segments in {len(lessons.header['shards'])} shards; of {again} the teacher "
        f"said the same again, maps of 2-norm one at most {worst:.2g} apart"
    )


def _error(here: Colleague, lessons: Lessons, number: int, problems: list[str]) -> float:
    """Largest distance of a map of segment `number` from the teacher's, both with 2-norm one."""
    heard, said = here.hear(np.array([number]))
    try:
        stored = lessons.read(number, heard[0])
    except UserError as error:
        problems.append(str(error))
        return 0.0
    tolerance = _TOLERANCE[lessons.codec] + (_HALF_PRECISION if here.precision == "bf16" else 0.0)
    worst = 0.0
    for key, exact in said[0].maps.items():
        distance = float(np.linalg.norm(_unit(exact) - _unit(stored.maps[key])))
        # Rounding moves a map by at most this, and its norm, by which it is divided again, as much.
        coarseness = lessons.header["coarseness"] or 0.0
        step = unit_step(max(here.maps.values()), coarseness)
        if distance > tolerance + step * float(np.sqrt(exact.size)):
            problems.append(f"segment {number}, {map_name(key)}: {distance:.2g} from the teacher's map")
        worst = max(worst, distance)
    if said[0].output is not None and stored.output is not None:
        exact = said[0].output
        distance = float(np.abs(exact - stored.output).max()) / max(float(np.abs(exact).max()), NORM_FLOOR)
        if distance > tolerance:
            problems.append(
                f"segment {number}: its output is {distance:.2g} of full scale from the teacher's"
            )
    return worst


def _unit(values: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    return exact / max(float(np.linalg.norm(exact)), NORM_FLOOR)


def compare(order: Order) -> str:
    """What a cache would take, and when it pays, measured here on a few segments."""
    here = colleague(order)
    forecast = forecast_of(here, list(numbers_by_shard(here.data)))
    times = _measure(here, order.config)
    batch = order.config.train.batch
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
    each = ", ".join(sizes.select(order.config.student, order.config.sizes))
    return (
        f"{forecast}\n\nOn one process of this machine, for {each}:\n{table}\n\n"
        f"Reading takes {times.read / times.teacher:.1%} of the teacher's time. The cache has paid for "
        f"itself after {break_even(times, here.data.variants):.2f} epochs of {len(here.data)} segments."
    )


class Times(NamedTuple):
    """Seconds per segment on this machine."""

    teacher: float
    write: float
    read: float
    students: float


def break_even(times: Times, variants: int) -> float:
    """Epochs after which a cache of `variants` segments of every item has saved what filling it took.

    Filling asks the teacher for every variant, an epoch for one of them.
    """
    saved = times.teacher - times.read
    return variants * (times.teacher + times.write) / saved if saved > 0 else float("inf")


def _measure(here: Colleague, config: Config) -> Times:
    total = here.data.segments_per_corpus or 0
    numbers = np.arange(min(config.train.micro_batch, total))
    segments = [here.data.segment(int(number)) for number in numbers]
    noisy = torch.from_numpy(np.stack([one.noisy for one in segments])).to(here.device)
    clean = torch.from_numpy(np.stack([one.clean for one in segments])).to(here.device)
    _, said = here.hear(numbers)
    lesson = here.teacher.forward(noisy)
    count = len(numbers)
    with tempfile.TemporaryDirectory() as folder:
        lessons = _small_cache(here, numbers, Path(folder))
        read = _seconds(lambda: [lessons.read(at, one.noisy) for at, one in enumerate(segments)], here.device)
        lessons.close()
    return Times(
        teacher=_seconds(lambda: here.teacher.forward(noisy), here.device) / count,
        write=_seconds(
            lambda: [encode(one, here.order.codec, here.order.coarseness) for one in said], here.device
        )
        / count,
        read=read / count,
        students=_student_seconds(here, config, (noisy, clean), lesson) / count,
    )


def _small_cache(here: Colleague, numbers: NDArray[np.int64], folder: Path) -> Lessons:
    """A real cache of a few segments, which start at 0."""
    shard = target_shards.shard_path(folder, 0)
    target_shards.write_lessons(shard, here.encode(numbers))
    records = [target_shards.describe_shard(shard)]
    header = describe(here) | {"segments": len(numbers), "bytes": records[0]["bytes"], "shards": records}
    write_json(folder / HEADER, header)
    return Lessons(folder, here.maps, here.order.output)


def _student_seconds(
    here: Colleague, config: Config, pair: tuple[torch.Tensor, torch.Tensor], targets: TeacherTargets
) -> float:
    """Forward, loss and backward of every student on one micro-batch."""
    noisy, clean = pair
    seconds = 0.0
    for size in sizes.select(config.student, config.sizes).values():
        network = Manner(size).to(here.device)
        objective = Objective(config.distil, size, here.teacher.size)
        prepared = prepare_targets(noisy, clean, targets.maps, targets.output)

        def step(
            network: Manner = network, objective: Objective = objective, prepared: BatchTargets = prepared
        ) -> None:
            estimate, views = network(noisy, return_views=True)
            torch.autograd.backward(objective(estimate, views, prepared)["loss"])

        seconds += _seconds(step, here.device)
    return seconds


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few calls after one that warms up."""
    taken = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
