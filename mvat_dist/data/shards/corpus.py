"""Packed data as a user names it: a folder, a URL, or a pattern that concatenates several packed corpora."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mvat_dist.config import locations
from mvat_dist.config.schema import DataConfig
from mvat_dist.data.shards import remote
from mvat_dist.data.shards.format import Field
from mvat_dist.data.shards.manifest import (
    Folder,
    ShardRecord,
    manifest_bytes,
    pinned,
    read_subset,
    subset_names,
)
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.remote_cache import Cache, RemoteFolder
from mvat_dist.errors import UserError


def cache_of(config: DataConfig) -> Cache:
    """The cache that a configuration asks for."""
    return Cache(config.cache_dir, config.cache_gb)


def locate(option: str, data: Path | str, cache: Cache) -> list[Folder]:
    """The folders that `data` names: braces in their order, what a glob finds sorted.

    Args:
        option: named in refusals.
        data: folder, URL or pattern (`mvat_dist.config.locations`).
        cache: where copies of what lies at URLs go.

    Raises:
        UserError: no location, nothing found by a glob, a folder named twice, or ``..`` in a URL.
    """
    locations.check(option, str(data))
    paths: list[str] = []
    for location in locations.expand(str(data)):
        if locations.is_url(location) and ".." in location.split("/"):
            raise UserError(f"{option} {location}: object stores know no '..': give the path itself")
        if not locations.is_glob(location):
            paths.append(location)
        elif matches := _matches(location):
            paths += matches
        else:
            raise UserError(f"{option} {location}: no folder is called so")
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"{option} {data} names {twice[0]} twice")
    return [RemoteFolder(path, cache) if locations.is_url(path) else Path(path) for path in paths]


def _matches(pattern: str) -> list[str]:
    if locations.is_url(pattern):
        return remote.glob(pattern)
    root, rest = (Path("/"), pattern.lstrip("/")) if pattern.startswith("/") else (Path(), pattern)
    return sorted(str(path) for path in root.glob(rest) if path.is_dir())


class Corpus:
    """Packed corpora read as one: each subset is the concatenation of those that have it."""

    def __init__(self, option: str, data: Path | str, cache: Cache) -> None:
        """Read the corpora's own manifests.

        Raises:
            UserError: as for `locate`, or one of them is no packed corpus.
        """
        self.data = str(data)
        self.folders = [pinned(folder, "a packed corpus") for folder in locate(option, data, cache)]
        self._names = [subset_names(folder) for folder in self.folders]

    @classmethod
    def of(cls, config: DataConfig) -> Corpus:
        """What a configuration trains on."""
        return cls("--data.train", config.train, cache_of(config))

    @property
    def names(self) -> list[str]:
        """The subsets that any of the corpora has."""
        return list(dict.fromkeys(name for names in self._names for name in names))

    def subset(self, name: str) -> list[Folder]:
        """The folders of one subset, in the order of the corpora."""
        corpora = zip(self.folders, self._names, strict=True)
        return [folder / name for folder, names in corpora if name in names]

    def all_folders(self) -> list[Folder]:
        """The corpora, each followed by its subsets."""
        corpora = zip(self.folders, self._names, strict=True)
        return [folder for above, names in corpora for folder in (above, *(above / name for name in names))]

    def without(self, names: Sequence[str]) -> list[Folder]:
        """The corpora that have none of the named subsets."""
        corpora = zip(self.folders, self._names, strict=True)
        return [folder for folder, subsets in corpora if not set(names) & set(subsets)]


def shard_count(folders: Sequence[Folder]) -> int:
    """Shards of a subset."""
    return sum(len(read_subset(folder).shards) for folder in folders)


def remote_bytes(folders: Sequence[Folder]) -> int:
    """Bytes of those shards of a subset that have to be fetched."""
    subsets = [read_subset(folder) for folder in folders if isinstance(folder, RemoteFolder)]
    return sum(shard.bytes or 0 for subset in subsets for shard in subset.shards)


def fingerprints(folders: Sequence[Folder]) -> dict[str, str | None]:
    """Hash of each folder's manifest, which holds the hashes of its shards; None for plain folders."""
    hashes: dict[str, str | None] = {}
    for folder in folders:
        try:
            hashes[str(folder)] = hashlib.sha256(manifest_bytes(folder)).hexdigest()
        except FileNotFoundError:
            hashes[str(folder)] = None
    return hashes


def open_subset(folders: Sequence[Folder]) -> ShardSet:
    """The subset in `folders`, several concatenated; reads manifests and indices, no audio.

    Raises:
        UserError: one is no packed subset, they differ in kind, or hold the same shard twice.
    """
    if len(folders) == 1:
        return ShardSet.open(folders[0])
    return ConcatenatedDataset([ShardSet.open(folder) for folder in folders], labels_of(folders))


def labels_of(folders: Sequence[Folder]) -> list[str]:
    """What tells the folders apart: relative paths that never lead up, for they become names of files."""
    plain = [
        folder.resolve().parts[1:] if isinstance(folder, Path) else filter(None, folder.url.split("/"))
        for folder in folders
    ]
    return locations.labels(["/".join(parts) for parts in plain])


class ConcatenatedDataset(ShardSet):
    """Several subsets of one kind, read as one in their order; their codecs may differ.

    Keys are unique in one packing only, so each gets in front what tells its corpus from the others:
    ``dns-en/train_clean_0000012``.
    """

    def __init__(self, parts: Sequence[ShardSet], labels: Sequence[str]) -> None:
        self._parts = list(parts)
        self._labels = list(labels)
        first = self._parts[0]
        for part in self._parts:
            if (part.kind, part.name) != (first.kind, first.name):
                raise UserError(
                    f"{part.folder} ({part.name}, {part.kind}) cannot be read as one with {first.folder} "
                    f"({first.name}, {first.kind}): give subsets of one name and kind"
                )
        self.folder = first.folder
        self.kind = first.kind
        self.codec = first.codec
        self.name = first.name
        self.damaged = {}
        sums = [shard.sha256 for shard in self.shards if shard.sha256]
        if len(set(sums)) < len(sums):
            raise UserError(f"{self.where} hold the same shard: name every corpus once")
        self._samples = np.concatenate([part.samples for part in self._parts])
        self._firsts = np.cumsum([0, *map(len, self._parts)])

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return " and ".join(part.where for part in self._parts)

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """What the manifests say of all shards, in the order of the corpora."""
        return tuple(shard for part in self._parts for shard in part.shards)

    @property
    def parts(self) -> list[ShardSet]:
        """The packed subsets that this one is made of, in their order."""
        return list(self._parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return ConcatenatedDataset, (self._parts, self._labels)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """(N,) lengths in samples at 16 kHz."""
        return self._samples

    @property
    def keys(self) -> list[str]:
        """The N keys, in the order of the corpora and their shards."""
        labelled = zip(self._labels, self._parts, strict=True)
        return [f"{label}/{key}" for label, part in labelled for key in part.keys]

    def key(self, index: int) -> str:
        """Key of the utterance at `index`."""
        number, place = self._place(index)
        return f"{self._labels[number]}/{self._parts[number].key(place)}"

    def read(
        self, index: int, field: Field = "audio", start: int = 0, frames: int | None = None
    ) -> npt.NDArray[np.float32]:
        """As `ShardSet.read`."""
        number, place = self._place(index)
        return self._parts[number].read(place, field, start, frames)

    def meta(self, index: int) -> dict[str, Any]:
        """As `ShardSet.meta`; its key is the one of the utterance's own packing."""
        number, place = self._place(index)
        return self._parts[number].meta(place)

    def close(self) -> None:
        """Close the shards that were opened; reading opens them again."""
        for part in self._parts:
            part.close()

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the part, and place in it."""
        index = range(len(self))[index]
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return number, index - int(self._firsts[number])
