"""The teacher cache: what the teacher says of every segment of a corpus, in shards beside the audio's.

A cache is a folder of ``teacher-NNNNNN.tar``, one for each audio shard of the subset that training iterates
over, with its keys in its order; an index beside each of them; and ``teacher.json``, the header, written
last. An utterance ``KEY`` has a member ``KEY.<n>.safetensors.zst`` for each of its segments;
``shards/README.md`` is the specification.

MANNER normalises and attends over its whole input: a map belongs to the one segment it was made from. So the
header says which segments these are, and every row of an index holds levels of the waveform that the teacher
heard, with which the reader compares what the student is about to hear.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.sizes import Kind, Size, ViewKey
from mvat_dist.data.mixing.fingerprint import differences, with_newer_fields
from mvat_dist.data.shards.format import PASSING, ShardError
from mvat_dist.data.shards.lru_cache import Recent
from mvat_dist.data.shards.target_codec import CODECS, Codec, LessonArrays, decode, largest_size, map_name
from mvat_dist.data.shards.target_shards import SHARD_NAME, Rows, levels_of, load_rows
from mvat_dist.errors import UserError

FORMAT = 1
HEADER = "teacher.json"
LEVEL_TOLERANCE = 1e-3
"""Largest relative difference of two levels of a segment: other processors round reverberation differently,
in the seventh digit; another crop or another mixture differs in the first."""


class _OpenShard(NamedTuple):
    """A shard in use."""

    rows: Rows
    file: io.FileIO

    def close(self) -> None:
        self.file.close()


class Lessons:
    """A teacher cache, read by the number of the segment. Picklable, and small when pickled.

    Attributes:
        folder: where it lies.
        header: ``teacher`` (name, size, sha256), ``precision`` it ran in, ``data`` (`TrainingData.identity`),
            ``codec``, ``output``, ``maps`` (``side/level/view`` -> frames), ``samples`` of a segment,
            ``segments``, ``bytes`` and ``shards``.
    """

    def __init__(self, folder: Path | str, maps: Collection[ViewKey] = (), output: bool = False) -> None:
        """Open the cache in `folder`: its header and its indices. `maps` and `output` are as for `want`.

        Raises:
            UserError: nothing finished there, another format, or damage.
        """
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.codec: Codec = self.header["codec"]
        numbers = [self._rows(at)["segment"] for at in range(len(self.header["shards"]))]
        found = np.concatenate([np.empty(0, np.int64), *numbers])
        order = np.argsort(found, kind="stable")
        if not np.array_equal(found[order], np.arange(self.header["segments"])):
            raise UserError(
                f"{self.folder} does not hold every segment once: make it again with "
                "python -m mvat_dist.cache"
            )
        sizes = [len(one) for one in numbers]
        # Of every segment the shard and the row in it: 8 bytes, where the rows themselves have 60.
        self._shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
        self._row_of = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[order]
        self._open: Recent[_OpenShard] = Recent()
        self.want(maps, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # Readers open the cache themselves: no megabytes of rows in a pickle, no shared descriptors.
        return Lessons, (self.folder, list(self._wanted), bool(self._samples))

    def __len__(self) -> int:
        """Segments."""
        return len(self._row_of)

    def _rows(self, shard: int) -> Rows:
        record = self.header["shards"][shard]
        return load_rows(self.folder / record["name"], record["index_sha256"])

    def want(self, maps: Collection[ViewKey], output: bool) -> None:
        """Choose what `read` returns.

        Raises:
            UserError: the cache does not hold it.
        """
        frames = self.header["maps"]
        missing = [map_name(key) for key in maps if map_name(key) not in frames]
        if output and not self.header["output"]:
            missing.append("output (make the cache with --output)")
        if missing:
            raise UserError(f"the teacher cache {self.folder} does not hold {', '.join(missing)}")
        self._wanted = {key: int(frames[map_name(key)]) for key in sorted(maps)}
        self._samples = int(self.header["samples"]) if output else 0

    @property
    def size(self) -> Size:
        """Of the teacher."""
        return Size(**self.header["teacher"]["size"])

    def check_precision(self, precision: Literal["fp32", "bf16"]) -> None:
        """Refuse what a teacher said in half precision for a run in full precision; not the other way round.

        Raises:
            UserError: that is so.
        """
        if precision == "fp32" and self.header["precision"] != "fp32":
            raise UserError(
                f"the teacher cache {self.folder} was made in {self.header['precision']}, this run has fp32: "
                "give it --engine.precision bf16, or make the cache with --engine.precision fp32"
            )

    def check(self, data: dict[str, Any]) -> None:
        """Refuse a cache of other segments than those of `data`, a `TrainingData.identity`.

        Raises:
            UserError: with everything that differs.
        """
        if differing := list(differences(with_newer_fields(self.header["data"]), data)):
            raise UserError(
                f"the teacher cache {self.folder} was made for other segments ({'; '.join(differing)}): give "
                "the run the options of the cache, or make another cache with those of the run"
            )

    def check_teacher(self, fingerprint: str, file: Path) -> None:
        """Refuse a cache of another teacher than the one in `file`.

        Raises:
            UserError: the two are not the same network with the same weights.
        """
        made_by = self.header["teacher"]
        if made_by["sha256"] != fingerprint:
            raise UserError(
                f"the teacher cache {self.folder} was made by {made_by['name']} with weights "
                f"{made_by['sha256'][:12]}, {file} has {fingerprint[:12]}: make a cache with that teacher, "
                "or leave --teacher out"
            )

    def read(self, number: int, noisy: NDArray[np.float32]) -> LessonArrays:
        """What the teacher says of segment `number`; `noisy` is that segment (T,), as made here.

        Raises:
            ShardError: damage. The message names shard and segment.
            UserError: the teacher heard something else.
        """
        row, content = self._content(number)
        heard, here = row["levels"], levels_of(noisy)
        if not np.allclose(heard, here, rtol=LEVEL_TOLERANCE, atol=1e-7):
            raise UserError(
                f"the teacher cache {self.folder} is stale: of segment {number} the teacher heard levels "
                f"{_short(heard)}, the student would hear {_short(here)}; make the cache again"
            )
        limit = largest_size(self.header["maps"].values(), self.header["samples"])
        try:
            return decode(content, self.codec, self._wanted, self._samples, limit)
        except ValueError as error:
            raise self._damaged(number, str(error)) from error

    def _content(self, number: int) -> tuple[np.void, bytes]:
        """The row and the bytes of a segment, compared with their checksum."""
        try:
            at = int(self._shard_of[number])
            shard = self._open.get(at, lambda: self._opened(at))
            row = shard.rows[self._row_of[number]]
            content = os.pread(shard.file.fileno(), int(row["size"]), int(row["offset"]))
        except OSError as error:
            if error.errno in PASSING:
                raise
            raise self._damaged(number, str(error.strerror)) from error
        if zlib.crc32(content) != int(row["crc32"]):
            raise self._damaged(number, "its checksum is wrong")
        return row, content

    def _opened(self, shard: int) -> _OpenShard:
        rows = self._rows(shard)
        return _OpenShard(rows, io.FileIO(self.folder / self.header["shards"][shard]["name"]))

    def close(self) -> None:
        """Close the shards that were opened; reading opens them again."""
        self._open.close()

    def _damaged(self, number: int, what: str) -> ShardError:
        name = self.header["shards"][int(self._shard_of[number])]["name"]
        return ShardError(
            f"{self.folder / name}, segment {number}: {what}; remove this file and make the cache again by "
            "the same command, which keeps the others"
        )


def read_header(folder: Path) -> dict[str, Any]:
    """What a finished cache says of itself; see `Lessons`.

    Raises:
        UserError: nothing finished there, another format, or something in it that no cache has.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished teacher cache (it has no {HEADER}): make it with "
            "python -m mvat_dist.cache"
        )
    try:
        header = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): make the cache again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path} is not of cache format {FORMAT}: make the cache with this version")
    if wrong := _wrong(header):
        raise UserError(f"{path}: its {wrong} cannot be right; make the cache again")
    return header


def _wrong(header: dict[str, Any]) -> str | None:
    """The first entry of a header that filling a cache cannot have written; it may come from anywhere."""
    teacher, shards = header.get("teacher"), header.get("shards")
    right = {
        "codec": header.get("codec") in CODECS,
        "precision": header.get("precision") in ("fp32", "bf16"),
        "teacher": isinstance(teacher, dict)
        and all(isinstance(teacher.get(key), str) for key in ("name", "sha256"))
        and _is_size(teacher.get("size")),
        "data": isinstance(header.get("data"), dict),
        "output": isinstance(header.get("output"), bool),
        "coarseness": header.get("coarseness") is None or isinstance(header["coarseness"], float),
        "maps": isinstance(header.get("maps"), dict) and all(map(_is_count, header["maps"].values())),
        "samples": _is_count(header.get("samples")),
        "segments": _is_count(header.get("segments")),
        "shards": isinstance(shards, list) and all(map(_is_shard, shards)),
    }
    return next((name for name, is_right in right.items() if not is_right), None)


def _is_size(value: Any) -> bool:
    if not isinstance(value, dict) or not all(_is_count(one) for key, one in value.items() if key != "kind"):
        return False
    try:
        return Size(**value).kind in get_args(Kind)
    except (TypeError, UserError):
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


def _is_shard(record: Any) -> bool:
    """Whether this is a record of `describe_shard`: its name is a plain one, never a path."""
    return (
        isinstance(record, dict)
        and SHARD_NAME.fullmatch(str(record.get("name"))) is not None
        and all(re.fullmatch(r"[0-9a-f]{64}", str(record.get(key))) for key in ("sha256", "index_sha256"))
    )


def _short(levels: NDArray[np.float32]) -> str:
    return "[" + ", ".join(f"{level:.2g}" for level in levels[:3].tolist()) + ", ...]"
