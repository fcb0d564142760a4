"""Check a packed corpus: the SHA-256 of every file, and one read of every utterance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.pool import parallel_map
from mvat_dist.data.shards.format import FIELDS, ShardError, audio_layout, index_path, load_index
from mvat_dist.data.shards.manifest import SubsetManifest, read_corpus
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.errors import UserError
from mvat_dist.io import sha256

_MOST_PROBLEMS = 20
"""Problems listed of one shard, so that a damaged disk does not fill the screen."""


@dataclass(frozen=True)
class Report:
    """What was checked, and every problem, each with its file."""

    shards: int
    utterances: int
    hours: float
    problems: list[str]


@dataclass(frozen=True)
class _Job:
    folder: Path
    manifest: SubsetManifest
    """Of the subset, with one shard only."""


def verify(corpus: Path, workers: int) -> Report:
    """Read all of a packed corpus and compare it with the hashes and checksums written by `pack`.

    Args:
        corpus: folder of the packed corpus, on a disk.
        workers: processes; 0 is one per core.

    Raises:
        UserError: the folder is no packed corpus.
    """
    problems: list[str] = []
    jobs: list[_Job] = []
    samples = utterances = 0
    for name, summary in read_corpus(corpus).subsets.items():
        problems += _hash_problems(corpus / name / MANIFEST, summary.manifest_sha256)
        try:
            subset = ShardSet.open(corpus / name, strict=False)
        except UserError as error:
            problems.append(str(error))
            continue
        samples += int(subset.samples.sum())
        utterances += len(subset)
        for shard in subset.shards:
            manifest = replace(subset.manifest, shards=(shard,), utterances=shard.rows)
            jobs.append(_Job(corpus / name, manifest))
    with parallel_map(workers) as run:
        for shard_problems in tqdm(run(_check_shard, jobs), "verifying", len(jobs), unit="shard"):
            problems += shard_problems
    return Report(len(jobs), utterances, samples / SAMPLE_RATE / 3600, problems)


def _hash_problems(path: Path, expected: str | None) -> list[str]:
    """Compare a file with the hash that a manifest has of it; an older version wrote some without."""
    try:
        actual = sha256(path)
    except FileNotFoundError:
        return [f"{path}: the file is missing"]
    except OSError as error:
        return [f"{path}: the file cannot be read ({error.strerror})"]
    return [] if expected in (None, actual) else [f"{path}: its SHA-256 is not the manifest's"]


def _check_shard(job: _Job) -> list[str]:
    """The problems of one shard, at most `_MOST_PROBLEMS` and a note that there are more."""
    shard = job.manifest.shards[0]
    path = job.folder / shard.name
    problems = _hash_problems(path, shard.sha256)
    problems += _hash_problems(index_path(path), shard.index_sha256)
    if path.is_file():
        problems += islice(_unreadable_utterances(job, path), _MOST_PROBLEMS + 1)
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"{path}: and more"]
    return problems


def _unreadable_utterances(job: _Job, shard: Path) -> Iterator[str]:
    """Read every utterance of a shard once, as training does."""
    try:
        index = load_index(shard, audio_layout(job.manifest.kind, job.manifest.codec))
    except ShardError as error:
        yield str(error)
        return
    subset = ShardSet(job.folder, job.manifest, [index])
    for position in range(len(subset)):
        try:
            subset.meta(position)
            for field in FIELDS[job.manifest.kind]:
                subset.read(position, field)
        except ShardError as error:
            yield str(error)
    subset.close()
