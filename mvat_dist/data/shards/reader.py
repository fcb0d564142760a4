"""Read any part of any utterance of a packed subset.

A subset is a folder of plain tar files that `webdataset` and `tar` read as they are, an index beside
each of them, and ``manifest.json``, written last. ``shards/README.md`` is the specification. The
index gives random access: an utterance costs one ``pread`` and one decode, wherever it lies.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mvat_dist.data.shards.codecs import ARRAY_HEADER, BLOCK, Codec, decode_flac, decode_int16
from mvat_dist.data.shards.files import ShardFiles, fetch_indices
from mvat_dist.data.shards.format import (
    META,
    Field,
    Index,
    Kind,
    Layout,
    Rows,
    ShardError,
    audio_layout,
    block_counts,
    extension,
)
from mvat_dist.data.shards.manifest import Folder, ShardRecord, SubsetManifest, pinned, read_subset


class ShardSet:
    """One packed subset, read by position. Picklable, and safe to inherit by fork."""

    def __init__(
        self,
        folder: Folder,
        manifest: SubsetManifest,
        indices: Sequence[Index],
        damaged: dict[int, ShardError] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.kind: Kind = manifest.kind
        self.codec: Codec = manifest.codec
        self.name: str = manifest.subset
        self.layout = audio_layout(self.kind, self.codec)
        self._files = ShardFiles(folder, manifest.shards, self.layout)
        self._strict = damaged is None
        self.damaged = damaged or {}
        """Number of a shard whose index cannot be read -> why; reading its utterances raises that."""
        empty = np.empty(0, self.layout.row)
        self._rows = np.concatenate([empty, *(index.rows for index in indices)])
        self._blocks = np.concatenate([np.empty(0, np.uint32), *(index.blocks for index in indices)])
        counts = block_counts(self._rows, self.layout)
        self._first_block = np.cumsum(counts) - counts
        self._ends = np.cumsum([len(index.rows) for index in indices])

    @classmethod
    def open(cls, folder: Folder | str, *, strict: bool = True) -> ShardSet:
        """The subset in `folder`. Reads its manifest and indices, no audio.

        Args:
            folder: of the subset, or a `RemoteFolder` at a URL.
            strict: refuse a subset of which an index is missing or damaged. Otherwise the utterances of
                such a shard keep their places and their keys, and reading one raises `ShardError`.

        Raises:
            UserError: the folder is no packed subset, or its indices are not those of its manifest.
        """
        folder = pinned(Path(folder) if isinstance(folder, str) else folder, "a packed subset")
        manifest = read_subset(folder)
        fetch_indices(folder, manifest.shards)
        files = ShardFiles(folder, manifest.shards, audio_layout(manifest.kind, manifest.codec))
        indices: list[Index] = []
        damaged: dict[int, ShardError] = {}
        for number in range(len(manifest.shards)):
            try:
                indices.append(files.load_index(number))
            except ShardError as error:
                if strict:
                    raise
                damaged[number] = error
                indices.append(_substitute(manifest, number, files.layout))
        return cls(folder, manifest, indices, None if strict else damaged)

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return str(self.folder)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """What the manifest says of its shards, in their order."""
        return self.manifest.shards

    @property
    def parts(self) -> list[ShardSet]:
        """The packed subsets that this one is made of."""
        return [self]

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers read the manifest themselves: no megabytes of index in a pickle, no shared descriptors.
        return _reopen, (self.folder, self._strict)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """(N,) lengths in samples at 16 kHz."""
        return cast("npt.NDArray[np.int64]", self._rows["samples"])

    @property
    def rows(self) -> Rows:
        """(N,) of `Layout.row`: key, length, level and SNR of each utterance."""
        return self._rows

    @property
    def keys(self) -> list[str]:
        """The N keys, in the order of the shards."""
        return [key.decode("ascii") for key in self._rows["key"].tolist()]

    def key(self, index: int) -> str:
        """Key of the utterance at `index`."""
        return cast(bytes, self._rows["key"][index]).decode("ascii")

    def read(
        self, index: int, field: Field = "audio", start: int = 0, frames: int | None = None
    ) -> npt.NDArray[np.float32]:
        """`frames` samples (T,) in [-1, 1) of one signal from sample `start`; by default all of it.

        A request past the end returns what there is.

        Raises:
            ShardError: the stored bytes are not those that were packed.
        """
        index = range(len(self))[index]
        length = int(self._rows["samples"][index])
        start = min(max(0, start), length)
        wanted = length - start if frames is None else min(max(0, frames), length - start)
        if self.codec == "int16":
            return decode_int16(self._read_samples(index, extension(field, "int16"), start, wanted))
        content = self._read_member(index, extension(field, "flac"))
        try:
            return decode_flac(content, length, start, wanted)
        except ValueError as error:
            raise self._damaged(index, f"its {field} {error}") from error

    def meta(self, index: int) -> dict[str, Any]:
        """What is known of an utterance: its source, levels, mixing recipe (``shards/README.md``).

        Raises:
            ShardError: the stored bytes are not those that were packed.
        """
        index = range(len(self))[index]
        try:
            meta = json.loads(self._read_member(index, META))
        except (ValueError, RecursionError) as error:
            raise self._damaged(index, f"its {META} is not JSON: {error}") from error
        if not isinstance(meta, dict):
            raise self._damaged(index, f"its {META} is not an object")
        return meta

    def _read_member(self, index: int, name: str) -> bytes:
        shard = self._shard(index)
        self._check_index(shard, index)
        try:
            return self._files.read_member(shard, self._rows[index], name)
        except ShardError as error:
            raise self._damaged(index, str(error)) from error

    def _read_samples(self, index: int, name: str, start: int, frames: int) -> memoryview:
        """The bytes of `frames` samples of an array, compared with the checksums of their blocks."""
        shard, row = self._shard(index), self._rows[index]
        self._check_index(shard, index)
        length = int(row["samples"])
        first, last = start // BLOCK, -(-(start + frames) // BLOCK)
        begin, end = first * BLOCK, min(last * BLOCK, length)
        offset = int(row[name]["offset"]) + ARRAY_HEADER
        try:
            content = memoryview(self._files.read(shard, offset + 2 * begin, 2 * (end - begin)))
        except ShardError as error:
            raise self._damaged(index, str(error)) from error
        at = int(self._first_block[index]) + self.layout.arrays.index(name) * -(-length // BLOCK)
        for number, crc32 in enumerate(self._blocks[at + first : at + last].tolist()):
            if zlib.crc32(content[2 * BLOCK * number : 2 * BLOCK * (number + 1)]) != crc32:
                raise self._damaged(index, f"the checksum of block {first + number} of its {name} is wrong")
        return content[2 * (start - begin) : 2 * (start - begin + frames)]

    def _check_index(self, shard: int, index: int) -> None:
        if shard in self.damaged:
            raise self._damaged(index, f"its index cannot be read ({self.damaged[shard]})")

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _damaged(self, index: int, problem: str) -> ShardError:
        return self._files.damaged(self._shard(index), f"key {self.key(index)}", problem)

    def close(self) -> None:
        """Close the shards that were opened; reading opens them again."""
        self._files.close()


def _reopen(folder: Folder, strict: bool) -> ShardSet:
    return ShardSet.open(folder, strict=strict)


def _substitute(manifest: SubsetManifest, number: int, layout: Layout) -> Index:
    """Rows that stand for a shard without an index: keys as packing names them, lengths as on average."""
    shard = manifest.shards[number]
    first = sum(before.rows for before in manifest.shards[:number])
    rows = np.zeros(shard.rows, layout.row)
    rows["key"] = [f"{manifest.subset}_{first + place:07d}" for place in range(shard.rows)]
    rows["samples"] = max(1, (shard.samples or 0) // max(1, shard.rows))
    rows["snr_db"] = np.nan
    return Index(rows, np.zeros(block_counts(rows, layout).sum(), np.uint32))
