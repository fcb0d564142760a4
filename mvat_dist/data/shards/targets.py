"""The teacher cache: teacher targets of every segment of a corpus, in shards beside the audio's.

A cache is a folder of ``teacher-NNNNNN.tar``, one for each audio shard of the subset that training iterates
over, with its keys in its order; an index beside each of them; and ``teacher.json``, the manifest, written
last. An utterance ``KEY`` has a member ``KEY.<n>.safetensors.zst`` for each of its segments;
``shards/README.md`` is the specification.

MANNER normalises and attends over its whole input: a map belongs to the one segment it was made from. So the
manifest says which segments these are, and every row of an index holds levels of the teacher's input, with
which the reader compares what the student is about to get.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mvat_dist.config import locations
from mvat_dist.config.sizes import Size, ViewKey
from mvat_dist.data.mixing.fingerprint import differences, with_newer_fields
from mvat_dist.data.shards.files import LruCache, ShardFiles, fetch_indices
from mvat_dist.data.shards.format import (
    FORMAT,
    LEVEL_PARTS,
    TARGETS,
    TEACHER_LAYOUT,
    Rows,
    ShardError,
    finished_rows,
    shard_name,
)
from mvat_dist.data.shards.manifest import (
    Count,
    Digest,
    Folder,
    ShardRecord,
    check_distinct,
    check_fetchable,
)
from mvat_dist.data.shards.remote import NotThereError
from mvat_dist.data.shards.remote_cache import Cache, RemoteFolder
from mvat_dist.data.shards.target_codec import Codec, SegmentTargets, decode, largest_size, map_name
from mvat_dist.data.shards.writer import write_shard
from mvat_dist.errors import UserError
from mvat_dist.io import parse_record

CACHE_MANIFEST = "teacher.json"
CACHE_FILE = re.compile(r"teacher\.json|teacher-\d{6}\.(tar|npy)|submitit")
"""Names of what a finished cache may have in its folder."""
LEVEL_TOLERANCE = 1e-3
"""Largest relative difference of two levels of a segment: other processors round reverberation differently,
in the seventh digit; another crop or another mixture differs in the first."""

Positive = Annotated[int, Field(gt=0, lt=1 << 40)]


@dataclass(frozen=True)
class TeacherRecord:
    """The teacher that filled a cache."""

    name: str
    size: Size
    sha256: Digest
    """Of its weights."""
    file: str = field(default="", compare=False)
    """Where it lay."""


@dataclass(frozen=True)
class CacheManifest:
    """``teacher.json``: what a cache holds. While the cache is filled, the marker of that says the same."""

    teacher: TeacherRecord
    precision: Literal["fp32", "bf16"]
    """In which the teacher ran."""
    data: dict[str, Any]
    """`TrainingData.fingerprint`: everything that decides the segments."""
    codec: Codec
    output: bool
    """Whether the teacher's enhanced waveform is stored beside its maps."""
    maps: dict[str, Positive]
    """``side/level/view`` -> frames."""
    samples: Positive
    """Of a segment."""
    segments: Positive
    coarseness: float | None = None
    """Step of the codec `compact`."""
    bytes: Count = 0
    shards: tuple[ShardRecord, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_distinct(self.shards)

    def conflicts(self, other: CacheManifest) -> list[str]:
        """What keeps the two from being one cache, whatever of it is there; of another version, too."""
        return list(differences(self._comparable(), other._comparable()))

    def _comparable(self) -> dict[str, Any]:
        plain = asdict(replace(self, bytes=0, shards=(), data=with_newer_fields(self.data)))
        del plain["teacher"]["file"]
        return plain


@dataclass(frozen=True)
class TargetSample:
    """Teacher targets of one segment, ready to be written."""

    key: str
    """Of the utterance that the segment begins with; the label of its corpus may stand before it."""
    segment: int
    """Number of the segment in the corpus."""
    content: bytes
    """From `target_codec.encode`."""
    levels: NDArray[np.float32]
    """From `levels_of` the teacher's input."""
    place: int = 0
    """Number of the segment within its utterance."""

    @property
    def members(self) -> dict[str, bytes]:
        """Extension -> content."""
        return {f"{self.place:04d}.{TARGETS}": self.content}

    @property
    def columns(self) -> tuple[int, NDArray[np.float32]]:
        """Values of the layout's columns."""
        return self.segment, self.levels


def levels_of(noisy: NDArray[np.float32]) -> NDArray[np.float32]:
    """RMS of `LEVEL_PARTS` equal parts of a segment (T,): shape (LEVEL_PARTS,)."""
    parts = np.array_split(np.square(noisy, dtype=np.float64), LEVEL_PARTS)
    return np.sqrt([part.mean() if part.size else 0.0 for part in parts]).astype(np.float32)


def target_shard(folder: Path, number: int) -> Path:
    """``teacher-000012.tar``"""
    return folder / shard_name(number, TEACHER_LAYOUT.name)


def write_targets(shard: Path, samples: Iterable[TargetSample]) -> None:
    """Write one shard of a cache, `samples` consumed one at a time.

    The segments of one utterance must be neighbours; they are numbered from 0 within it.
    """
    write_shard(shard, TEACHER_LAYOUT, _numbered(samples))


def _numbered(samples: Iterable[TargetSample]) -> Iterator[TargetSample]:
    key, place = "", 0
    for sample in samples:
        key, place = sample.key, (place + 1 if sample.key == key else 0)
        yield replace(sample, place=place)


def is_finished(shard: Path, segments: NDArray[np.int64], sha256: str | None = None) -> bool:
    """Whether a shard and its index are there, of these segments, and as long as they must be."""
    rows = finished_rows(shard, TEACHER_LAYOUT, sha256)
    return rows is not None and np.array_equal(rows["segment"], segments)


class TeacherCache:
    """Teacher targets by the number of the segment. Picklable, and small when pickled."""

    def __init__(self, folder: Folder | str, maps: Collection[ViewKey] = (), output: bool = False) -> None:
        """Open the cache in `folder`: its manifest and its indices. `maps` and `output` are as for `select`.

        Raises:
            UserError: nothing finished there, another format, or damage.
        """
        self.folder = _pinned(Path(folder) if isinstance(folder, str) else folder)
        self.manifest = read_cache_manifest(self.folder)
        self.codec: Codec = self.manifest.codec
        fetch_indices(self.folder, self.manifest.shards)
        files = ShardFiles(self.folder, self.manifest.shards, TEACHER_LAYOUT)
        self._files = files
        self._rows: LruCache[Rows] = LruCache(lambda shard: files.load_index(shard).rows)
        segments = [files.load_index(shard).rows["segment"] for shard in range(len(self.manifest.shards))]
        stored = np.concatenate([np.empty(0, np.int64), *segments])
        order = np.argsort(stored, kind="stable")
        if not np.array_equal(stored[order], np.arange(self.manifest.segments)):
            raise UserError(
                f"{self.folder} does not hold every segment once: make it again with "
                "python -m mvat_dist.cache"
            )
        sizes = [len(numbers) for numbers in segments]
        # Of every segment the shard and the row in it: 8 bytes, where the rows themselves have 108.
        self._shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
        self._row_of = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[order]
        self.select(maps, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers open the cache themselves: no megabytes of rows in a pickle, no shared descriptors.
        return TeacherCache, (self.folder, list(self._wanted), bool(self._samples))

    def __len__(self) -> int:
        """Segments."""
        return len(self._row_of)

    def select(self, maps: Collection[ViewKey], output: bool) -> None:
        """Choose what `read` returns.

        Raises:
            UserError: the cache does not hold it.
        """
        frames = self.manifest.maps
        missing = [map_name(key) for key in maps if map_name(key) not in frames]
        if output and not self.manifest.output:
            missing.append("output (make the cache with --output)")
        if missing:
            raise UserError(f"the teacher cache {self.folder} does not hold {', '.join(missing)}")
        self._wanted = {key: frames[map_name(key)] for key in sorted(maps)}
        self._samples = self.manifest.samples if output else 0

    @property
    def size(self) -> Size:
        """Of the teacher."""
        return self.manifest.teacher.size

    def check_precision(self, precision: Literal["fp32", "bf16"]) -> None:
        """Refuse half-precision targets in a run in full precision; not the other way round.

        Raises:
            UserError: that is so.
        """
        stored = self.manifest.precision
        if precision == "fp32" and stored != "fp32":
            raise UserError(
                f"the teacher cache {self.folder} was made in {stored}, this run has fp32: "
                "give it --engine.precision bf16, or make the cache with --engine.precision fp32"
            )

    def check(self, data: dict[str, Any]) -> None:
        """Refuse a cache of other segments than those of `data`, a `TrainingData.fingerprint`.

        Raises:
            UserError: with everything that differs.
        """
        if differing := list(differences(with_newer_fields(self.manifest.data), data)):
            raise UserError(
                f"the teacher cache {self.folder} was made for other segments ({'; '.join(differing)}): give "
                "the run the options of the cache, or make another cache with those of the run"
            )

    def check_teacher(self, fingerprint: str, file: Path) -> None:
        """Refuse a cache of another teacher than the one in `file`.

        Raises:
            UserError: the two are not the same network with the same weights.
        """
        teacher = self.manifest.teacher
        if teacher.sha256 != fingerprint:
            raise UserError(
                f"the teacher cache {self.folder} was made by {teacher.name} with weights "
                f"{teacher.sha256[:12]}, {file} has {fingerprint[:12]}: make a cache with that teacher, "
                "or leave --teacher out"
            )

    def read(self, number: int, noisy: NDArray[np.float32]) -> SegmentTargets:
        """The teacher targets of segment `number`; `noisy` is that segment (T,), as made here.

        Raises:
            ShardError: damage. The message names shard and segment.
            UserError: the teacher had another input.
        """
        shard = int(self._shard_of[number])
        try:
            row = self._rows[shard][self._row_of[number]]
            content = self._files.read_member(shard, row, TARGETS)
        except ShardError as error:
            raise self._damaged(number, str(error)) from error
        stored, given = row["levels"], levels_of(noisy)
        if not np.allclose(stored, given, rtol=LEVEL_TOLERANCE, atol=1e-7):
            raise UserError(
                f"the teacher cache {self.folder} is stale: the teacher's input of segment {number} had "
                f"levels {_short(stored)}, the student's would have {_short(given)}; make the cache again"
            )
        limit = largest_size(self.manifest.maps.values(), self.manifest.samples)
        try:
            return decode(content, self.codec, self._wanted, self._samples, limit)
        except ValueError as error:
            raise self._damaged(number, str(error)) from error

    def _damaged(self, number: int, problem: str) -> ShardError:
        return self._files.damaged(int(self._shard_of[number]), f"segment {number}", problem)

    def close(self) -> None:
        """Close the shards that were opened; reading opens them again."""
        self._rows.clear()
        self._files.close()


def cache_folder(location: str, cache: Cache) -> Folder:
    """The folder of a teacher cache that a configuration names, at a URL too; `cache` takes copies of it."""
    if locations.is_url(location):
        return RemoteFolder(location, cache, manifest_name=CACHE_MANIFEST)
    return Path(location)


def read_cache_manifest(folder: Folder) -> CacheManifest:
    """Read the manifest of a finished teacher cache.

    Raises:
        UserError: nothing finished there, another format, or something in it that no cache has.
    """
    path = folder / CACHE_MANIFEST
    folder = _pinned(folder)
    content = folder.manifest if isinstance(folder, RemoteFolder) else (folder / CACHE_MANIFEST).read_bytes()
    manifest = parse_record(content, CacheManifest, path)
    if not manifest.shards:
        raise UserError(f"{path} names no shards: make the cache again")
    check_fetchable(path, manifest.shards)
    return manifest


def _pinned(folder: Folder) -> Folder:
    try:
        if isinstance(folder, RemoteFolder):
            return folder.pinned()
        if (folder / CACHE_MANIFEST).is_file():
            return folder
    except NotThereError:
        pass
    raise UserError(
        f"{folder} is not a finished teacher cache (it has no {CACHE_MANIFEST}): make it with "
        "python -m mvat_dist.cache"
    )


def _short(levels: NDArray[np.float32]) -> str:
    return "[" + ", ".join(f"{level:.2g}" for level in levels[:3].tolist()) + ", ...]"
