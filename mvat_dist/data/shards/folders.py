"""The folders that packing writes, on a disk or at a URL: their manifests, and the files that these name.

A manifest may come from anywhere, so nothing in it is used before it is checked: names in it are plain
names, never paths.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mvat_dist.data.shards.codecs import SUFFIXES
from mvat_dist.data.shards.format import FIELDS, ShardError, index_path
from mvat_dist.data.shards.remote import NotThereError
from mvat_dist.data.shards.remote_cache import MANIFEST as MANIFEST
from mvat_dist.data.shards.remote_cache import RemoteFolder
from mvat_dist.errors import UserError

FORMAT = 1

Folder = Path | RemoteFolder
"""A packed corpus or subset."""

LARGEST_INDEX = 1_000_000_000
"""Bytes of an index, whatever a manifest says of its tar."""

_SUBSET_NAME = re.compile(r"[0-9A-Za-z_-]+")
_SHARD_NAME = re.compile(r"[0-9A-Za-z_-]+\.tar")
_SIDE_BY_SIDE = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")


def subset_names(corpus: Folder | str) -> list[str]:
    """Names of the subsets below a packed corpus, in the order in which they were packed.

    Raises:
        UserError: the folder is not a finished corpus written by `mvat_dist.pack`.
    """
    corpus = Path(corpus) if isinstance(corpus, str) else corpus
    manifest = read_manifest(corpus, "a packed corpus")
    if "subsets" not in manifest:
        raise UserError(f"{corpus} is one packed subset; give the folder above it: {corpus.parent}")
    subsets = manifest["subsets"]
    names: list[Any] = list(subsets) if isinstance(subsets, dict | list) else [subsets]
    if not all(isinstance(name, str) and _SUBSET_NAME.fullmatch(name) for name in names):
        raise UserError(f"{corpus / MANIFEST}: its subsets cannot be right; pack or copy it again")
    return names


def pinned(folder: Folder, what: str) -> Folder:
    """The folder; one at a URL with its manifest fetched, so that it stays this one in every process.

    Raises:
        UserError: there is no manifest, or as for `RemoteFolder.pinned`.
    """
    try:
        return folder if isinstance(folder, Path) else folder.pinned()
    except NotThereError:
        raise _unpacked(folder, what) from None


def _unpacked(folder: Folder, what: str) -> UserError:
    return UserError(
        f"{folder} is not {what}: it has no {MANIFEST}; packing writes that last, so run "
        "`python -m mvat_dist.pack` again if it was interrupted"
    )


def read_manifest(folder: Folder, what: str) -> dict[str, Any]:
    """The manifest of a packed corpus or subset; `what` names it in the refusal.

    Raises:
        UserError: nothing finished there, or of another format.
    """
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"no such folder: {folder}; make {what} with `python -m mvat_dist.pack`")
    try:
        manifest = json.loads(manifest_bytes(folder))
    except (FileNotFoundError, NotThereError):
        raise _unpacked(folder, what) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST} is not JSON ({error}); pack or copy it again") from error
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error.strerror}); copy it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST} is not of shard format {FORMAT}; pack it with this version")
    return manifest


def manifest_bytes(folder: Folder) -> bytes:
    """The manifest of a folder as it is stored.

    Raises:
        FileNotFoundError: a folder on a disk has none.
        UserError: as for `RemoteFolder.pinned`.
    """
    return (folder / MANIFEST).read_bytes() if isinstance(folder, Path) else folder.pinned().manifest


def read_subset(folder: Folder) -> dict[str, Any]:
    """The checked manifest of a packed subset.

    Raises:
        UserError: no subset there, or something in it that packing did not write.
    """
    manifest = read_manifest(folder, "a packed subset")
    if "subsets" in manifest:
        raise UserError(
            f"{folder} is a whole packed corpus; name one of its subsets: {', '.join(subset_names(folder))}"
        )
    shards = manifest.get("shards")
    rows = shards if isinstance(shards, list) and all(isinstance(one, dict) for one in shards) else [{}]
    names = [str(one.get("name")) for one in rows]
    counts = [one.get("utterances") for one in rows]
    known = {
        "kind": str(manifest.get("kind")) in FIELDS,
        "codec": str(manifest.get("codec", "flac")) in SUFFIXES,
        "subset": isinstance(manifest.get("subset"), str),
        "names of shards": all(map(_SHARD_NAME.fullmatch, names)) and len(set(names)) == len(names),
        "utterances": all(_is_count(count) and count <= _MOST for count in counts)
        and manifest.get("utterances", sum(counts)) == sum(counts),
        "samples": all(map(_has_samples, rows)),
        "checksums": isinstance(folder, Path) or all(map(_is_fetchable, rows)),
    }
    if wrong := [what for what, right in known.items() if not right]:
        path = folder / MANIFEST
        raise ShardError(f"{path}: its {wrong[0]} cannot be right; pack or copy this subset again")
    return manifest


_MOST = 10_000_000
"""Utterances of one shard: a bound, so that a wrong number cannot ask for all the memory."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 50


def _has_samples(shard: dict[str, Any]) -> bool:
    """Whether no utterance needs to be empty; nothing would ever fill a segment with empty ones."""
    least: Any = shard.get("utterances")
    samples: Any = shard.get("samples", least)
    return _is_count(samples) and _is_count(least) and bool(samples >= least)


def _is_fetchable(shard: dict[str, Any]) -> bool:
    """Whether enough is known of a shard to tell that it was fetched whole."""
    sums = (shard.get("sha256"), shard.get("index_sha256"))
    return _is_count(shard.get("bytes")) and all(_SHA256.fullmatch(str(one)) for one in sums)


def open_shard(folder: Folder, shard: dict[str, Any]) -> io.FileIO:
    """The tar of `shard`, an entry of a subset's checked manifest; one at a URL is fetched first.

    Raises:
        FileNotFoundError: a folder on a disk lacks it.
        ShardError: its source lacks it, or has it damaged.
        RemoteError: as for `RemoteFolder.open`.
    """
    if isinstance(folder, Path):
        return io.FileIO(folder / shard["name"])
    return folder.open(shard["name"], shard["bytes"], shard["sha256"])


def fetch_indices(folder: Folder, shards: Sequence[dict[str, Any]]) -> None:
    """Fetch the indices of a folder at a URL side by side; what is damaged shows when it is read.

    Raises:
        RemoteError: as for `RemoteFolder.open`.
    """
    if isinstance(folder, Path):
        return

    def fetch(shard: dict[str, Any]) -> None:
        with suppress(ShardError), beside_index(folder, shard):
            pass

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        try:
            list(pool.map(fetch, shards))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def beside_index(folder: Folder, shard: dict[str, Any]) -> Iterator[Path]:
    """A path of `shard` with its index beside it on this machine; the tar itself need not be there.

    Raises:
        ShardError: the source of a folder at a URL lacks the index, or has it damaged.
        RemoteError: as for `RemoteFolder.open`.
    """
    if isinstance(folder, Path):
        yield folder / shard["name"]
        return
    path = folder.mirror / shard["name"]
    # An utterance has a row here, but two headers in the tar: no index is larger than its tar.
    most = min(shard["bytes"], LARGEST_INDEX)
    with folder.open(index_path(path).name, None, shard["index_sha256"], most=most):
        yield path
