"""The files of a folder of shards, on a disk or at a URL: their indices, and any bytes of their tars."""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from mvat_dist.data.shards.format import PASSING, REMEDY, Index, Layout, ShardError, index_path, load_index
from mvat_dist.data.shards.manifest import Folder, ShardRecord
from mvat_dist.data.shards.remote_cache import RemoteFolder
from mvat_dist.errors import UserError

OPEN_AT_ONCE = 64
"""Tars of one folder. Far below the 1024 descriptors that a process usually may have, for a run opens
several folders."""
LARGEST_INDEX = 1_000_000_000
"""Bytes of an index, whatever a manifest says of its tar."""
_DOWNLOADS = 8
"""Indices that are fetched side by side."""

T = TypeVar("T")


class LruCache(Generic[T]):
    """The `OPEN_AT_ONCE` values that were asked for last, by number."""

    def __init__(self, load: Callable[[int], T], close: Callable[[T], object] = lambda _: None) -> None:
        """`load` makes a value from its number; `close` gets those that are dropped."""
        self._load = load
        self._close = close
        self._values: OrderedDict[int, T] = OrderedDict()

    def __getitem__(self, number: int) -> T:
        """The value, loaded unless it is kept; the longest unused one may be dropped for it."""
        if number not in self._values:
            self._values[number] = self._load(number)
            if len(self._values) > OPEN_AT_ONCE:
                self._close(self._values.popitem(last=False)[1])
        self._values.move_to_end(number)
        return self._values[number]

    def clear(self) -> None:
        """Drop all values; asking loads them again."""
        while self._values:
            self._close(self._values.popitem()[1])

    def __del__(self) -> None:
        self.clear()


class ShardFiles:
    """The shards of one folder, whatever they hold: their indices, and any bytes of their tars."""

    def __init__(self, folder: Folder, shards: Sequence[ShardRecord], layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self._shards = shards
        self._files: LruCache[io.FileIO] = LruCache(
            lambda number: open_shard(folder, shards[number]), io.FileIO.close
        )
        self._unfetchable: dict[int, ShardError] = {}  # tried often enough

    def load_index(self, number: int) -> Index:
        """Read the index of shard `number`.

        Raises:
            ShardError: it is missing, damaged, or not as long as the manifest says.
            RemoteError: it cannot be fetched now.
        """
        shard = self._shards[number]
        with local_index(self.folder, shard) as path:
            index = load_index(path, self.layout, shard.index_sha256)
        if len(index.rows) != shard.rows:
            raise ShardError(
                f"{index_path(path)}: {len(index.rows)} rows, the manifest says {shard.rows}; "
                f"{REMEDY[self.layout.name]}"
            )
        return index

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read `size` bytes at `offset` of the tar of shard `number`; a tar at a URL is fetched first.

        Raises:
            ShardError: the tar is missing, damaged or too short; the message does not name it.
            RemoteError: it cannot be fetched now.
            OSError: the machine or its file server is in trouble, which says nothing of the file.
        """
        if number in self._unfetchable:
            raise self._unfetchable[number]
        try:
            # pread has no position of its own, so processes and forks may share what they inherit.
            content = os.pread(self._files[number].fileno(), size, offset)
        except FileNotFoundError as error:
            raise ShardError("the file is missing") from error
        except ShardError as error:
            self._unfetchable[number] = error
            raise
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                raise
            raise ShardError(f"the file cannot be read ({error})") from error
        if len(content) != size:
            raise ShardError(f"the file ends {size - len(content)} bytes too soon")
        return content

    def read_member(self, number: int, row: np.void, name: str) -> bytes:
        """Read one member of a row of shard `number`, and compare it with its checksum.

        A decoder notices damage only where it decodes; with the checksum, which costs 4 % of FLAC's decoding
        time, a damaged member fails whatever part of it is wanted.

        Raises:
            ShardError: as `read`, or the checksum is wrong.
        """
        offset, size, crc32 = row[name].tolist()
        content = self.read(number, offset, size)
        if zlib.crc32(content) != crc32:
            raise ShardError(f"the checksum of its {name} is wrong")
        return content

    def damaged(self, number: int, label: str, problem: str) -> ShardError:
        """The error that names a shard, what of it is damaged, how, and what to do."""
        shard = self.folder / self._shards[number].name
        remedy = REMEDY[self.layout.name]
        if isinstance(self.folder, RemoteFolder):
            copy = self.folder.mirror / self._shards[number].name
            remedy = f"copy it there again, or remove {copy} if it is that"
        return ShardError(f"{shard}, {label}: {problem}; {remedy}")

    def close(self) -> None:
        """Close the files that were opened; reading opens them again."""
        self._files.clear()


def open_shard(folder: Folder, shard: ShardRecord) -> io.FileIO:
    """Open the tar of a shard of a checked manifest; one at a URL is fetched first.

    Raises:
        FileNotFoundError: a folder on a disk lacks it.
        ShardError: its source lacks it, or has it damaged.
        RemoteError: as for `RemoteFolder.open`.
    """
    if isinstance(folder, Path):
        return io.FileIO(folder / shard.name)
    return folder.open(shard.name, shard.bytes, str(shard.sha256))


def fetch_indices(folder: Folder, shards: Sequence[ShardRecord]) -> None:
    """Fetch the indices of a folder at a URL side by side; what is damaged shows when it is read.

    Raises:
        RemoteError: as for `RemoteFolder.open`.
    """
    if isinstance(folder, Path):
        return

    def fetch(shard: ShardRecord) -> None:
        with suppress(ShardError), local_index(folder, shard):
            pass

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        try:
            list(pool.map(fetch, shards))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def local_index(folder: Folder, shard: ShardRecord) -> Iterator[Path]:
    """Yield a path of the shard with its index beside it on this machine; the tar itself need not be there.

    Raises:
        ShardError: the source of a folder at a URL lacks the index, or has it damaged.
        RemoteError: as for `RemoteFolder.open`.
    """
    if isinstance(folder, Path):
        yield folder / shard.name
        return
    path = folder.mirror / shard.name
    # A row of an index takes less room than the headers of its members: no index is larger than its tar.
    largest = min(shard.bytes or 0, LARGEST_INDEX)
    with folder.open(index_path(path).name, None, str(shard.index_sha256), most=largest):
        yield path
