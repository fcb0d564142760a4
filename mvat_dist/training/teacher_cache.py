"""Fill a teacher cache: run the teacher once on every segment of a corpus, and store its targets."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.data.pool import available_cores, parallel_map
from mvat_dist.data.shards.manifest import describe_shard
from mvat_dist.data.shards.target_codec import COARSENESS, Codec, SegmentTargets, encode, map_name
from mvat_dist.data.shards.targets import (
    CACHE_MANIFEST,
    CacheManifest,
    TargetSample,
    TeacherRecord,
    is_finished,
    levels_of,
    target_shard,
    write_targets,
)
from mvat_dist.distributed import device as devices
from mvat_dist.errors import UserError
from mvat_dist.io import TEMPORARY_SUFFIX, check_space, make_folder, only_writer, read_record, write_record
from mvat_dist.runs import weights
from mvat_dist.training.teacher import LiveTeacher

UNFINISHED = "caching.json"
"""Marker of a folder in which caching has begun and not ended: the manifest without shards."""
_BYTES_PER_MEMBER = 512 + 256 + 108
"""Header and mean padding of a member in its tar, and its row in the index."""

Numbers = NDArray[np.int64]
"""(n,) numbers of segments."""


@dataclass(frozen=True)
class CacheSpec:
    """What is cached, and how. Equal specifications have equal tokens."""

    token: str
    config: Config = field(compare=False)
    codec: Codec = field(compare=False)
    output: bool = field(compare=False)
    coarseness: float = field(default=COARSENESS, compare=False)
    """Step of the codec `compact`."""
    threads: int = field(default=0, compare=False)
    """Threads of torch in the process that computes; 0 leaves them as they are."""


class CacheWorker:
    """The teacher and the corpus, opened once per process."""

    def __init__(self, spec: CacheSpec) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        self.device, self.precision = devices.choose(spec.config.engine, 0)
        self.spec = spec
        self.samples = round(spec.config.data.segment_seconds * SAMPLE_RATE)
        # A substitute's targets would be stored under the number of the segment that it replaces.
        self.data = TrainingData(replace(spec.config.data, on_bad_sample="fatal"), spec.config.seed)
        self.data.check_numbered()
        self.teacher = LiveTeacher(teacher_file(spec.config), self.device, self.precision)
        self.maps = self.teacher.size.views(self.samples)
        """Frames of every map, by (side, level, view)."""
        self.teacher.select(self.maps, output=spec.output)

    def forward(self, numbers: Numbers) -> tuple[list[NDArray[np.float32]], list[SegmentTargets]]:
        """Run the teacher on segments `numbers`: its inputs, (T,) each, and its targets.

        Raises:
            UserError: they are not finite.
        """
        noisy = [self.data.segment(int(number)).noisy for number in numbers]
        batch = self.teacher.forward(torch.from_numpy(np.stack(noisy)).to(self.device))
        maps = {key: values.cpu().numpy() for key, values in batch.maps.items()}
        output = None if batch.output is None else batch.output.cpu().numpy()
        if not all(np.isfinite(values).all() for values in [*maps.values(), output] if values is not None):
            raise UserError(
                f"the teacher {self.teacher.file} has no finite output for segments {numbers.tolist()}: a "
                "network that overflows cannot teach"
            )
        targets = [
            SegmentTargets(
                {key: values[place] for key, values in maps.items()},
                None if output is None else output[place],
            )
            for place in range(len(numbers))
        ]
        return noisy, targets

    def encode(self, numbers: Numbers) -> list[TargetSample]:
        """The targets of segments `numbers`, ready to be written."""
        noisy, targets = self.forward(numbers)
        return [
            TargetSample(
                key=self.data.iterated.key(int(self.data.utterances[number % len(self.data)])),
                segment=int(number),
                content=encode(segment, self.spec.codec, self.spec.coarseness),
                levels=levels_of(waveform),
            )
            for number, waveform, segment in zip(numbers, noisy, targets, strict=True)
        ]

    def describe(self) -> CacheManifest:
        """The manifest of the cache before there are shards.

        Raises:
            UserError: the segments cannot be numbered.
        """
        teacher = self.teacher.describe()
        return CacheManifest(
            teacher=TeacherRecord(teacher["name"], self.teacher.size, teacher["sha256"], teacher["file"]),
            precision=self.precision,
            data=self.data.fingerprint(),
            codec=self.spec.codec,
            coarseness=self.spec.coarseness if self.spec.codec == "compact" else None,
            output=self.spec.output,
            maps={map_name(key): frames for key, frames in self.maps.items()},
            samples=self.samples,
            segments=self.data.segments_per_corpus or 0,
        )

    def forecast(self, shards: Sequence[Numbers]) -> Forecast:
        """Measure one batch of segments that lie far apart; the first call only warms up."""
        count = sum(map(len, shards))
        if not count:
            return Forecast(0, 0.0, 0, 0.0)
        numbers = np.concatenate(shards)
        batch = min(self.spec.config.train.micro_batch, count)
        probe = numbers[np.linspace(0, count - 1, batch).astype(np.int64)]
        self.encode(probe[:1])
        start = time.perf_counter()
        samples = self.encode(probe)
        seconds = (time.perf_counter() - start) / len(probe)
        size = sum(len(sample.content) + _BYTES_PER_MEMBER for sample in samples) / len(probe)
        hours = count * self.spec.config.data.segment_seconds / 3600
        return Forecast(count, hours, round(count * size), count * seconds)


class Forecast(NamedTuple):
    """What the cache will take, from a few of its segments."""

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


@lru_cache(maxsize=1)
def cache_worker(spec: CacheSpec) -> CacheWorker:
    """This process's `CacheWorker`."""
    return CacheWorker(spec)


def _encode(spec: CacheSpec, numbers: Numbers) -> list[TargetSample]:
    return cache_worker(spec).encode(numbers)


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
    return 1 if device.type == "cuda" else available_cores()


def fill(spec: CacheSpec, out: Path, *, workers: int, part: tuple[int, int]) -> CacheManifest | None:
    """Fill the cache in `out`, or go on where an earlier start ended, keeping finished shards.

    Args:
        spec: what is cached.
        out: folder of the cache; it may be the folder of the audio shards themselves.
        workers: processes.
        part: (k, n): only every n-th shard from the k-th, counted from 0.

    Returns:
        The finished cache's manifest; None while shards of other parts are missing.

    Raises:
        UserError: another cache is there, another process fills this part or others of another n, the disk is
            too small, or the segments cannot be numbered.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    worker = cache_worker(spec)
    shards = [(target_shard(out, at), numbers) for at, numbers in enumerate(segments_by_shard(worker.data))]
    with _begun(out, worker.describe(), part) as finished:
        hashes = {shard.name: shard.index_sha256 for shard in finished.shards} if finished else {}
        done = [is_finished(path, segments, hashes.get(path.name)) for path, segments in shards]
        if finished and all(done):
            _tidy(out)
            return finished
        (out / CACHE_MANIFEST).unlink(missing_ok=True)
        missing = [
            shard
            for number, (shard, is_done) in enumerate(zip(shards, done, strict=True))
            if number % part[1] == part[0] and not is_done
        ]
        if missing:
            _write_shards(spec, out, missing, workers=workers, parts=part[1])
    return _finish(out, worker.describe(), shards)


def _write_shards(
    spec: CacheSpec, out: Path, shards: Sequence[tuple[Path, Numbers]], *, workers: int, parts: int
) -> None:
    """Write these shards; each of the other `parts` writes about as many at the same time."""
    forecast = cache_worker(spec).forecast([segments for _, segments in shards])
    print(forecast)
    check_space(out, parts * forecast.bytes, "the teacher cache", "give another --out")
    size = spec.config.train.micro_batch
    batches = (
        segments[first : first + size] for _, segments in shards for first in range(0, len(segments), size)
    )
    with (
        parallel_map(workers) as run,
        tqdm(desc="caching", total=forecast.segments, unit="segment", smoothing=0.05) as bar,
    ):
        samples = _counted(itertools.chain.from_iterable(run(partial(_encode, spec), batches)), bar)
        for path, segments in shards:
            for leftover in out.glob(f".{path.stem}.*{TEMPORARY_SUFFIX}"):  # of a killed writer
                leftover.unlink(missing_ok=True)
            write_targets(path, itertools.islice(samples, len(segments)))


def _counted(samples: Iterable[TargetSample], bar: tqdm[Any]) -> Iterator[TargetSample]:
    for sample in samples:
        yield sample
        bar.update()


def segments_by_shard(data: TrainingData) -> Iterator[Numbers]:
    """For each audio shard the numbers of the segments that begin with its utterances, in their order."""
    ends = np.cumsum([shard.rows for shard in data.iterated.shards])
    # Items stand in the order of the utterances that they begin with.
    for items in np.split(np.arange(len(data)), np.searchsorted(data.utterances, ends))[:-1]:
        yield (items[:, None] + len(data) * np.arange(data.variants)).reshape(-1)


@contextmanager
def _begun(out: Path, manifest: CacheManifest, part: tuple[int, int]) -> Iterator[CacheManifest | None]:
    """Mark the folder as this cache's, and keep others out of this part while it is filled.

    Yields the manifest of a finished cache, if there is one.

    Raises:
        UserError: another cache is there, or another process is at work on some of the same shards.
    """
    make_folder(out)
    with ExitStack() as locks:
        with only_writer(out, f"beginning a cache in {out}", wait=True):
            finished = _check_same(out, manifest)
            lock = out / f".part-{part[0]}-of-{part[1]}.lock"
            lock.touch()
            locks.enter_context(only_writer(lock, f"filling part {part[0]}/{part[1]} of {out}"))
            for other in out.glob(".part-*.lock"):
                if not other.name.endswith(f"-of-{part[1]}.lock"):
                    with only_writer(other, f"filling {out} in another number of parts"):
                        pass
            write_record(out / UNFINISHED, manifest)
        yield finished


def _check_same(out: Path, manifest: CacheManifest) -> CacheManifest | None:
    """The manifest of a finished cache; refuses what another command left.

    Raises:
        UserError: with everything that differs.
    """
    stored: CacheManifest | None = None
    for name in (UNFINISHED, CACHE_MANIFEST):
        if not (out / name).is_file():
            stored = None
            continue
        try:
            stored = read_record(out / name, CacheManifest)
        except UserError as error:
            raise UserError(f"--out {out} holds no cache of this version ({error}): give another") from error
        if differing := stored.conflicts(manifest):
            raise UserError(
                f"--out {out} holds another teacher cache ({'; '.join(differing)}): remove it, or give "
                "another folder"
            )
    return stored


def _finish(
    out: Path, manifest: CacheManifest, shards: Sequence[tuple[Path, Numbers]]
) -> CacheManifest | None:
    """Write the manifest once all shards are there, whichever part is the last one."""
    if not all(is_finished(path, segments) for path, segments in shards):
        return None
    records = tuple(describe_shard(path, len(segments)) for path, segments in shards)
    manifest = replace(manifest, bytes=sum(record.bytes or 0 for record in records), shards=records)
    write_record(out / CACHE_MANIFEST, manifest)
    _tidy(out)
    return manifest


def _tidy(out: Path) -> None:
    """Remove what only an unfinished cache needs."""
    for leftover in (out / UNFINISHED, *out.glob(".part-*.lock")):
        leftover.unlink(missing_ok=True)
