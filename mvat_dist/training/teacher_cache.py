"""Ask the teacher once for every segment of a corpus, and keep what it says (`data.shards.targets`)."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.mixing.fingerprint import differences, with_newer_fields
from mvat_dist.data.pool import parallel_map
from mvat_dist.data.shards import target_shards as store
from mvat_dist.data.shards.target_codec import COARSENESS, Codec, LessonArrays, encode, map_name
from mvat_dist.data.shards.target_shards import EncodedLesson
from mvat_dist.data.shards.targets import FORMAT, HEADER
from mvat_dist.distributed import device as devices
from mvat_dist.errors import UserError
from mvat_dist.io import TEMPORARY_SUFFIX, check_space, make_folder, only_writer, write_json
from mvat_dist.runs import weights
from mvat_dist.training.teacher import LiveTeacher

UNFINISHED = "caching.json"
"""Marker of a folder in which caching has begun and not ended."""


@dataclass(frozen=True)
class Order:
    """What is to be cached, and how. Equal orders have equal tokens."""

    token: str
    config: Config = field(compare=False)
    codec: Codec = field(compare=False)
    output: bool = field(compare=False)
    coarseness: float = field(default=COARSENESS, compare=False)
    """Of `compact`."""
    threads: int = field(default=0, compare=False)
    """Threads of torch in the process that computes; 0 leaves them as they are."""


@dataclass(frozen=True)
class Forecast:
    """What the cache will take, from the first segments of it."""

    segments: int
    hours: float
    """Hours of audio in all segments."""
    bytes: int
    seconds: float
    """Time of one process for all of them."""

    def __str__(self) -> str:
        per_hour = self.bytes / max(self.hours, 1e-9)
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"{self.segments} segments, {self.hours:.2f} hours: about {self.bytes / 1e6:.0f} MB "
            f"({per_hour / 1e6:.0f} MB per hour of audio), {minutes // 60}:{minutes % 60:02}:{seconds:02} of "
            "one process"
        )


class Colleague:
    """The teacher and the corpus, opened once per process."""

    def __init__(self, order: Order) -> None:
        if order.threads:
            torch.set_num_threads(order.threads)
        device, self.precision = devices.choose(order.config.engine, 0)
        self.order = order
        self.samples = round(order.config.data.segment_seconds * SAMPLE_RATE)
        # A substitute's lesson would be filed under the number of the segment that it stands for.
        self.data = TrainingData(replace(order.config.data, on_bad_sample="fatal"), order.config.seed)
        self.data.check_numbered()
        self.teacher = LiveTeacher(teacher_file(order.config), device, self.precision)
        self.maps = self.teacher.size.views(self.samples)
        """Frames of every map, by (side, level, view)."""
        self.teacher.select(self.maps, output=order.output)
        self.device = device

    def hear(self, numbers: NDArray[np.int64]) -> tuple[list[NDArray[np.float32]], list[LessonArrays]]:
        """Segments `numbers` as the teacher hears them, (T,) each, and what it says of each."""
        heard = [self.data.segment(int(number)).noisy for number in numbers]
        said = self.teacher.forward(torch.from_numpy(np.stack(heard)).to(self.device))
        maps = {key: values.cpu().numpy() for key, values in said.maps.items()}
        output = None if said.output is None else said.output.cpu().numpy()
        if not all(np.isfinite(values).all() for values in [*maps.values(), output] if values is not None):
            raise UserError(
                f"the teacher {self.teacher.file} has no finite answer to segments {numbers.tolist()}: a "
                "network that overflows cannot teach"
            )
        lessons = [
            LessonArrays(
                {key: values[at] for key, values in maps.items()}, None if output is None else output[at]
            )
            for at in range(len(numbers))
        ]
        return heard, lessons

    def encode(self, numbers: NDArray[np.int64]) -> list[EncodedLesson]:
        """The lessons of segments `numbers`, ready to be written."""
        heard, lessons = self.hear(numbers)
        return [
            EncodedLesson(
                key=self.data.iterated.key(int(self.data.utterances[number % len(self.data)])),
                segment=int(number),
                content=encode(lesson, self.order.codec, self.order.coarseness),
                levels=store.levels_of(noisy),
            )
            for number, noisy, lesson in zip(numbers, heard, lessons, strict=True)
        ]


@lru_cache(maxsize=1)
def colleague(order: Order) -> Colleague:
    """This process's `Colleague`."""
    return Colleague(order)


def _encode(order: Order, numbers: NDArray[np.int64]) -> list[EncodedLesson]:
    return colleague(order).encode(numbers)


def teacher_file(config: Config) -> Path:
    """The teacher's weights.

    Raises:
        UserError: none was named, or none is there.
    """
    if not config.teacher.file:
        raise UserError("which teacher? give --teacher RUN_OR_CHECKPOINT")
    return weights.resolve(Path(config.teacher.file))


def default_workers(config: Config) -> int:
    """Processes that share the work: one per core, or one beside a GPU, which it keeps busy alone."""
    device, _ = devices.choose(config.engine, 0)
    return 1 if device.type == "cuda" else len(os.sched_getaffinity(0))


def make(order: Order, out: Path, *, workers: int, part: tuple[int, int]) -> dict[str, Any] | None:
    """Fill the cache in `out`, or go on where an earlier start ended, keeping what is whole.

    Args:
        order: what is cached.
        out: folder of the cache; it may be the folder of the audio shards themselves.
        workers: processes.
        part: (k, n): only every n-th shard from the k-th, counted from 0.

    Returns:
        The finished cache's header; None while shards of other parts are missing.

    Raises:
        UserError: another cache is there, another process fills this part or others of another n, the disk is
            too small, or the segments cannot be numbered.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    here = colleague(order)
    identity = describe(here)
    shards = [(store.shard_path(out, at), numbers) for at, numbers in enumerate(numbers_by_shard(here.data))]
    with _begun(out, identity, part) as header:
        whole = [store.is_whole(path, numbers, header) for path, numbers in shards]
        if header and all(whole):
            _tidy(out)
            return header
        (out / HEADER).unlink(missing_ok=True)
        mine = [one for at, one in enumerate(shards) if at % part[1] == part[0] and not whole[at]]
        if mine:
            _fill(order, out, mine, workers=workers, parts=part[1])
    return _finish(out, identity, shards)


def _fill(
    order: Order, out: Path, shards: list[tuple[Path, NDArray[np.int64]]], *, workers: int, parts: int
) -> None:
    """Write these shards; so will each of the other `parts` at the same time."""
    forecast = forecast_of(colleague(order), [numbers for _, numbers in shards])
    print(forecast)
    check_space(out, parts * forecast.bytes, "the teacher cache", "give another --out")
    with (
        parallel_map(workers) as run,
        tqdm(desc="caching", total=forecast.segments, unit="segment", smoothing=0.05) as bar,
    ):
        size = order.config.train.micro_batch
        jobs = itertools.chain.from_iterable(_cut(numbers, size) for _, numbers in shards)
        lessons = _counted(itertools.chain.from_iterable(run(partial(_encode, order), jobs)), bar)
        for path, numbers in shards:
            for leftover in out.glob(f".{path.stem}.*{TEMPORARY_SUFFIX}"):  # of a killed writer
                leftover.unlink(missing_ok=True)
            store.write_lessons(path, itertools.islice(lessons, len(numbers)))


@contextmanager
def _begun(out: Path, identity: dict[str, Any], part: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Mark the folder as this cache's, and keep others out of this part while it is filled.

    Yields the header of a finished cache; without one, an empty dict.

    Raises:
        UserError: another cache is there, or another process is at work on some of the same shards.
    """
    make_folder(out)
    with ExitStack() as held:
        with only_writer(out, f"beginning a cache in {out}", wait=True):
            header = _check_same(out, identity)
            lock = out / f".part-{part[0]}-of-{part[1]}.lock"
            lock.touch()
            held.enter_context(only_writer(lock, f"filling part {part[0]}/{part[1]} of {out}"))
            for other in out.glob(".part-*.lock"):
                if not other.name.endswith(f"-of-{part[1]}.lock"):
                    with only_writer(other, f"filling {out} in another number of parts"):
                        pass
            write_json(out / UNFINISHED, identity)
        yield header


def describe(here: Colleague) -> dict[str, Any]:
    """What the header says before anything is counted."""
    return {
        "format": FORMAT,
        "teacher": here.teacher.describe(),
        "precision": here.precision,
        "data": here.data.fingerprint(),
        "codec": here.order.codec,
        "coarseness": here.order.coarseness if here.order.codec == "compact" else None,
        "output": here.order.output,
        "maps": {map_name(key): frames for key, frames in here.maps.items()},
        "samples": here.samples,
        "segments": here.data.segments_per_corpus,
    }


def _check_same(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The header of a finished cache, or an empty dict; refuses what another command left.

    Raises:
        UserError: with everything that differs.
    """
    header: dict[str, Any] = {}
    for name in (UNFINISHED, HEADER):
        if not (out / name).is_file():
            continue
        try:
            there = json.loads((out / name).read_bytes())
            before = _comparable({key: there.get(key) for key in identity})
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{out / name} is not a teacher cache's: give another --out") from error
        if differing := list(differences(before, _comparable(identity))):
            raise UserError(
                f"--out {out} holds another teacher cache ({'; '.join(differing)}): remove it, or give "
                "another folder"
            )
        header = there if name == HEADER else {}
    return header


def _comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity without the place where the teacher lies, whatever version wrote it."""
    teacher = {key: value for key, value in identity["teacher"].items() if key != "file"}
    return identity | {"teacher": teacher, "data": with_newer_fields(identity["data"])}


def forecast_of(here: Colleague, shards: list[NDArray[np.int64]]) -> Forecast:
    """From one batch of segments that lie far apart; the first call is not timed, for it warms up."""
    count = sum(map(len, shards))
    if not count:
        return Forecast(0, 0.0, 0, 0.0)
    every = np.concatenate(shards)
    batch = min(here.order.config.train.micro_batch, count)
    probe = every[np.linspace(0, count - 1, batch).astype(np.int64)]
    here.encode(probe[:1])
    start = time.perf_counter()
    lessons = here.encode(probe)
    seconds = (time.perf_counter() - start) / len(probe)
    # Header and padding of a member in its tar, and its row in the index.
    size = sum(len(lesson.content) + 832 for lesson in lessons) / len(probe)
    hours = count * here.order.config.data.segment_seconds / 3600
    return Forecast(count, hours, round(count * size), count * seconds)


def numbers_by_shard(data: TrainingData) -> Iterator[NDArray[np.int64]]:
    """For each audio shard the numbers of the segments that begin with its utterances, in their order."""
    ends = np.cumsum([shard["utterances"] for shard in data.iterated.manifest["shards"]])
    # Items stand in the order of the utterances that they begin with.
    for items in np.split(np.arange(len(data)), np.searchsorted(data.utterances, ends))[:-1]:
        yield (items[:, None] + len(data) * np.arange(data.variants)).reshape(-1)


def _cut(numbers: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]


def _counted(lessons: Iterable[EncodedLesson], bar: tqdm[Any]) -> Iterator[EncodedLesson]:
    for lesson in lessons:
        yield lesson
        bar.update()


def _finish(
    out: Path, identity: dict[str, Any], shards: list[tuple[Path, NDArray[np.int64]]]
) -> dict[str, Any] | None:
    """Write the header once all shards are there, whichever part is the last one."""
    if not all(store.is_whole(path, numbers, {}) for path, numbers in shards):
        return None
    records = [store.describe_shard(path) for path, _ in shards]
    header = identity | {"bytes": sum(one["bytes"] for one in records), "shards": records}
    write_json(out / HEADER, header)
    _tidy(out)
    return header


def _tidy(out: Path) -> None:
    """Remove what only an unfinished cache needs."""
    for done in (out / UNFINISHED, *out.glob(".part-*.lock")):
        done.unlink(missing_ok=True)
