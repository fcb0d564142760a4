"""Sound files in, sound files out: the same rate, channels, length, level and format."""

from __future__ import annotations

import errno
import os
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
from mvat_dist.inference import lengths
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
    """What is to be said of a file that was written."""

    clipped: int
    """Samples beyond full scale."""
    missing: str
    """Why the source was taken to be cut off, in words; empty where all of it was there."""


def plan(inputs: Iterable[Path], out: Path) -> list[Job]:
    """What is to be written where: files into `out`, folders as trees below it.

    Raises:
        UserError: nothing there, or a file that would be written twice or over an input.
    """
    jobs: dict[Path, Job] = {}
    for given in inputs:
        if given.is_dir():
            found = [(source, source.relative_to(given)) for source in _audio_below(given, out)]
            if not found:
                raise UserError(f"{given} holds no audio files")
        elif given.is_file():
            found = [(given, Path(given.name))]
        elif given.exists():
            raise UserError(f"{given} is no regular file: pipe raw PCM through -, as --help shows")
        else:
            raise UserError(f"no such file or folder: {given}")
        for source, name in found:
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
    """Audio files below `folder`, in linked folders too; not what an earlier call wrote to `out` inside."""
    inside = out.resolve()
    within = folder.resolve() in inside.parents
    found = (folder / name for name, _ in audio_files(str(folder), tuple(SUFFIXES)))
    return sorted(
        file
        for file in found
        if file.is_file()
        and not file.name.startswith(".")
        and not (within and inside in file.resolve().parents)
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that no file can be made in, before hours of work.

    Raises:
        UserError: permission denied, or a read-only file system.
    """
    with _naming(folder), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Raise what forbids to write into `folder` as a `UserError` that names it, and not a temporary file."""
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
    """Remove what killed processes of this host left of the targets of `jobs`, and say of how many."""
    names: dict[Path, set[str]] = {}
    for job in jobs:
        names.setdefault(job.target.parent, set()).add(job.target.name)
    removed = 0
    for folder, its in names.items():
        with suppress(OSError):
            for temporary, target in abandoned(folder):
                if target in its:
                    temporary.unlink()
                    removed += 1
    return removed


def seconds(file: Path) -> float | None:
    """Duration by the header of `file`; None where it leaves that open.

    0 for what is no audio, which is found out later.
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
            if lengths.out_of_reach(job.source, sound):
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
            return Enhanced(clipped, lengths.missing(job.source, sound, frames))
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
    with _naming(target.parent), atomic_file(target) as temporary:
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
