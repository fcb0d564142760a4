"""Sound files in, sound files out: the same rate, channels, length, level and format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from mvat_dist.data.store.codecs import OnePassFile
from mvat_dist.deploy.enhancer import BLOCK, Enhancer
from mvat_dist.deploy.windows import Audio
from mvat_dist.errors import UserError
from mvat_dist.files import atomic_file

SUFFIXES = {
    ".aif", ".aifc", ".aiff", ".au", ".avr", ".caf", ".flac", ".htk", ".iff", ".mp3", ".nist", ".oga", ".ogg",
    ".opus", ".paf", ".pvf", ".rf64", ".sf", ".snd", ".sph", ".svx", ".voc", ".w64", ".wav", ".wave", ".wve",
}  # fmt: skip
"""What is taken for audio in a folder, where other files may lie. A file that is named is always tried."""

Progress = Callable[[float], object]
"""Called with seconds of audio that have been written."""


class Job(NamedTuple):
    """One file to enhance."""

    source: Path
    target: Path


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
        elif given.exists():
            found = [(given, Path(given.name))]
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
    """Audio files below `folder`, but for what an earlier call wrote to `out` inside it."""
    inside = out.resolve()
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not file.name.startswith(".")
        and (inside not in file.resolve().parents or inside == folder.resolve())
    )


def seconds(file: Path) -> float:
    """Duration by the header of `file`; 0 for what is no audio, which is found out later."""
    try:
        return float(soundfile.info(file).duration)
    except (soundfile.LibsndfileError, OSError):
        return 0.0


def enhance_file(enhancer: Enhancer, job: Job, dry: float, progress: Progress) -> int:
    """Enhance one file; the target appears whole or not at all.

    Integer formats end at full scale: what goes beyond it is clipped.

    Returns:
        How many samples were beyond full scale.

    Raises:
        UserError: not audio, damaged, a format that libsndfile reads but does not write, or samples that
            are not finite.
    """
    clipped = 0
    try:
        with OnePassFile(job.source) as sound, atomic_file(job.target) as temporary:
            pieces = enhancer.stream(_blocks(sound), sound.samplerate, sound.channels, dry)
            with _like(sound, temporary) as enhanced:
                for piece in pieces:
                    clipped += int((np.abs(piece) > 1).sum())
                    _write(enhanced, piece)
                    progress(len(piece) / sound.samplerate)
    except soundfile.SoundFileError as error:
        raise UserError(f"{job.source} cannot be read as audio: {error}") from error
    except UserError as error:
        raise UserError(f"{job.source}: {error}") from error
    return clipped


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
    return soundfile.SoundFile(path, "w", sound.samplerate, sound.channels, **kind)


def _write(enhanced: soundfile.SoundFile, piece: Audio) -> None:
    # In parts: libsndfile's Vorbis encoder puts all it is given on the stack.
    for start in range(0, len(piece), BLOCK):
        enhanced.write(piece[start : start + BLOCK])
