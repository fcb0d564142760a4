"""One shard of a teacher cache: a tar of encoded lessons, and the index beside it."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mvat_dist.data.shards.format import ShardError
from mvat_dist.data.shards.writer import padded, tar_size, write_tar
from mvat_dist.io import atomic_file, sha256

SHARD_NAME = re.compile(r"teacher-\d{6}\.tar")
TEACHER_FILE = re.compile(r"teacher\.json|teacher-\d{6}\.(tar|npy)|submitit")
"""Names of what a finished cache may have in its folder."""
EXTENSION = "safetensors.zst"
LEVEL_PARTS = 8
"""Equal parts of a segment whose RMS an index holds."""

_ROW = np.dtype(
    [
        ("segment", "<i8"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("crc32", "<u4"),
        ("levels", "<f4", (LEVEL_PARTS,)),
    ]
)

Rows = NDArray[np.void]


@dataclass(frozen=True)
class EncodedLesson:
    """What the teacher says of one segment, ready to be written."""

    key: str
    """Of the utterance that the segment begins with."""
    segment: int
    """Number of the segment in the corpus."""
    content: bytes
    levels: NDArray[np.float32]
    """From `levels_of` the waveform that the teacher heard."""


def levels_of(noisy: NDArray[np.float32]) -> NDArray[np.float32]:
    """RMS of `LEVEL_PARTS` equal parts of a segment (T,): shape (LEVEL_PARTS,)."""
    parts = np.array_split(np.square(noisy, dtype=np.float64), LEVEL_PARTS)
    return np.sqrt([part.mean() if part.size else 0.0 for part in parts]).astype(np.float32)


def shard_path(folder: Path, number: int) -> Path:
    """``teacher-000012.tar``"""
    return folder / f"teacher-{number:06d}.tar"


def index_path(shard: Path) -> Path:
    """``teacher-000012.npy`` beside ``teacher-000012.tar``."""
    return shard.with_suffix(".npy")


def write_lessons(shard: Path, lessons: Iterable[EncodedLesson]) -> None:
    """Write one tar and then its index, each atomically; `lessons` is consumed one at a time.

    The segments of one utterance must be neighbours; they are numbered from 0 within it.
    """
    written: list[tuple[int, NDArray[np.float32]]] = []

    def members() -> Iterable[tuple[str, bytes]]:
        key, place = "", 0
        for one in lessons:
            key, place = one.key, (place + 1 if one.key == key else 0)
            written.append((one.segment, one.levels))
            yield f"{one.key}.{place:04d}.{EXTENSION}", one.content

    places = write_tar(shard, members())
    rows = [(number, *place, levels) for (number, levels), place in zip(written, places, strict=True)]
    with atomic_file(index_path(shard)) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.array(rows, dtype=_ROW), allow_pickle=False)


def is_whole(shard: Path, segments: NDArray[np.int64], header: Mapping[str, Any]) -> bool:
    """Whether a shard and its index are there, of these segments, and as long as they must be.

    Where the cache's `header` knows the shard, its index must be the one that it knows.
    """
    promised = {one["name"]: one["index_sha256"] for one in header.get("shards", [])}
    try:
        rows = load_rows(shard, promised.get(shard.name))
        end = int(rows["offset"][-1]) + padded(int(rows["size"][-1])) if len(rows) else 0
        return np.array_equal(rows["segment"], segments) and shard.stat().st_size == tar_size(end)
    except (ShardError, OSError):
        return False


def describe_shard(shard: Path) -> dict[str, Any]:
    """What the header records of a finished shard."""
    rows = load_rows(shard, None)
    return {
        "name": shard.name,
        "segments": len(rows),
        "bytes": shard.stat().st_size,
        "sha256": sha256(shard),
        "index_sha256": sha256(index_path(shard)),
    }


def load_rows(shard: Path, promised: str | None) -> Rows:
    """The index beside `shard`; `promised` is its SHA-256 where that is known.

    Raises:
        ShardError: missing, damaged, or something else.
    """
    path = index_path(shard)
    try:
        content = path.read_bytes()
        if promised is not None and hashlib.sha256(content).hexdigest() != promised:
            raise ValueError("its SHA-256 is not the header's")
        rows = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy parses a header as Python literals, which can fail in any way
        raise ShardError(
            f"{path} is not a readable index ({error}): remove it and its tar, and make the cache again"
        ) from error
    if rows.dtype != _ROW or rows.ndim != 1:
        raise ShardError(f"{path} is not the index of a teacher cache: remove it and make the cache again")
    return cast("Rows", rows)
