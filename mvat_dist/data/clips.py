"""Held-out noisy and clean clips, from a packed subset or from a plain folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import soundfile

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.audio import withheld
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.prepare.corpora import list_dns
from mvat_dist.data.prepare.reading import REASONS, UnusableError, read_whole
from mvat_dist.data.shards.corpus import fingerprints, open_subset
from mvat_dist.data.shards.format import Field
from mvat_dist.data.shards.manifest import Folder
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.errors import UserError

LENGTH_TOLERANCE = SAMPLE_RATE // 100
"""Samples by which the halves of a plain pair may differ (10 ms, as for `mvat_dist.pack`)."""


class UnusableClipError(UserError):
    """The clip called `key` cannot be scored; others can."""

    def __init__(self, key: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.reason = reason
        """The same for all clips with this fault, so that they can be counted; the message names the file."""


class Clip(NamedTuple):
    """One held-out clip."""

    key: str
    """Key of the shard, or path of the noisy file relative to the folder."""
    noisy: Audio
    """(T,) float32 at 16 kHz."""
    clean: Audio
    """(T,) float32 at 16 kHz."""


class _Clips(Protocol):
    keys: list[str]

    @property
    def fingerprint(self) -> str:
        """Changes with the content of any clip."""

    def read(self, index: int, frames: int | None) -> tuple[Audio, Audio]:
        """At most the first `frames` samples of noisy and clean."""


class ValidationClips(Sequence[Clip]):
    """Clips in the order of their keys, read when they are asked for."""

    def __init__(
        self,
        data: Folder | str | Sequence[Folder] | FilePairs,
        *,
        limit: int = 0,
        max_seconds: float = 0.0,
    ) -> None:
        """Find the clips; reads no audio.

        Args:
            data: a packed subset of pairs, several to be joined, or a folder with ``noisy`` and ``clean``
                side by side in it or below it, matched by ``fileid_N`` or by equal names; WAV or FLAC at any
                rate; or pairs of files.
            limit: most clips; the same ones every time, spread over all of them. The smaller of two limits
                takes a part of what the larger one takes. 0 takes all.
            max_seconds: only this much of the start of each clip is read; 0 reads all of it.

        Raises:
            UserError: no such folder, or no pairs in it.
        """
        self._clips: _Clips = data if isinstance(data, FilePairs) else _find(data)
        # A duration that rounds to 0 samples must not mean the whole clip.
        self._frames = max(1, round(max_seconds * SAMPLE_RATE)) if max_seconds else None
        # In the order of a hash: the first clips in the order of their keys would all be of one speaker.
        spread = sorted(range(len(self._clips.keys)), key=lambda index: _hash(self._clips.keys[index]))
        chosen = spread[: limit or None]
        self._chosen = sorted(chosen, key=lambda index: self._clips.keys[index])
        self.keys = [self._clips.keys[index] for index in self._chosen]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of the clips' keys and content."""
        described = repr((self._clips.fingerprint, self.keys, self._frames))
        return hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> list[Clip]: ...
    def __getitem__(self, index: int | slice) -> Clip | list[Clip]:
        """Read one clip, or several.

        Raises:
            UnusableClipError: a file that cannot be read, or halves of different length.
            UserError: a shard that cannot be read.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        noisy, clean = self._clips.read(self._chosen[index], self._frames)
        return Clip(self.keys[index], noisy, clean)


def _find(data: Folder | str | Sequence[Folder]) -> _Clips:
    folders = [Path(data)] if isinstance(data, str) else [data] if isinstance(data, Folder) else [*data]
    first = folders[0]
    if len(folders) > 1 or not isinstance(first, Path) or (first / MANIFEST).is_file():
        return _Packed(folders)
    pairs = [(pair.noisy, pair.clean) for pair in list_dns(first).pairs]
    if not pairs:
        raise UserError(
            f"{first} has no pairs of noisy and clean recordings: put them into the folders noisy and "
            "clean side by side, with equal names or names ending in the same fileid_N"
        )
    return FilePairs(first, first, pairs)


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()


class _Packed:
    """Pairs in shards."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._pairs = open_subset(folders)
        if self._pairs.kind != "pairs" or len(self._pairs) == 0:
            raise UserError(
                f"{self._pairs.where} holds {len(self._pairs)} utterances of kind {self._pairs.kind}: "
                "scoring needs a packed subset with pairs, such as valid or test_*"
            )
        self.keys = self._pairs.keys
        self.fingerprint = repr(sorted(fingerprints(folders).values(), key=str))

    def read(self, index: int, frames: int | None) -> tuple[Audio, Audio]:
        fields: tuple[Field, Field] = ("noisy", "clean")
        noisy, clean = (self._pairs.read(index, field, 0, frames) for field in fields)
        return noisy, clean


class FilePairs:
    """Pairs of files, of any rate, channels and format that libsndfile reads."""

    def __init__(self, noisy: Path, clean: Path, pairs: Sequence[tuple[str, str]]) -> None:
        """Pairs of paths relative to the folders `noisy` and `clean`; the first ones are the keys."""
        self._folders = noisy, clean
        self._pairs = {pair[0]: pair for pair in pairs}
        self.keys = list(self._pairs)

    @property
    def fingerprint(self) -> str:
        """Names, sizes and times of all files, wherever their folders are."""
        described = []
        for key, names in self._pairs.items():
            stats = [path.stat() if path.is_file() else None for path in self._paths(key)]
            described.append((names, [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]))
        return repr(described)

    def _paths(self, key: str) -> list[Path]:
        return [folder / name for folder, name in zip(self._folders, self._pairs[key], strict=True)]

    def read(self, index: int, frames: int | None) -> tuple[Audio, Audio]:
        key = self.keys[index]
        paths = self._paths(key)
        noisy, clean = (_read(key, path) for path in paths)
        if abs(noisy.size - clean.size) > LENGTH_TOLERANCE:
            raise UnusableClipError(
                key,
                "halves of different length",
                f"{paths[0]} has {noisy.size} samples at 16 kHz, {paths[1].name} {clean.size}: "
                "the halves of a pair must be equally long",
            )
        length = min(noisy.size, clean.size, frames or noisy.size)
        return noisy[:length], clean[:length]


def _read(key: str, path: Path) -> Audio:
    try:
        return read_whole(path)
    except (soundfile.LibsndfileError, OSError) as error:
        _refuse_unreadable(path)
        reason = "does not open as audio"
        raise UnusableClipError(key, reason, f"{path} {reason}: replace or remove it") from error
    except UnusableError as error:
        message = f"{path} is not usable ({error.detail}): replace or remove it"
        raise UnusableClipError(key, REASONS[error.reason], message) from error


def _refuse_unreadable(path: Path) -> None:
    """Refuse a file that the system cannot read now: it is not damaged and may be readable the next time.

    Raises:
        UserError: why.
    """
    error = withheld(path)
    if error and not isinstance(error, FileNotFoundError):
        why = os.strerror(error.errno or 0).lower()
        raise UserError(
            f"{path} cannot be read ({why}): mend that, and the same command continues"
        ) from error
