"""Check packed shards against their manifest: every byte, every header, every decoded sample.

No archive library takes part: an index says exactly which bytes its tar must have, so they are compared.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.pool import parallel_map
from mvat_dist.data.prepare.manifests import measured
from mvat_dist.data.prepare.write import REJECTED, SUMMED_UP
from mvat_dist.data.shards.codecs import ARRAY_HEADER, Codec, decode_flac, encode_int16
from mvat_dist.data.shards.format import (
    META,
    Index,
    Kind,
    ShardError,
    block_sums,
    bytes_of,
    extensions,
    index_path,
    load_index,
)
from mvat_dist.data.shards.reader import MANIFEST, ShardSet, read_manifest, subset_names
from mvat_dist.data.shards.target_shards import TEACHER_FILE
from mvat_dist.data.shards.writer import TAR_BLOCK, padded, tar_header
from mvat_dist.errors import UserError
from mvat_dist.io import sha256

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
    codec: Codec
    record: dict[str, Any]


def verify(corpus: Path, workers: int) -> Report:
    """Read all of a packed corpus and compare it with what its manifests promise.

    Raises:
        UserError: the folder is no packed corpus.
    """
    names = subset_names(corpus)
    whole = read_manifest(corpus, "a packed corpus")
    jobs: list[_Job] = []
    problems = [*_corpus_problems(corpus, whole)]
    samples, keys = 0, 0
    for name in names:
        try:
            subset = ShardSet.open(corpus / name, strict=False)
        except UserError as error:
            problems.append(str(error))
            continue
        problems += _subset_problems(corpus / name, subset, whole["subsets"])
        samples += int(subset.samples.sum())
        keys += len(subset)
        jobs += [
            _Job(corpus / name / one["name"], subset.kind, subset.codec, one)
            for one in subset.manifest["shards"]
        ]
    with parallel_map(workers) as run:
        for found in tqdm(run(_verify_shard, jobs), "verifying", len(jobs), unit="shard"):
            problems += found
    return Report(len(jobs), keys, samples / SAMPLE_RATE / 3600, problems)


def _corpus_problems(corpus: Path, manifest: dict[str, Any]) -> Iterator[str]:
    known = {MANIFEST, REJECTED, *manifest["subsets"]}
    yield from (f"{corpus / name}: no part of this corpus" for name in _foreign(corpus, known))
    if "rejected" not in manifest:
        return
    try:
        lines = (corpus / REJECTED).read_text(encoding="utf-8").splitlines()
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    except (OSError, ValueError, TypeError, KeyError) as error:
        yield f"{corpus / REJECTED}: cannot be read ({error})"
        return
    if reasons != manifest["rejected"]:
        yield f"{corpus / REJECTED}: lists {dict(reasons)}, the manifest says {manifest['rejected']}"


def _foreign(folder: Path, known: set[str]) -> list[str]:
    """What lies in a folder and belongs to nobody; a teacher cache may lie beside the audio."""
    names = {path.name for path in folder.iterdir()} - known
    return sorted(name for name in names if not TEACHER_FILE.fullmatch(name))


def _subset_problems(folder: Path, subset: ShardSet, promised: Any) -> Iterator[str]:
    """What is wrong with a subset but for the content of its shards."""
    manifest = subset.manifest
    shards = [folder / one["name"] for one in manifest["shards"]]
    known = {MANIFEST, *(one.name for one in shards), *(index_path(one).name for one in shards)}
    yield from (f"{folder / name}: no part of this subset" for name in _foreign(folder, known))
    if len(set(subset.keys)) != len(subset):
        yield f"{folder}: a key occurs twice"
    if isinstance(promised, dict):  # a corpus packed by an older version lists names only
        above = promised[folder.name]
        yield from _disagreements(folder, manifest, above if isinstance(above, dict) else {})
    if not subset.damaged:
        found = measured(subset.rows, subset.kind)
        for key in (key for key in found if key in manifest and found[key] != manifest[key]):
            yield f"{folder / MANIFEST}: {key} is not what the shards hold"


def _disagreements(folder: Path, manifest: dict[str, Any], above: dict[str, Any]) -> Iterator[str]:
    """Where a subset's manifest is not what the corpus's manifest says of it."""
    path = folder / MANIFEST
    if "manifest_sha256" in above and above["manifest_sha256"] != sha256(path):
        yield f"{path}: its SHA-256 is not that in the corpus's manifest"
    for key in SUMMED_UP:
        if above.get(key) != manifest.get(key):
            yield f"{path}: {key} is {manifest.get(key)}, the corpus's manifest says {above.get(key)}"


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
    try:
        index = load_index(job.shard, job.kind, job.codec, job.record.get("index_sha256"))
    except ShardError as error:
        yield str(error)
        return
    try:
        if sha256(job.shard) != job.record.get("sha256"):
            yield f"the SHA-256 of {job.shard.name} is not the manifest's"
        size = job.shard.stat().st_size
        with job.shard.open("rb") as tar:
            yield from _tar_problems(tar, index, job)
    except FileNotFoundError:
        yield "the file is missing"
        return
    except OSError as error:
        yield f"the file cannot be read ({error.strerror})"
        return
    found = {"bytes": size, "utterances": len(index.rows), "samples": int(index.rows["samples"].sum())}
    for key, value in found.items():
        if job.record.get(key) != value:
            yield f"{key} is {value}, the manifest says {job.record.get(key)}"
    if size != bytes_of(index.rows):
        yield f"has {size} bytes, its index describes {bytes_of(index.rows)}"


def _tar_problems(tar: BinaryIO, index: Index, job: _Job) -> Iterator[str]:
    """Compare header, content and padding of every member with what the index says must be there."""
    first_block = 0
    for row in index.rows:
        key = _key(row)
        for name in extensions(job.kind, job.codec):
            size = int(row[name]["size"])
            header, at = tar.read(TAR_BLOCK), tar.tell()
            content, padding = tar.read(size), tar.read(padded(size) - size)
            if len(content) < size:
                yield f"key {key}: the file ends before the end of {key}.{name}"
                return
            if header != tar_header(f"{key}.{name}", size) or padding.strip(b"\0"):
                there = header[:100].rstrip(b"\0").decode("ascii", "replace")
                yield f"key {key}: expected member {key}.{name}, found {there!r} or a damaged header"
            if (at, zlib.crc32(content)) != (row[name]["offset"], row[name]["crc32"]):
                yield f"key {key}: its {name} is not where or what the index says"
            elif problem := _content_problem(content, name, row, job.codec):
                yield f"key {key}: its {name} {problem}"
            sums = [*block_sums(content)] if job.codec == "int16" and name != META else []
            if sums != index.blocks[first_block : first_block + len(sums)].tolist():
                yield f"key {key}: the checksums of the blocks of its {name} are wrong"
            first_block += len(sums)
    if tar.read().strip(b"\0"):
        yield "something follows the last member of its index"


def _key(row: npt.NDArray[np.void]) -> str:
    return bytes(row["key"]).decode("ascii", "replace")


def _content_problem(content: bytes, name: str, row: npt.NDArray[np.void], codec: Codec) -> str:
    """What is wrong with one member whose checksum is right."""
    samples = int(row["samples"])
    if name == META:
        return _meta_problem(content, _key(row), samples)
    if codec == "int16":
        pcm = np.frombuffer(content, "<i2", offset=ARRAY_HEADER)
        return "" if content == encode_int16(pcm) else "is not an array of 16-bit samples"
    try:
        audio = decode_flac(content, samples, 0, samples)
    except ValueError as error:
        return str(error)
    # STREAMINFO, the first block of a FLAC file, ends with the MD5 of the samples (RFC 9639, 8.2).
    pcm = (audio * np.float32(32768)).astype("<i2")
    if hashlib.md5(pcm.tobytes(), usedforsecurity=False).digest() != content[26:42]:
        return "decodes to other samples than were encoded"
    return ""


def _meta_problem(content: bytes, key: str, samples: int) -> str:
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if not isinstance(meta, dict):
        return "is not an object"
    # A shard written without `mvat_dist.pack` may tell nothing of its utterances.
    if meta and (meta.get("key"), meta.get("samples")) != (key, samples):
        return f"is of key {meta.get('key')} with {meta.get('samples')} samples"
    return ""
