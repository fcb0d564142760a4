"""Check packed shards against their manifest: every byte, every header, every decoded sample."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.data.pool import processes
from mvat_dist.data.shards import (
    EXTENSIONS,
    FIELDS,
    META,
    Kind,
    ShardError,
    ShardSet,
    index_path,
    load_index,
    subset_names,
)
from mvat_dist.files import sha256

_KEY = re.compile(r"[0-9a-z_]+")
_ENOUGH = 20


@dataclass(frozen=True)
class Report:
    """What was checked, and every problem found, each with its shard."""

    shards: int
    utterances: int
    hours: float
    problems: list[str]


@dataclass(frozen=True)
class _Job:
    shard: Path
    kind: Kind
    record: dict[str, Any]


def verify(corpus: Path, workers: int) -> Report:
    """Read all of a packed corpus and compare it with what its manifests promise.

    Raises:
        UserError: the folder is no packed corpus.
    """
    jobs: list[_Job] = []
    problems: list[str] = []
    seconds, keys = 0.0, 0
    for name in subset_names(corpus):
        try:
            subset = ShardSet.open(corpus / name)
        except ShardError as error:
            problems.append(str(error))
            continue
        if len(set(subset.keys)) != len(subset):
            problems.append(f"{corpus / name}: a key occurs twice")
        if len(subset) != subset.manifest["utterances"]:
            promised = subset.manifest["utterances"]
            problems.append(f"{corpus / name}: {len(subset)} utterances, the manifest says {promised}")
        seconds += float(subset.samples.sum()) / SAMPLE_RATE
        keys += len(subset)
        jobs += [_Job(corpus / name / one["name"], subset.kind, one) for one in subset.manifest["shards"]]
    with processes(workers) as run:
        for found in tqdm(run(_verify_shard, jobs), "verifying", len(jobs), unit="shard"):
            problems += found
    return Report(len(jobs), keys, seconds / 3600, problems)


def _verify_shard(job: _Job) -> list[str]:
    """Every problem of one shard; at most `_ENOUGH`, so that a shard of noise does not fill the screen."""
    found = []
    for problem in _problems(job):
        found.append(f"{job.shard}: {problem}")
        if len(found) == _ENOUGH:
            found.append(f"{job.shard}: and more")
            break
    return found


def _problems(job: _Job) -> Iterator[str]:
    if not job.shard.exists():
        yield "the file is missing"
        return
    for path, promised in ((job.shard, "sha256"), (index_path(job.shard), "index_sha256")):
        if sha256(path) != job.record[promised]:
            yield f"the SHA-256 of {path.name} is not the manifest's"
    rows = load_index(job.shard, job.kind)
    extensions = [*(EXTENSIONS[field] for field in FIELDS[job.kind]), META]
    members = _members(job.shard)
    for row in rows:
        key = row["key"].decode("ascii", "replace")
        if not _KEY.fullmatch(key):
            yield f"key {key!r} is not of [0-9a-z_]"
        for extension in extensions:
            name, offset, content = next(members, ("", 0, b""))
            if name != f"{key}.{extension}":
                yield f"key {key}: expected member {key}.{extension}, found {name or 'the end of the tar'}"
                return
            place = (offset, len(content), zlib.crc32(content))
            if problem := _member_problem(
                extension, content, int(row["samples"]), place, row[extension].tolist()
            ):
                yield f"key {key}: its {extension} {problem}"
    if extra := next(members, None):
        yield f"member {extra[0]} is not in the index"


def _members(shard: Path) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset, content) of every member that can be read."""
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                yield member.name, member.offset_data, stream.read() if stream else b""
    except tarfile.TarError as error:
        yield f"nothing readable ({error})", 0, b""


def _member_problem(
    extension: str, content: bytes, samples: int, place: tuple[int, int, int], promised: tuple[int, int, int]
) -> str:
    """What is wrong with one member; `place` and `promised` are (offset, size, CRC-32)."""
    if place != promised:
        return f"has offset, size and checksum {place}, the index says {promised}"
    if extension == META:
        try:
            return "" if isinstance(json.loads(content), dict) else "is not an object"
        except ValueError as error:
            return f"is not JSON ({error})"
    try:
        audio, rate = soundfile.read(io.BytesIO(content), dtype="int16", always_2d=True)
    except soundfile.LibsndfileError as error:
        return f"does not decode ({error})"
    if rate != SAMPLE_RATE or audio.shape != (samples, 1):
        return f"has {audio.shape} samples at {rate} Hz, the index says {samples} mono at {SAMPLE_RATE} Hz"
    # STREAMINFO, the first block of a FLAC file, ends with the MD5 of the samples (RFC 9639, 8.2).
    if hashlib.md5(audio.astype("<i2").tobytes(), usedforsecurity=False).digest() != content[26:42]:
        return "decodes to other samples than were encoded"
    return ""
