"""The shard format: write one shard, and read any part of any utterance of a packed subset.

A subset is a folder of plain tar files that `webdataset` and `tar` read as they are, an index beside
each of them, and ``manifest.json``, written last. ``shards/README.md`` is the specification. The
index gives random access: an utterance costs one ``pread`` and one decode, wherever it lies.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import soundfile

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.errors import UserError
from mvat_dist.files import atomic_file, read_json

FORMAT = 1
MANIFEST = "manifest.json"
KEY_BYTES = 48
"""Longest key, in ASCII characters."""

Kind = Literal["sources", "pairs"]
Field = Literal["audio", "clean", "noisy"]
FIELDS: dict[Kind, tuple[Field, ...]] = {"sources": ("audio",), "pairs": ("clean", "noisy")}
EXTENSIONS: dict[Field, str] = {"audio": "flac", "clean": "clean.flac", "noisy": "noisy.flac"}
META = "json"

_TAR_BLOCK = 512
_OPEN_SHARDS = 64


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


def index_type(kind: Kind) -> np.dtype[np.void]:
    """Row of a shard's index: where the parts of one utterance lie in the tar, and what they sum to."""
    member = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
    extensions = [*(EXTENSIONS[field] for field in FIELDS[kind]), META]
    head = [("key", f"S{KEY_BYTES}"), ("samples", "<i8"), ("level_dbfs", "<f4"), ("snr_db", "<f4")]
    return np.dtype([*head, *((extension, member) for extension in extensions)])


def shard_name(number: int) -> str:
    """``audio-000012.tar``"""
    return f"audio-{number:06d}.tar"


def index_path(shard: Path) -> Path:
    """``audio-000012.npy`` beside ``audio-000012.tar``."""
    return shard.with_suffix(".npy")


def encode_flac(pcm: npt.NDArray[np.int16]) -> bytes:
    """16-bit mono 16 kHz FLAC of `pcm` (T,); the same bytes for the same samples."""
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def write_shard(path: Path, kind: Kind, samples: Iterable[Sample]) -> None:
    """Write one tar and then its index, each atomically; `samples` is consumed one at a time.

    Time stamps, owners and modes are constants, so that equal samples give equal bytes. The index
    comes second: where it exists, its tar is whole.
    """
    rows = []
    with atomic_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            places = []
            for extension, content in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                member.mode = 0o644
                # A ustar header is one block; the content follows it.
                places.append((tar.offset + _TAR_BLOCK, len(content), zlib.crc32(content)))
                tar.addfile(member, io.BytesIO(content))
            rows.append((sample.key, sample.samples, sample.level_dbfs, sample.snr_db, *places))
    with atomic_file(index_path(path)) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.array(rows, dtype=index_type(kind)), allow_pickle=False)


def load_index(shard: Path, kind: Kind) -> npt.NDArray[np.void]:
    """The rows of a shard's index, one per utterance.

    Raises:
        ShardError: the index is missing or is something else.
    """
    path = index_path(shard)
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"{path}: not a readable index ({error}); pack or copy this subset again") from error
    if rows.dtype != index_type(kind) or rows.ndim != 1:
        raise ShardError(f"{path}: not the index of a shard of {kind}; pack or copy this subset again")
    return cast("npt.NDArray[np.void]", rows)


def subset_names(corpus: Path | str) -> list[str]:
    """Names of the subsets below a packed corpus, in the order in which they were packed.

    Raises:
        UserError: the folder is not a finished corpus written by `mvat_dist.pack`.
    """
    manifest = read_manifest(Path(corpus), "a packed corpus")
    if "subsets" not in manifest:
        raise UserError(f"{corpus} is one packed subset; give the folder above it: {Path(corpus).parent}")
    return list(manifest["subsets"])


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """The manifest of a packed corpus or subset; `what` names it in the refusal.

    Raises:
        UserError: nothing finished there, or of another format.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; make {what} with `python -m mvat_dist.pack`")
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not {what}: it has no {MANIFEST}; packing writes that last, so run "
            "`python -m mvat_dist.pack` again if it was interrupted"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is not JSON ({error}); pack or copy it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST} is not of shard format {FORMAT}; pack it with this version")
    return manifest


class ShardSet:
    """One packed subset, read by position. Picklable, and safe to inherit by fork."""

    def __init__(self, folder: Path, manifest: dict[str, Any], indices: Sequence[npt.NDArray[np.void]]):
        self._files: OrderedDict[int, io.FileIO] = OrderedDict()
        self.folder = folder
        self.manifest = manifest
        self.kind: Kind = manifest["kind"]
        self.name: str = manifest["subset"]
        self._rows = np.concatenate([np.empty(0, index_type(self.kind)), *indices])
        self._shards = [folder / shard["name"] for shard in manifest["shards"]]
        self._ends = np.cumsum([len(index) for index in indices])

    @classmethod
    def open(cls, folder: Path | str) -> ShardSet:
        """The subset in `folder`. Reads its manifest and indices, no audio.

        Raises:
            UserError: the folder is no packed subset, or its indices are not those of its manifest.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "a packed subset")
        if "subsets" in manifest:
            names = ", ".join(manifest["subsets"])
            raise UserError(f"{folder} is a whole packed corpus; name one of its subsets: {names}")
        indices = []
        for shard in manifest["shards"]:
            index = load_index(folder / shard["name"], manifest["kind"])
            if len(index) != shard["utterances"]:
                raise ShardError(
                    f"{index_path(folder / shard['name'])}: {len(index)} utterances, the manifest says "
                    f"{shard['utterances']}; pack or copy this subset again"
                )
            indices.append(index)
        return cls(folder, manifest, indices)

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers read the manifest themselves: no megabytes of index in a pickle, no shared descriptors.
        return ShardSet.open, (self.folder,)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """(N,) lengths in samples at 16 kHz."""
        return cast("npt.NDArray[np.int64]", self._rows["samples"])

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
        content = self._member(index, EXTENSIONS[field])
        length = int(self._rows["samples"][index])
        wanted = max(0, length - start if frames is None else min(frames, length - start))
        try:
            with soundfile.SoundFile(io.BytesIO(content)) as sound:
                sound.seek(min(start, length))
                audio = sound.read(wanted, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise self._damaged(index, f"its {field} does not decode: {error}") from error
        if audio.shape != (wanted,):
            raise self._damaged(index, f"its {field} has shape {audio.shape}, the index says ({wanted},)")
        return cast("npt.NDArray[np.float32]", audio)

    def meta(self, index: int) -> dict[str, Any]:
        """What is known of an utterance: its source, levels, mixing recipe (``shards/README.md``).

        Raises:
            ShardError: the stored bytes are not those that were packed.
        """
        return cast(dict[str, Any], json.loads(self._member(range(len(self))[index], META)))

    def _member(self, index: int, extension: str) -> bytes:
        """The bytes of one member, compared with their checksum.

        libsndfile notices damage only where it decodes; with the checksum (4 % of the decoding's time) a
        damaged utterance fails whatever part of it is wanted.
        """
        offset, size, crc32 = self._rows[extension][index].tolist()
        try:
            content = os.pread(self._descriptor(self._shard(index)), size, offset)
        except FileNotFoundError as error:
            raise self._damaged(index, "the file is missing") from error
        if len(content) != size:
            raise self._damaged(index, f"the file ends {size - len(content)} bytes too soon")
        if zlib.crc32(content) != crc32:
            raise self._damaged(index, f"the checksum of its {extension} is wrong")
        return content

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _damaged(self, index: int, what: str) -> ShardError:
        shard = self._shards[self._shard(index)]
        return ShardError(
            f"{shard}, key {self.key(index)}: {what}; copy this shard again, or remove the subset's folder "
            "and pack it again"
        )

    def _descriptor(self, shard: int) -> int:
        """An open file of a shard; the longest unused one is closed when there are many.

        pread has no position of its own, so processes and forks may share what they inherit.
        """
        if shard not in self._files:
            self._files[shard] = io.FileIO(self._shards[shard])
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard].fileno()

    def close(self) -> None:
        """Close the shards that were opened; reading opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()
