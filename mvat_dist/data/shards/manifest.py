"""The manifests of packed corpora and subsets, on a disk or at a URL.

A manifest may come from anywhere, so nothing in it is used before it is checked: names in it are plain
names, never paths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mvat_dist.data.shards.codecs import Codec
from mvat_dist.data.shards.format import FORMAT, Kind, ShardError, index_path
from mvat_dist.data.shards.remote import NotThereError
from mvat_dist.data.shards.remote_cache import MANIFEST, RemoteFolder
from mvat_dist.errors import UserError
from mvat_dist.io import parse_record, sha256

Folder = Path | RemoteFolder
"""A packed corpus or subset, or a teacher cache."""

Count = Annotated[int, Field(ge=0, lt=1 << 50)]
RowCount = Annotated[int, Field(ge=0, le=10_000_000)]
"""Bounded, so that a wrong number cannot ask for all the memory."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""
SubsetName = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$")]
ShardName = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+\.tar$")]


@dataclass(frozen=True)
class ShardRecord:
    """What a manifest says of one shard."""

    name: ShardName
    """Of the tar; its index has the same name with ``.npy``."""
    rows: RowCount
    """Rows of its index: utterances, or segments of a teacher cache."""
    samples: Count | None = None
    """Sum of the utterances' lengths, at 16 kHz; None for teacher targets."""
    bytes: Count | None = None
    """Size of the tar."""
    sha256: Digest | None = None
    index_sha256: Digest | None = None

    def __post_init__(self) -> None:
        # Nothing would ever fill a segment with empty utterances.
        if self.samples is not None and self.samples < self.rows:
            raise ValueError("fewer samples than utterances")

    @property
    def is_fetchable(self) -> bool:
        """Whether enough is known to tell that the shard was fetched whole."""
        return None not in (self.bytes, self.sha256, self.index_sha256)


def describe_shard(shard: Path, rows: int, samples: int | None = None) -> ShardRecord:
    """Make the record of a finished shard with `rows` rows."""
    return ShardRecord(
        name=shard.name,
        rows=rows,
        samples=samples,
        bytes=shard.stat().st_size,
        sha256=sha256(shard),
        index_sha256=sha256(index_path(shard)),
    )


@dataclass(frozen=True)
class SubsetManifest:
    """``manifest.json`` of a packed subset. Packing adds statistics, which reading does not need."""

    subset: str
    kind: Kind
    shards: tuple[ShardRecord, ...]
    codec: Codec = "flac"
    utterances: Count | None = None
    """Sum of the shards' rows."""
    bytes: Count | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        check_distinct(self.shards)
        if self.utterances not in (None, sum(shard.rows for shard in self.shards)):
            raise ValueError("utterances is not the sum of the shards' rows")


@dataclass(frozen=True)
class SubsetSummary:
    """What a corpus's manifest repeats of a subset's."""

    kind: Kind
    utterances: Count | None = None
    hours: float | None = None
    bytes: Count | None = None
    manifest_sha256: Digest | None = None


@dataclass(frozen=True)
class CorpusManifest:
    """``manifest.json`` of a packed corpus; packing adds its recipe and what it left out."""

    subsets: dict[SubsetName, SubsetSummary]
    """By name, in the order in which they were packed."""
    rejected: dict[str, int] | None = field(default=None)
    """Reason -> files that were left out; listed in ``rejected.jsonl``."""
    format: int = FORMAT


def check_distinct(shards: Sequence[ShardRecord]) -> None:
    """Refuse a manifest that names a shard twice.

    Raises:
        ValueError: with its name.
    """
    names = [shard.name for shard in shards]
    if twice := [name for name in names if names.count(name) > 1][:1]:
        raise ValueError(f"shards: {twice[0]} is named twice")


def subset_names(corpus: Folder | str) -> list[str]:
    """Names of the subsets below a packed corpus, in the order in which they were packed.

    Raises:
        UserError: as `read_corpus`.
    """
    return list(read_corpus(Path(corpus) if isinstance(corpus, str) else corpus).subsets)


def read_corpus(folder: Folder) -> CorpusManifest:
    """Read the manifest of a packed corpus.

    Raises:
        UserError: the folder is not a finished corpus written by `mvat_dist.pack`.
    """
    content = _read(folder, "a packed corpus")
    if "shards" in _keys(content):
        raise UserError(f"{folder} is one packed subset; give the folder above it: {folder.parent}")
    return parse_record(content, CorpusManifest, folder / MANIFEST)


def is_corpus(folder: Folder) -> bool:
    """Whether the folder holds a packed corpus, of whatever version.

    Raises:
        RemoteError: its URL cannot be read now.
    """
    try:
        return "subsets" in _keys(manifest_bytes(folder))
    except (OSError, NotThereError):
        return False


def read_subset(folder: Folder) -> SubsetManifest:
    """Read the manifest of a packed subset.

    Raises:
        UserError: no subset there, or something in it that packing did not write.
    """
    content = _read(folder, "a packed subset")
    if "subsets" in _keys(content):
        names = ", ".join(subset_names(folder))
        raise UserError(f"{folder} is a whole packed corpus; name one of its subsets: {names}")
    try:
        manifest = parse_record(content, SubsetManifest, folder / MANIFEST)
    except UserError as error:
        raise ShardError(str(error)) from error
    check_fetchable(folder / MANIFEST, manifest.shards)
    return manifest


def check_fetchable(manifest: Folder, shards: Sequence[ShardRecord]) -> None:
    """Refuse shards at a URL without size and checksums, which tell that a copy is whole.

    Raises:
        ShardError: with the URL of the manifest.
    """
    if isinstance(manifest, RemoteFolder) and not all(shard.is_fetchable for shard in shards):
        raise ShardError(f"{manifest} is damaged (a shard without size or checksums): copy it there again")


def pinned(folder: Folder, what: str) -> Folder:
    """The folder; one at a URL with its manifest fetched, so that it stays this one in every process.

    Raises:
        UserError: there is no manifest, or as for `RemoteFolder.pinned`.
    """
    try:
        return folder if isinstance(folder, Path) else folder.pinned()
    except NotThereError:
        raise _unpacked(folder, what) from None


def manifest_bytes(folder: Folder) -> bytes:
    """The manifest of a folder as it is stored.

    Raises:
        FileNotFoundError: a folder on a disk has none.
        UserError: as for `RemoteFolder.pinned`.
    """
    return (folder / MANIFEST).read_bytes() if isinstance(folder, Path) else folder.pinned().manifest


def _read(folder: Folder, what: str) -> bytes:
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"no such folder: {folder}; make {what} with `python -m mvat_dist.pack`")
    try:
        return manifest_bytes(folder)
    except (FileNotFoundError, NotThereError):
        raise _unpacked(folder, what) from None
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error.strerror}); copy it again") from error


def _unpacked(folder: Folder, what: str) -> UserError:
    return UserError(
        f"{folder} is not {what}: it has no {MANIFEST}; packing writes that last, so run "
        "`python -m mvat_dist.pack` again if it was interrupted"
    )


def _keys(content: bytes) -> set[str]:
    """Keys of a JSON object; none where it is something else."""
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        return set()
    return set(value) if isinstance(value, dict) else set()
