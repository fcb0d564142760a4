"""The shard format: what a tar and the index beside it look like. ``shards/README.md`` specifies it."""

from __future__ import annotations

import errno
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mvat_dist.data.shards.codecs import ARRAY_HEADER, BLOCK, SUFFIXES, Codec
from mvat_dist.errors import UserError

FORMAT = 2
"""Version of the format, in the manifest of every folder of shards."""
KEY_BYTES = 48
"""Longest key, in ASCII characters."""
KEY = re.compile(rb"[0-9a-z_]+")
"""Pattern of a key: no dot, at which WebDataset splits names, and nothing unsafe in the name of a file, which
a key becomes when its tar is unpacked."""

Kind = Literal["sources", "pairs"]
Field = Literal["audio", "clean", "noisy"]
FIELDS: dict[Kind, tuple[Field, ...]] = {"sources": ("audio",), "pairs": ("clean", "noisy")}
META = "json"
TARGETS = "safetensors.zst"
LEVEL_PARTS = 8
"""Equal parts of a segment whose RMS levels stand in the index of its teacher targets."""

TAR_BLOCK = 512
"""Bytes of a tar header; contents are padded to a multiple of it."""
FILE_MODE = 0o644
"""Of every member that this project writes."""

_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")

PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
"""Errors of a read that are the machine's trouble, or its file server's, and say nothing of the file."""

Rows = npt.NDArray[np.void]


class ShardError(UserError):
    """A shard is not what its index or its manifest says; the message names the shard and the key."""


@dataclass(frozen=True)
class Layout:
    """What shards hold: the members of a sample, and the columns of the index beside its key."""

    name: str
    """First part of the files' names: ``audio`` or ``teacher``."""
    columns: tuple[tuple[str, str] | tuple[str, str, tuple[int, ...]], ...]
    """NumPy fields of a row, between its key and the places of its members."""
    members: tuple[str, ...]
    """Extensions of the members that a row places, in the order of the tar."""
    arrays: tuple[str, ...] = ()
    """Those members that are 16-bit arrays with a checksum for every block, so that parts can be read."""

    @property
    def row(self) -> np.dtype[np.void]:
        """Row of an index: the key, the columns, and where each member lies and what it sums to."""
        place = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
        places = ((name, place) for name in self.members)
        return np.dtype([("key", f"S{KEY_BYTES}"), *self.columns, *places])


TEACHER_LAYOUT = Layout("teacher", (("segment", "<i8"), ("levels", "<f4", (LEVEL_PARTS,))), (TARGETS,))
"""Teacher targets: a row for every segment. The members of an utterance are ``0000.safetensors.zst``, ..."""


@lru_cache
def audio_layout(kind: Kind, codec: Codec = "flac") -> Layout:
    """Utterances: a row for each, with its signals and its JSON."""
    signals = [extension(field, codec) for field in FIELDS[kind]]
    columns = (("samples", "<i8"), ("level_dbfs", "<f4"), ("snr_db", "<f4"))
    return Layout(
        "audio", columns, tuple(sorted([*signals, META])), tuple(signals) if codec == "int16" else ()
    )


def extension(field: Field, codec: Codec) -> str:
    """``flac``, ``clean.flac``, ``noisy.npy``, ..."""
    return SUFFIXES[codec] if field == "audio" else f"{field}.{SUFFIXES[codec]}"


def shard_name(number: int, layout: str = "audio") -> str:
    """``audio-000012.tar``"""
    return f"{layout}-{number:06d}.tar"


def index_path(shard: Path) -> Path:
    """``audio-000012.npy`` beside ``audio-000012.tar``."""
    return shard.with_suffix(".npy")


class TarMember(NamedTuple):
    """A file in a tar, its name split as WebDataset does."""

    key: str
    """Its path up to the first dot of its name: ``speaker/utt_1`` of ``speaker/utt_1.clean.flac``."""
    extension: str
    """What follows that dot: ``clean.flac``."""
    offset: int
    """First byte of its content in the tar."""
    size: int
    """Bytes of its content."""


def scan_tar(path: Path) -> Iterator[TarMember]:
    """List the members of a WebDataset tar, ours or anybody's, in their order; reads headers only.

    The members of a sample stand together and share their key. With the offsets `os.pread` reads any of them
    in any order, so this one scan is all that an index of a foreign tar needs::

        for key, members in itertools.groupby(scan_tar(path), key=lambda member: member.key):
            places = {member.extension: (member.offset, member.size) for member in members}

    Names of ustar, GNU and PAX tars of any length are understood. As in WebDataset, folders, links, names
    without a dot and WebDataset's own ``__names__`` are passed over; extensions are in lower case.

    Raises:
        ShardError: no tar, a compressed one (in which nothing can be read at an offset), one with a sparse
            file, or one that ends too soon. A tar that was cut between two members lacks its end mark.
        OSError: the file cannot be opened or read.
    """
    with path.open("rb") as stream:
        end = 0
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + padded(member.size if member.isreg() else 0)
                    if member.sparse is not None:
                        raise ShardError(f"{path}: {member.name} is a sparse file: pack it without them")
                    folder, slash, file = member.name.rpartition("/")
                    stem, dot, rest = file.partition(".")
                    if member.isreg() and stem and dot and not _WEBDATASET_META.match(member.name):
                        yield TarMember(folder + slash + stem, rest.lower(), member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them: millions
        except tarfile.TarError as error:
            raise ShardError(f"{path} is no uncompressed tar ({error}): unpack or copy it again") from error
        if not _has_end_mark(stream, end):
            raise ShardError(f"{path} ends too soon: copy it again")


def _has_end_mark(tar: BinaryIO, end: int) -> bool:
    """Whether a block of zeros follows the last member, whose padded content ends at `end`."""
    tar.seek(end)
    return tar.read(TAR_BLOCK) == bytes(TAR_BLOCK)


def padded(size: int) -> int:
    """Bytes that a content takes in a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def tar_size(rows: Rows, layout: Layout) -> int:
    """Bytes of the tar that these rows describe, its end mark and padding included."""
    end = 0
    if rows.size:
        offset, size, _ = rows[-1][layout.members[-1]].tolist()
        end = offset + padded(size)
    return -(-(end + 2 * TAR_BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


@dataclass(frozen=True)
class Index:
    """What is known of a shard without opening its tar."""

    rows: Rows
    """(N,) of `Layout.row`."""
    blocks: npt.NDArray[np.uint32]
    """CRC-32 of every `BLOCK` samples of each array, in the order of the tar; empty without arrays."""


def block_counts(rows: Rows, layout: Layout) -> npt.NDArray[np.int64]:
    """(N,) checksums of blocks that each row has in `Index.blocks`."""
    if not layout.arrays:
        return np.zeros(len(rows), np.int64)
    counts: npt.NDArray[np.int64] = -(-rows["samples"] // BLOCK) * len(layout.arrays)
    return counts


def block_sums(content: bytes) -> Iterator[int]:
    """CRC-32 of every block of a ``.npy`` member."""
    audio = memoryview(content)[ARRAY_HEADER:]
    return (zlib.crc32(audio[at : at + 2 * BLOCK]) for at in range(0, len(audio), 2 * BLOCK))


def load_index(shard: Path, layout: Layout, sha256: str | None = None) -> Index:
    """Read the index beside a shard.

    Args:
        shard: the tar; it is not opened.
        layout: of its folder.
        sha256: of the index by the manifest; None where it has none.

    Raises:
        ShardError: the index is missing, damaged, or something else.
    """
    path = index_path(shard)
    again = f"; {REMEDY[layout.name]}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: not a readable index ({error.strerror}){again}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ShardError(f"{path}: not a readable index (its SHA-256 is not the manifest's){again}")
    stream = io.BytesIO(content)
    try:
        rows = np.lib.format.read_array(stream, allow_pickle=False)
        blocks = np.lib.format.read_array(stream, allow_pickle=False) if layout.arrays else _NO_BLOCKS
    except Exception as error:  # NumPy parses a header as Python literals, which can fail in any way
        raise ShardError(f"{path}: not a readable index ({error}){again}") from error
    index = Index(cast("Rows", rows), cast("npt.NDArray[np.uint32]", blocks))
    if not _is_consistent(index, layout):
        held = ", ".join(layout.members)
        raise ShardError(f"{path}: not the index of a shard of {held}{again}")
    if not all(map(KEY.fullmatch, index.rows["key"].tolist())):
        raise ShardError(f"{path}: a key is not of [0-9a-z_]{again}")
    return index


def finished_rows(shard: Path, layout: Layout, sha256: str | None = None) -> Rows | None:
    """The rows of a shard that an earlier start finished; None where it has to be written again.

    Its index is written last, and the tar may have been cut or removed since.
    """
    try:
        rows = load_index(shard, layout, sha256).rows
        return rows if shard.stat().st_size == tar_size(rows, layout) else None
    except (ShardError, OSError):
        return None


_NO_BLOCKS = np.empty(0, np.uint32)
REMEDY = {
    "audio": "copy this shard again, or remove the subset's folder and pack it again",
    "teacher": "remove this shard and make the cache again by the same command, which keeps the others",
}
"""What to do about a damaged shard, by the name of its layout."""


def _is_consistent(index: Index, layout: Layout) -> bool:
    """Whether every place that the index names can exist, so that reading it cannot go astray."""
    rows = index.rows
    if rows.dtype != layout.row or rows.ndim != 1:
        return False
    if "samples" in (column[0] for column in layout.columns) and (rows["samples"] < 1).any():
        return False
    for name in layout.members:
        sizes = rows[name]["size"]
        wrong = (rows[name]["offset"] < TAR_BLOCK) | (sizes < 0)
        if name in layout.arrays:
            wrong |= sizes != ARRAY_HEADER + 2 * rows["samples"]
        if wrong.any():
            return False
    blocks = index.blocks
    return blocks.ndim == 1 and blocks.dtype == "<u4" and blocks.size == block_counts(rows, layout).sum()
