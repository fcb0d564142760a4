"""Sound files in, sound files out: the same rate, channels, length, level and format."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from mvat_dist.data.audio import OnePassFile, known_frames, withheld
from mvat_dist.data.prepare.corpora import audio_files
from mvat_dist.errors import UserError
from mvat_dist.inference.enhancer import BLOCK, Enhancer
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.io import abandoned, atomic_file

SUFFIXES = {
    ".aif", ".aifc", ".aiff", ".au", ".avr", ".caf", ".flac", ".htk", ".iff", ".mp3", ".nist", ".oga", ".ogg",
    ".opus", ".paf", ".pvf", ".rf64", ".sf", ".snd", ".sph", ".svx", ".voc", ".w64", ".wav", ".wave", ".wve",
}  # fmt: skip
"""What is taken for audio in a folder, where other files may lie. A file that is named is always tried."""

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

Progress = Callable[[float], object]
"""Called with seconds of audio that have been written."""


class Job(NamedTuple):
    """One file to enhance."""

    source: Path
    target: Path


class Enhanced(NamedTuple):
    """A note on a file that was written."""

    clipped: int
    """Samples beyond full scale."""
    missing: str
    """Why the source seems to be cut off, in words; empty where it is complete."""


def plan(inputs: Iterable[Path], out: Path) -> list[Job]:
    """Pair every input with its output: files go into `out`, folders become trees below it.

    Raises:
        UserError: nothing there, or a file that would be written twice or over an input.
    """
    jobs: dict[Path, Job] = {}
    for path in inputs:
        if path.is_dir():
            files = [(source, source.relative_to(path)) for source in _audio_below(path, out)]
            if not files:
                raise UserError(f"{path} holds no audio files")
        elif path.is_file():
            files = [(path, Path(path.name))]
        elif path.exists():
            raise UserError(f"{path} is no regular file: pipe raw PCM through -, as --help shows")
        else:
            raise UserError(f"no such file or folder: {path}")
        for source, name in files:
            target = out / name
            if target in jobs and not jobs[target].source.samefile(source):
                raise UserError(
                    f"{jobs[target].source} and {source} would both become {target}: enhance them one after "
                    "the other, into different folders"
                )
            jobs[target] = Job(source, target)
    sources = {job.source.resolve() for job in jobs.values()}
    for job in jobs.values():
        if job.target.resolve() in sources:
            raise UserError(
                f"{job.target} is an input: choose another --out, nothing is written over its input"
            )
    return list(jobs.values())


def _audio_below(folder: Path, out: Path) -> list[Path]:
    """Audio files below `folder`, in linked folders too, without the files of an earlier call in `out`."""
    inside = out.resolve()
    within = folder.resolve() in inside.parents
    files = (folder / name for name, _ in audio_files(str(folder), tuple(SUFFIXES)))
    return sorted(
        file
        for file in files
        if file.is_file()
        and not file.name.startswith(".")
        and not (within and inside in file.resolve().parents)
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that no file can be made in, before hours of work.

    Raises:
        UserError: permission denied, or a read-only file system.
    """
    with _named_when_forbidden(folder), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _named_when_forbidden(folder: Path) -> Iterator[None]:
    """Turn a refusal to write into `folder` into a `UserError` that names the folder, not a file in it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise
        why = os.strerror(error.errno).lower()
        raise UserError(
            f"the folder {folder} cannot be written ({why}): allow it or choose another --out"
        ) from error


def remove_abandoned(jobs: Iterable[Job]) -> int:
    """Remove what killed processes of this host left of the targets of `jobs`; return how many files."""
    names: dict[Path, set[str]] = {}
    for job in jobs:
        names.setdefault(job.target.parent, set()).add(job.target.name)
    removed = 0
    for folder, targets in names.items():
        with suppress(OSError):
            for temporary, target in abandoned(folder):
                if target in targets:
                    temporary.unlink()
                    removed += 1
    return removed


def duration(file: Path) -> float | None:
    """Duration in seconds as the header of `file` states it; None where it does not.

    0 for a file that is no audio: enhancing it will say so.
    """
    try:
        with soundfile.SoundFile(os.fsencode(file)) as sound:
            frames = known_frames(sound.frames)
            return None if frames is None else frames / sound.samplerate
    except (soundfile.LibsndfileError, OSError, TypeError):
        return 0.0


def enhance_file(enhancer: Enhancer, job: Job, dry: float, progress: Progress) -> Enhanced:
    """Enhance one file; the target appears whole or not at all.

    Integer formats end at full scale: what goes beyond it is clipped. Of a source that was cut off, what is
    there is enhanced.

    Raises:
        UserError: not audio, not readable, damaged, a format that libsndfile reads but does not write,
            samples that are not finite, a folder in the target's place, or one around it that cannot be
            written.
        OSError: the disk is full, or fails.
    """
    if job.target.is_dir():
        raise UserError(f"{job.source}: a folder is in the place of {job.target}")
    clipped = frames = 0
    try:
        with _opened(job.source) as sound, _begun(job.target) as temporary:
            if _exceeds_wav(job.source, sound):
                raise UserError("is longer than the 4 GB of a WAV: convert it to RF64, W64 or FLAC")
            pieces = enhancer.stream(_blocks(sound), sound.samplerate, sound.channels, dry)
            with _like(sound, temporary) as enhanced:
                for piece in pieces:
                    clipped += int((np.abs(piece) > 1).sum())
                    frames += len(piece)
                    _write(enhanced, piece)
                    progress(len(piece) / sound.samplerate)
            if temporary.stat().st_size == 0:
                raise UserError(f"holds no samples, and libsndfile writes no {sound.format} without any")
            return Enhanced(clipped, _missing(job.source, sound, frames))
    except soundfile.LibsndfileError as error:
        raise UserError(f"{job.source} cannot be read as audio: {error.error_string}") from error
    except soundfile.SoundFileError as error:
        raise UserError(f"{job.source} cannot be read as audio: {error}") from error
    except UserError as error:
        raise UserError(f"{job.source}: {error}") from error


def _opened(source: Path) -> OnePassFile:
    try:
        # As bytes: soundfile cannot encode a name that is not valid in the file system's encoding.
        return OnePassFile(os.fsencode(source))
    except soundfile.LibsndfileError:
        if error := withheld(source):
            raise UserError(f"cannot be read ({os.strerror(error.errno or 0).lower()})") from error
        raise
    except TypeError as error:  # of a name that ends in .raw
        raise UserError("raw samples, which do not say their rate: pipe them in, as --help shows") from error


@contextmanager
def _begun(target: Path) -> Iterator[Path]:
    """`atomic_file`, with a file in the place that it yields."""
    with _named_when_forbidden(target.parent), atomic_file(target) as temporary:
        temporary.touch()  # says what is in the way, where libsndfile says "System error"
        yield temporary


def _blocks(sound: soundfile.SoundFile) -> Iterator[Audio]:
    while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
        yield block


def _like(sound: soundfile.SoundFile, path: Path) -> soundfile.SoundFile:
    """`path`, opened to write what `sound` holds."""
    kind = {"format": sound.format, "subtype": sound.subtype, "endian": sound.endian}
    if not soundfile.check_format(**kind):
        raise UserError(
            f"libsndfile reads {sound.format} with {sound.subtype} but does not write it: convert it first"
        )
    return soundfile.SoundFile(os.fsencode(path), "w", sound.samplerate, sound.channels, **kind)


def _write(enhanced: soundfile.SoundFile, piece: Audio) -> None:
    # In parts: libsndfile's Vorbis encoder puts all it is given on the stack.
    for start in range(0, len(piece), BLOCK):
        enhanced.write(piece[start : start + BLOCK])


# ------------------------------------------------------------------------------- what a header promises

_STATED_AND_PRESENT = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE
)
"""In libsndfile's log: sizes of the audio in WAV, AIFF and AU, and of the whole in W64 and RF64."""
_STREAMED_BYTES = 0x7FFFF000
"""Programs that write into a pipe cannot know the size, and put a huge number there."""
_PADDING_BYTES = 1
"""Often left out after an odd number of bytes."""

_SAMPLE_BYTES = {
    "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1,
}  # fmt: skip
_WAV_BYTES = 1 << 32
_OTHER_CHUNKS = 1 << 20
"""Bytes that a WAV may have besides its audio."""

_OGG_PAGE = 27 + 255 + 255 * 255
"""Largest page in bytes (RFC 3533, section 6)."""
_OGG_LAST = 4
"""Flag of a page that ends its stream."""

_ESTIMATED = 0.01
"""Part by which the length of an MP3 without a table of contents may be off."""


def _missing(source: Path, sound: soundfile.SoundFile, frames_read: int) -> str:
    """Say in words what is missing of a file that was read to its end; empty where nothing is.

    Decoders of files that were cut off give what there is and say nothing of the rest; only FLAC's fails.

    Args:
        source: the file.
        sound: the same, still open.
        frames_read: frames that the decoder gave.
    """
    if sound.format == "OGG":
        return "" if _ogg_has_its_end(source) else "its last page is missing"
    if match := _STATED_AND_PRESENT.search(sound.extra_info):
        stated, present = int(match[1]), int(match[2])
        if present + _PADDING_BYTES < stated < _STREAMED_BYTES:
            return f"its header promises {stated} bytes and {present} are there"
    promised = known_frames(sound.frames)
    if promised is not None and frames_read < promised * (1 - _ESTIMATED):
        return f"its header promises {promised} frames and {frames_read} are there"
    return ""


def _exceeds_wav(source: Path, sound: soundfile.SoundFile) -> bool:
    """Whether a WAV holds more than its 32-bit sizes can state, as a recorder or a pipe may write it.

    libsndfile stops at the stated size, and nothing tells the rest from other chunks.
    """
    frame = _SAMPLE_BYTES.get(sound.subtype, 0) * sound.channels
    if sound.format not in ("WAV", "WAVEX") or not frame:
        return False
    size = source.stat().st_size
    return size > _WAV_BYTES and size - sound.frames * frame > _OTHER_CHUNKS


def _ogg_has_its_end(source: Path) -> bool:
    with source.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _OGG_PAGE))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & _OGG_LAST:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])
