"""One shard: a tar of utterances, and the index beside it. ``shards/README.md`` is the specification."""

from __future__ import annotations

import errno
import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from mvat_dist.data.shards.codecs import ARRAY_HEADER, BLOCK, SUFFIXES, Codec
from mvat_dist.data.shards.writer import TAR_BLOCK, padded, tar_size, write_tar
from mvat_dist.errors import UserError
from mvat_dist.io import atomic_file

KEY_BYTES = 48
"""Longest key, in ASCII characters."""
KEY = re.compile(rb"[0-9a-z_]+")
"""What a key may be: WebDataset splits names at the first dot, and whoever unpacks a tar gets files."""

Kind = Literal["sources", "pairs"]
Field = Literal["audio", "clean", "noisy"]
FIELDS: dict[Kind, tuple[Field, ...]] = {"sources": ("audio",), "pairs": ("clean", "noisy")}
META = "json"


PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
"""Errors of a read that are the machine's trouble, or its file server's, and say nothing of the file."""


class ShardError(UserError):
    """A packed shard is not what its index says; the message names the shard and the key."""


@dataclass(frozen=True)
class Sample:
    """One utterance, ready to be written."""

    key: str
    """``[0-9a-z_]+``, at most `KEY_BYTES` characters, unique in the subset."""
    members: dict[str, bytes]
    """Extension -> content, in the order of the tar."""
    samples: int
    """Length of each of its signals, in samples at 16 kHz."""
    level_dbfs: float
    """RMS in dB below full scale, of the noisy signal where there are two."""
    snr_db: float
    """10 log10(sum clean^2 / sum (noisy - clean)^2); NaN where there is one signal."""


@dataclass(frozen=True)
class Index:
    """What is known of a shard without opening it."""

    rows: npt.NDArray[np.void]
    """(N,) of `index_type`."""
    blocks: npt.NDArray[np.uint32]
    """CRC-32 of every `BLOCK` samples of each signal, in the order of the tar; empty for FLAC."""


def extension(field: Field, codec: Codec) -> str:
    """``flac``, ``clean.flac``, ``noisy.npy``, ..."""
    return SUFFIXES[codec] if field == "audio" else f"{field}.{SUFFIXES[codec]}"


def extensions(kind: Kind, codec: Codec) -> list[str]:
    """Extensions of an utterance's members, in the order of the tar."""
    return [*(extension(field, codec) for field in FIELDS[kind]), META]


def index_type(kind: Kind, codec: Codec = "flac") -> np.dtype[np.void]:
    """Row of a shard's index: where the parts of one utterance lie in the tar, and what they sum to."""
    member = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
    head = [("key", f"S{KEY_BYTES}"), ("samples", "<i8"), ("level_dbfs", "<f4"), ("snr_db", "<f4")]
    return np.dtype([*head, *((one, member) for one in extensions(kind, codec))])


def block_counts(samples: npt.NDArray[np.int64], kind: Kind, codec: Codec) -> npt.NDArray[np.int64]:
    """(N,) checksums of blocks that each utterance has in `Index.blocks`."""
    return -(-samples // BLOCK) * (len(FIELDS[kind]) if codec == "int16" else 0)


def shard_name(number: int) -> str:
    """``audio-000012.tar``"""
    return f"audio-{number:06d}.tar"


def index_path(shard: Path) -> Path:
    """``audio-000012.npy`` beside ``audio-000012.tar``."""
    return shard.with_suffix(".npy")


def write_shard(path: Path, kind: Kind, samples: Iterable[Sample], codec: Codec = "flac") -> None:
    """Write one tar and then its index, each atomically; `samples` is consumed one at a time.

    Equal samples give equal bytes. The index comes second: where it exists, its tar is whole.
    """
    heads: list[tuple[str, int, float, float]] = []
    blocks: list[int] = []

    def members() -> Iterator[tuple[str, bytes]]:
        for sample in samples:
            heads.append((sample.key, sample.samples, sample.level_dbfs, sample.snr_db))
            for name, content in sample.members.items():
                if codec == "int16" and name != META:
                    blocks.extend(block_sums(content))
                yield f"{sample.key}.{name}", content

    places = iter(write_tar(path, members()))
    count = len(extensions(kind, codec))
    rows = [(*head, *islice(places, count)) for head in heads]
    with atomic_file(index_path(path)) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.array(rows, dtype=index_type(kind, codec)), allow_pickle=False)
        if codec == "int16":
            np.save(stream, np.array(blocks, dtype="<u4"), allow_pickle=False)


def bytes_of(rows: npt.NDArray[np.void]) -> int:
    """Size of the tar that these rows describe."""
    if not rows.size:
        return tar_size(0)
    offset, size, _ = rows[-1][META].tolist()
    return tar_size(offset + padded(size))


def block_sums(content: bytes) -> Iterator[int]:
    """CRC-32 of every block of a ``.npy`` member."""
    audio = memoryview(content)[ARRAY_HEADER:]
    return (zlib.crc32(audio[at : at + 2 * BLOCK]) for at in range(0, len(audio), 2 * BLOCK))


def load_index(shard: Path, kind: Kind, codec: Codec = "flac", sha256: str | None = None) -> Index:
    """What the index beside `shard` holds.

    Args:
        shard: the tar; it is not opened.
        kind: of its subset.
        codec: of its subset.
        sha256: what the manifest promises of the index; None where it promises nothing.

    Raises:
        ShardError: the index is missing, damaged, or something else.
    """
    path = index_path(shard)
    again = "; pack or copy this subset again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: not a readable index ({error.strerror}){again}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ShardError(f"{path}: not a readable index (its SHA-256 is not the manifest's){again}")
    stream = io.BytesIO(content)
    try:
        rows = np.lib.format.read_array(stream, allow_pickle=False)
        has_blocks = codec == "int16"
        blocks = (
            np.lib.format.read_array(stream, allow_pickle=False) if has_blocks else np.empty(0, np.uint32)
        )
    except Exception as error:  # NumPy parses a header as Python literals, which can fail in any way
        raise ShardError(f"{path}: not a readable index ({error}){again}") from error
    index = Index(cast("npt.NDArray[np.void]", rows), cast("npt.NDArray[np.uint32]", blocks))
    if not _consistent(index, kind, codec):
        raise ShardError(f"{path}: not the index of a shard of {kind} in {codec}{again}")
    if not all(map(KEY.fullmatch, index.rows["key"].tolist())):
        raise ShardError(f"{path}: a key is not of [0-9a-z_]{again}")
    return index


def _consistent(index: Index, kind: Kind, codec: Codec) -> bool:
    """Whether every place that the index names can exist, so that reading it cannot go astray."""
    rows = index.rows
    if rows.dtype != index_type(kind, codec) or rows.ndim != 1 or (rows["samples"] < 1).any():
        return False
    for name in extensions(kind, codec):
        sizes = rows[name]["size"]
        wrong = (rows[name]["offset"] < TAR_BLOCK) | (sizes < 0)
        if codec == "int16" and name != META:
            wrong |= sizes != ARRAY_HEADER + 2 * rows["samples"]
        if wrong.any():
            return False
    counts = block_counts(rows["samples"], kind, codec)
    return index.blocks.ndim == 1 and index.blocks.dtype == "<u4" and index.blocks.size == counts.sum()
