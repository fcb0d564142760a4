"""Inspect the files of a corpus, and remember the results: an interrupted packing reads no file twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from mvat_dist.data.audio import known_frames, sound_blocks
from mvat_dist.data.pool import Map
from mvat_dist.data.prepare.corpora import Listing
from mvat_dist.data.prepare.reading import (
    REASONS,
    Audio,
    Reason,
    Recording,
    UnusableError,
    check_container,
    locate,
    one_line,
    open_recording,
    read_block,
    stamp,
    to_mono,
)
from mvat_dist.data.prepare.recipes import Recipe

INSPECTIONS = "inspections.jsonl"
"""In the folder of an unfinished corpus: one line per inspected file."""
MIN_RIR_SECONDS = 0.01
SILENCE = 1e-3
"""-60 dBFS: largest distance from the mean that still counts as silent."""
FULL_SCALE = 0.99
"""Level from which a flat top counts as clipping; DNS-Challenge's audiolib uses the same."""
CLIPPED_SHARE = 1e-4

_FLAT_RUN = 4
_CHUNK = 16
"""Files that a worker inspects at a time."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one file holds. `reason` is set where the file should be left out."""

    path: str
    """Relative to the corpus, with forward slashes."""
    reason: Reason | None = None
    detail: str = ""
    rate: int = 0
    """Hz, as stored."""
    channels: int = 0
    frames: int = 0
    """Length in samples at `rate`."""
    content: bytes = b""
    """Hash of the rate and of the decoded mono samples: equal for a WAV file and its FLAC copy."""
    pieces: tuple[tuple[int, int], ...] = ()
    """(start, stop) in samples at `rate` of the pieces to pack; silent ones are not among them."""


@dataclass(frozen=True, slots=True)
class Criteria:
    """How a file is read, and what it must hold."""

    first_channel: bool
    """Take the first channel instead of the mean of all."""
    piece_seconds: float
    """Longest piece; a longer file is cut into pieces of equal length."""
    min_seconds: float
    """Shortest file."""


_Stamp = tuple[int, int]
"""Size in bytes, and time of the last change in nanoseconds; zeros where the file cannot be reached."""


def inspect_all(listing: Listing, recipe: Recipe, log: Path, run: Map) -> tuple[dict[str, Inspection], int]:
    """Inspect every file that may be packed.

    An inspection in `log`, which an earlier try wrote, counts where size and time of the file are the same.

    Returns:
        Path -> inspection, and how many inspections came from `log`.
    """
    jobs = _jobs(listing, recipe)
    inspections = dict(_remembered(listing.corpus, log, jobs))
    known = len(inspections)
    waiting = [(path, criteria) for path, criteria in jobs.items() if path not in inspections]
    results = run(partial(_inspect_with_stamp, listing.corpus), waiting, _CHUNK)
    # Line by line, so that a kill loses nothing but what is under way.
    with log.open("a", encoding="utf-8", buffering=1) as lines:
        shown = tqdm(results, "inspecting", len(jobs), initial=known, unit="file", smoothing=0.05)
        for (path, criteria), (stamped, inspection) in zip(waiting, shown, strict=True):
            lines.write(_line(stamped, criteria, inspection))
            # The worker's copy of the path would double what the listing holds.
            inspections[path] = dataclasses.replace(inspection, path=path)
    return inspections, known


def _jobs(listing: Listing, recipe: Recipe) -> dict[str, Criteria]:
    recording = Criteria(False, recipe.piece_seconds, recipe.min_seconds)
    half = Criteria(False, math.inf, recipe.min_seconds)
    room = Criteria(True, math.inf, MIN_RIR_SECONDS)
    jobs = {source.path: room if source.role == "rir" else recording for source in listing.sources}
    return jobs | {path: half for pair in listing.pairs for path in (pair.clean, pair.noisy)}


def _inspect_with_stamp(corpus: Path, job: tuple[str, Criteria]) -> tuple[_Stamp, Inspection]:
    path, criteria = job
    before = _stamp(corpus, path)  # so that a change while it is read is noticed
    return before, inspect(corpus, path, criteria)


def inspect(corpus: Path, path: str, criteria: Criteria) -> Inspection:
    """Read a whole file, a piece at a time, and report what it holds; never raises for its content.

    Args:
        corpus: folder that `path` is relative to.
        path: the file.
        criteria: how to read it, and what it must hold.
    """
    try:
        recording = locate(corpus, path)
        check_container(recording)
        with open_recording(recording) as sound:
            frames = known_frames(sound.frames)
            if frames is None:
                frames = _count_frames(recording)
            return _inspect_sound(sound, frames, path, criteria)
    except UnusableError as unusable:
        return Inspection(path, unusable.reason, unusable.detail)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        return Inspection(path, "unreadable", one_line(error))


def _count_frames(recording: Recording) -> int:
    """Frames of a file whose header leaves its length open, such as a streamed FLAC."""
    with open_recording(recording) as sound:
        return sum(map(len, sound_blocks(sound)))


def _inspect_sound(sound: soundfile.SoundFile, frames: int, path: str, criteria: Criteria) -> Inspection:
    rate = sound.samplerate
    if frames == 0:
        raise UnusableError("empty", "no samples")
    digest = hashlib.blake2b(struct.pack("<q", rate), digest_size=16)
    clipped, pieces = 0, []
    for start, stop in cut(frames, rate, criteria.piece_seconds):
        block = read_block(sound, stop - start)
        clipped += _clipped_samples(block[:, :1] if criteria.first_channel else block)
        mono = to_mono(block, first_channel=criteria.first_channel)
        digest.update(mono.tobytes())
        if np.abs(mono - mono.mean(dtype=np.float64)).max() >= SILENCE:
            pieces.append((start, stop))
    if not pieces:
        raise UnusableError("silent", REASONS["silent"])
    reason: Reason | None = None
    detail = ""
    if frames < criteria.min_seconds * rate:
        reason, detail = "too-short", f"{frames / rate:.3f} s, the limit is {criteria.min_seconds:g} s"
    elif clipped > CLIPPED_SHARE * frames:
        reason, detail = "clipped", f"{clipped} of {frames} samples on flat tops at full scale"
    return Inspection(path, reason, detail, rate, sound.channels, frames, digest.digest(), tuple(pieces))


def cut(frames: int, rate: int, piece_seconds: float) -> Iterator[tuple[int, int]]:
    """(start, stop) of as few equal pieces as keep to `piece_seconds`, covering ``range(frames)``."""
    count = max(1, math.ceil(frames / (piece_seconds * rate)))
    for number in range(count):
        yield frames * number // count, frames * (number + 1) // count


def _clipped_samples(block: Audio) -> int:
    """Samples (of the worst channel) in runs of at least `_FLAT_RUN` equal values near full scale.

    Loud is not clipped: only a flat top counts, and the single peak of a normalised file is none.
    """
    worst = 0
    for channel in block.T:
        loud = np.abs(channel) >= FULL_SCALE
        if not loud.any():
            continue
        level = loud[1:] & (channel[1:] == channel[:-1])
        edges = np.flatnonzero(np.diff(level, prepend=False, append=False))
        lengths = edges[1::2] - edges[::2] + 1
        worst = max(worst, int(lengths[lengths >= _FLAT_RUN].sum()))
    return worst


def _stamp(corpus: Path, path: str) -> _Stamp:
    try:
        return stamp(locate(corpus, path))
    except OSError:
        return 0, 0


def _line(stamped: _Stamp, criteria: Criteria, inspection: Inspection) -> str:
    # Written out: `dataclasses.asdict` copies deeply, which shows in hundreds of thousands of files.
    record = [
        *(inspection.path, inspection.reason, inspection.detail),
        *(inspection.rate, inspection.channels, inspection.frames),
    ]
    arguments = (criteria.first_channel, criteria.piece_seconds, criteria.min_seconds)
    return json.dumps([stamped, arguments, record, inspection.content.hex(), inspection.pieces]) + "\n"


def _remembered(corpus: Path, log: Path, jobs: dict[str, Criteria]) -> Iterator[tuple[str, Inspection]]:
    """The inspections in `log` of files that have not changed since; a torn end of it is cut off."""
    if not log.exists():
        return
    paths = {path: path for path in jobs}
    intact = 0
    with log.open("rb") as lines:
        for line in lines:
            try:
                stamped, criteria, inspection = _parse(line)
            except (ValueError, TypeError):
                break
            intact += len(line)
            path = paths.get(inspection.path)
            if path is not None and criteria == jobs[path] and stamped == _stamp(corpus, path):
                yield path, dataclasses.replace(inspection, path=path)
    with log.open("r+b") as lines:
        lines.truncate(intact)


def _parse(line: bytes) -> tuple[_Stamp, Criteria, Inspection]:
    if not line.endswith(b"\n"):
        raise ValueError("torn")
    (size, changed), criteria, record, content, pieces = json.loads(line)
    path, reason, detail, rate, channels, frames = record
    spans = tuple((start, stop) for start, stop in pieces)
    inspection = Inspection(path, reason, detail, rate, channels, frames, bytes.fromhex(content), spans)
    return (size, changed), Criteria(*criteria), inspection
