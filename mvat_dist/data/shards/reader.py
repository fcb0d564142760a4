"""Read any part of any utterance of a packed subset.

A subset is a folder of plain tar files that `webdataset` and `tar` read as they are, an index beside
each of them, and ``manifest.json``, written last. ``shards/README.md`` is the specification. The
index gives random access: an utterance costs one ``pread`` and one decode, wherever it lies.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mvat_dist.data.shards.codecs import ARRAY_HEADER, BLOCK, Codec, decode_flac, decode_int16
from mvat_dist.data.shards.folders import FORMAT as FORMAT
from mvat_dist.data.shards.folders import MANIFEST as MANIFEST
from mvat_dist.data.shards.folders import Folder, beside_index, fetch_indices, open_shard, pinned, read_subset
from mvat_dist.data.shards.folders import read_manifest as read_manifest
from mvat_dist.data.shards.folders import subset_names as subset_names
from mvat_dist.data.shards.format import (
    FIELDS,
    META,
    PASSING,
    Index,
    block_counts,
    extension,
    index_path,
    index_type,
    load_index,
)
from mvat_dist.data.shards.format import Field as Field
from mvat_dist.data.shards.format import Kind as Kind
from mvat_dist.data.shards.format import ShardError as ShardError
from mvat_dist.data.shards.lru_cache import Recent
from mvat_dist.data.shards.remote_cache import RemoteFolder


def _unreadable(manifest: dict[str, Any], shard: dict[str, Any], first: int) -> Index:
    """Rows that stand for a shard without an index: keys as packing names them, lengths as on average."""
    kind, codec = manifest["kind"], manifest.get("codec", "flac")
    count = shard["utterances"]
    rows = np.zeros(count, index_type(kind, codec))
    rows["key"] = [f"{manifest['subset']}_{first + at:07d}" for at in range(count)]
    rows["samples"] = max(1, int(shard.get("samples", 0)) // max(1, count))
    rows["snr_db"] = np.nan
    return Index(rows, np.zeros(block_counts(rows["samples"], kind, codec).sum(), np.uint32))


class ShardSet:
    """One packed subset, read by position. Picklable, and safe to inherit by fork."""

    def __init__(
        self,
        folder: Folder,
        manifest: dict[str, Any],
        indices: Sequence[Index],
        damaged: dict[int, ShardError] | None = None,
    ):
        self._files: Recent[io.FileIO] = Recent()
        self._unfetchable: dict[int, ShardError] = {}  # tried often enough
        self.folder = folder
        self.manifest = manifest
        self.kind: Kind = manifest["kind"]
        self.codec: Codec = manifest.get("codec", "flac")
        self.name: str = manifest["subset"]
        self._strict = damaged is None
        self.damaged = damaged or {}
        """Number of a shard whose index cannot be read -> why; reading its utterances raises that."""
        empty = np.empty(0, index_type(self.kind, self.codec))
        self._rows = np.concatenate([empty, *(index.rows for index in indices)])
        self._blocks = np.concatenate([np.empty(0, np.uint32), *(index.blocks for index in indices)])
        counts = block_counts(self._rows["samples"], self.kind, self.codec)
        self._first_block = np.cumsum(counts) - counts
        self._shards = [folder / shard["name"] for shard in manifest["shards"]]
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
        fetch_indices(folder, manifest["shards"])
        indices: list[Index] = []
        damaged: dict[int, ShardError] = {}
        for number, shard in enumerate(manifest["shards"]):
            try:
                indices.append(cls._index(folder, manifest, shard))
            except ShardError as error:
                if strict:
                    raise
                damaged[number] = error
                indices.append(_unreadable(manifest, shard, sum(len(one.rows) for one in indices)))
        return cls(folder, manifest, indices, None if strict else damaged)

    @staticmethod
    def _index(folder: Folder, manifest: dict[str, Any], shard: dict[str, Any]) -> Index:
        codec: Codec = manifest.get("codec", "flac")
        with beside_index(folder, shard) as path:
            index = load_index(path, manifest["kind"], codec, shard.get("index_sha256"))
        if len(index.rows) != shard["utterances"]:
            raise ShardError(
                f"{index_path(path)}: {len(index.rows)} utterances, the manifest says "
                f"{shard['utterances']}; pack or copy this subset again"
            )
        return index

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return str(self.folder)

    @property
    def parts(self) -> list[ShardSet]:
        """The packed subsets that this one is made of."""
        return [self]

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers read the manifest themselves: no megabytes of index in a pickle, no shared descriptors.
        return _reopened, (self.folder, self._strict)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """(N,) lengths in samples at 16 kHz."""
        return cast("npt.NDArray[np.int64]", self._rows["samples"])

    @property
    def rows(self) -> npt.NDArray[np.void]:
        """(N,) of `index_type`: key, length, level and SNR of each utterance."""
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
            return decode_int16(self._blocks_of(index, field, start, wanted))
        try:
            return decode_flac(self._member(index, extension(field, "flac")), length, start, wanted)
        except ValueError as error:
            raise self._damaged(index, f"its {field} {error}") from error

    def meta(self, index: int) -> dict[str, Any]:
        """What is known of an utterance: its source, levels, mixing recipe (``shards/README.md``).

        Raises:
            ShardError: the stored bytes are not those that were packed.
        """
        index = range(len(self))[index]
        try:
            meta = json.loads(self._member(index, META))
        except (ValueError, RecursionError) as error:
            raise self._damaged(index, f"its {META} is not JSON: {error}") from error
        if not isinstance(meta, dict):
            raise self._damaged(index, f"its {META} is not an object")
        return meta

    def _member(self, index: int, name: str) -> bytes:
        """The bytes of one member, compared with their checksum.

        libsndfile notices damage only where it decodes; with the checksum (4 % of the decoding's time) a
        damaged utterance fails whatever part of it is wanted.
        """
        offset, size, crc32 = self._rows[name][index].tolist()
        content = self._bytes(index, size, offset)
        if zlib.crc32(content) != crc32:
            raise self._damaged(index, f"the checksum of its {name} is wrong")
        return content

    def _blocks_of(self, index: int, field: Field, start: int, frames: int) -> memoryview:
        """The bytes of `frames` samples of an array, compared with the checksums of their blocks."""
        row = self._rows[index]
        length = int(row["samples"])
        first, last = start // BLOCK, -(-(start + frames) // BLOCK)
        begin, end = first * BLOCK, min(last * BLOCK, length)
        offset = int(row[extension(field, "int16")]["offset"]) + ARRAY_HEADER
        content = memoryview(self._bytes(index, 2 * (end - begin), offset + 2 * begin))
        at = int(self._first_block[index]) + FIELDS[self.kind].index(field) * -(-length // BLOCK)
        for number, crc32 in enumerate(self._blocks[at + first : at + last].tolist()):
            if zlib.crc32(content[2 * BLOCK * number : 2 * BLOCK * (number + 1)]) != crc32:
                raise self._damaged(index, f"the checksum of block {first + number} of its {field} is wrong")
        return content[2 * (start - begin) : 2 * (start - begin + frames)]

    def _bytes(self, index: int, size: int, offset: int) -> bytes:
        shard = self._shard(index)
        if shard in self.damaged:
            raise self._damaged(index, f"its index cannot be read ({self.damaged[shard]})")
        try:
            content = os.pread(self._descriptor(shard), size, offset)
        except FileNotFoundError as error:
            raise self._damaged(index, "the file is missing") from error
        except ShardError as error:
            self._unfetchable[shard] = error
            raise self._damaged(index, str(error)) from error
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            raise self._damaged(index, f"the file cannot be read ({error})") from error
        if len(content) != size:
            raise self._damaged(index, f"the file ends {size - len(content)} bytes too soon")
        return content

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _damaged(self, index: int, what: str) -> ShardError:
        shard = self._shards[self._shard(index)]
        mend = "copy this shard again, or remove the subset's folder and pack it again"
        if isinstance(self.folder, RemoteFolder):
            mend = f"copy it there again, or remove {self.folder.mirror / shard.name} if it is that"
        return ShardError(f"{shard}, key {self.key(index)}: {what}; {mend}")

    def _descriptor(self, shard: int) -> int:
        """An open file of a shard.

        pread has no position of its own, so processes and forks may share what they inherit.
        """
        if shard in self._unfetchable:
            raise self._unfetchable[shard]
        record = self.manifest["shards"][shard]
        return self._files.get(shard, lambda: open_shard(self.folder, record)).fileno()

    def close(self) -> None:
        """Close the shards that were opened; reading opens them again."""
        self._files.close()


def _reopened(folder: Folder, strict: bool) -> ShardSet:
    return ShardSet.open(folder, strict=strict)
