"""Write shards: a tar by WebDataset's own writer, then its index, by one scan of that tar.

Equal samples give equal bytes, in whatever process they are written: time stamps, owners and modes are
constants, and the members of a sample stand in alphabetical order.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mvat_dist.data.shards.format import (
    FILE_MODE,
    Index,
    Layout,
    ShardError,
    TarMember,
    block_sums,
    index_path,
    scan_tar,
)
from mvat_dist.io import atomic_file


class Writable(Protocol):
    """What becomes a row of a shard: an utterance, or the teacher targets of a segment."""

    @property
    def key(self) -> str:
        """WebDataset's key; a label with a slash may stand before it."""

    @property
    def members(self) -> Mapping[str, bytes]:
        """Extension -> content."""

    @property
    def columns(self) -> tuple[Any, ...]:
        """Values of the layout's columns."""


@dataclass(frozen=True)
class Sample:
    """One utterance, ready to be written."""

    key: str
    """``[0-9a-z_]+``, at most `KEY_BYTES` characters, unique in the subset."""
    members: dict[str, bytes]
    """Extension -> content."""
    samples: int
    """Length of each of its signals, in samples at 16 kHz."""
    level_dbfs: float
    """RMS in dB below full scale, of the noisy signal where there are two."""
    snr_db: float
    """10 log10(sum clean^2 / sum (noisy - clean)^2); NaN where there is one signal."""

    @property
    def columns(self) -> tuple[int, float, float]:
        """Values of an audio layout's columns."""
        return self.samples, self.level_dbfs, self.snr_db


def write_shard(path: Path, layout: Layout, samples: Iterable[Writable]) -> None:
    """Write one tar and then its index, each atomically; `samples` is consumed one at a time.

    Where the index exists, its tar is whole.
    """
    # It brings torch with it: a second, and 180 MB in a process that has none. Only writers need it.
    from webdataset.writer import TarWriter

    heads: list[tuple[Any, ...]] = []
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as stream,
        TarWriter(stream, encoder=False, mtime=0, user="", group="", mode=FILE_MODE) as tar,
    ):
        for sample in samples:
            heads.append((sample.key.rpartition("/")[2], *sample.columns))
            tar.write({"__key__": sample.key, **sample.members})
    index = index_tar(path, layout, heads)
    with atomic_file(index_path(path)) as temporary, temporary.open("wb") as stream:
        np.save(stream, index.rows, allow_pickle=False)
        if layout.arrays:
            np.save(stream, index.blocks, allow_pickle=False)


def index_tar(path: Path, layout: Layout, heads: Sequence[tuple[Any, ...]]) -> Index:
    """Make the index of a tar whose rows begin with `heads`: the key and the layout's columns.

    Raises:
        ShardError: as `scan_tar`, or the tar holds other members.
    """
    rows: list[tuple[Any, ...]] = []
    blocks: list[int] = []
    members = scan_tar(path)
    with path.open("rb") as tar:
        for head in heads:
            places = []
            for name in layout.members:
                member = next(members, None)
                if member is None or not _is_member(member, head[0], name):
                    raise ShardError(f"{path} holds {member}, where {name} of {head[0]} should be")
                content = os.pread(tar.fileno(), member.size, member.offset)
                places.append((member.offset, member.size, zlib.crc32(content)))
                if name in layout.arrays:
                    blocks.extend(block_sums(content))
            rows.append((*head, *places))
    if (extra := next(members, None)) is not None:
        raise ShardError(f"{path} holds {extra} after its last sample")
    return Index(np.array(rows, dtype=layout.row), np.array(blocks, dtype="<u4"))


def _is_member(member: TarMember, key: str, name: str) -> bool:
    """Whether this is member `name` of `key`; a label may stand before the key, a number before the name."""
    return member.key.rpartition("/")[2] == key and f".{member.extension}".endswith(f".{name}")
