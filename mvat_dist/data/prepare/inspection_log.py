"""Inspect a corpus, and remember on disk what was found: an interrupted packing reads no file twice."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from mvat_dist.data.pool import Map
from mvat_dist.data.prepare.corpora import Listing
from mvat_dist.data.prepare.inspection import Inspection, inspect
from mvat_dist.data.prepare.recipes import Recipe

INSPECTIONS = "inspections.jsonl"
"""In the folder of an unfinished corpus: one line per inspected file."""
MIN_RIR_SECONDS = 0.01

_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, slots=True)
class _How:
    """Arguments of `inspect`."""

    first_channel: bool
    piece_seconds: float
    min_seconds: float


_Stamp = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds; zeros where the file cannot be reached."""


def inspect_all(listing: Listing, recipe: Recipe, log: Path, run: Map) -> tuple[dict[str, Inspection], int]:
    """Path -> what it holds, for every file that may be packed; and how many of them `log` knew.

    What an earlier try found counts for files that have not changed their size or time since.
    """
    jobs = _jobs(listing, recipe)
    found = dict(_remembered(listing.corpus, log, jobs))
    known = len(found)
    waiting = [(path, how) for path, how in jobs.items() if path not in found]
    inspected = run(partial(_inspect_one, listing.corpus), waiting, _AT_ONCE)
    # Line by line, so that a kill loses nothing but what is under way.
    with log.open("a", encoding="utf-8", buffering=1) as lines:
        shown = tqdm(inspected, "inspecting", len(jobs), initial=known, unit="file", smoothing=0.05)
        for (path, how), (stamp, inspection) in zip(waiting, shown, strict=True):
            lines.write(_line(stamp, how, inspection))
            # The worker's copy of the path would double what the listing holds.
            found[path] = dataclasses.replace(inspection, path=path)
    return found, known


def _jobs(listing: Listing, recipe: Recipe) -> dict[str, _How]:
    long = _How(False, recipe.piece_seconds, recipe.min_seconds)
    whole = _How(False, math.inf, recipe.min_seconds)
    room = _How(True, math.inf, MIN_RIR_SECONDS)
    jobs = {one.path: room if one.role == "rir" else long for one in listing.sources}
    return jobs | {path: whole for pair in listing.pairs for path in (pair.clean, pair.noisy)}


def _inspect_one(corpus: Path, job: tuple[str, _How]) -> tuple[_Stamp, Inspection]:
    path, how = job
    stamp = _stamp(corpus / path)  # before reading, so that a change in between is noticed
    return stamp, inspect(
        corpus,
        path,
        first_channel=how.first_channel,
        piece_seconds=how.piece_seconds,
        min_seconds=how.min_seconds,
    )


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _line(stamp: _Stamp, how: _How, found: Inspection) -> str:
    # Written out: `dataclasses.asdict` copies deeply, which shows in hundreds of thousands of files.
    record = [found.path, found.reason, found.detail, found.rate, found.channels, found.frames]
    arguments = (how.first_channel, how.piece_seconds, how.min_seconds)
    return json.dumps([stamp, arguments, record, found.content.hex(), found.pieces]) + "\n"


def _remembered(corpus: Path, log: Path, jobs: dict[str, _How]) -> Iterator[tuple[str, Inspection]]:
    """What `log` tells of files that are as they were; a torn end of it is cut off."""
    if not log.exists():
        return
    paths = {path: path for path in jobs}
    whole = 0
    with log.open("rb") as lines:
        for line in lines:
            try:
                stamp, how, found = _parsed(line)
            except (ValueError, TypeError):
                break
            whole += len(line)
            path = paths.get(found.path)
            if path is not None and how == jobs[path] and stamp == _stamp(corpus / path):
                yield path, dataclasses.replace(found, path=path)
    with log.open("r+b") as lines:
        lines.truncate(whole)


def _parsed(line: bytes) -> tuple[_Stamp, _How, Inspection]:
    if not line.endswith(b"\n"):
        raise ValueError("torn")
    (size, changed), how, record, content, pieces = json.loads(line)
    path, reason, detail, rate, channels, frames = record
    stretches = tuple((start, stop) for start, stop in pieces)
    found = Inspection(path, reason, detail, rate, channels, frames, bytes.fromhex(content), stretches)
    return (size, changed), _How(*how), found
