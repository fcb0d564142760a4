"""Read a WAV or FLAC file of any rate and channels as mono 16 kHz, or say why it cannot be used.

A recording is a file, or a member of a WebDataset tar; `locate` finds either by its path in a corpus.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.audio import OnePassFile, known_frames, open_sound, sound_blocks
from mvat_dist.data.shards.format import scan_tar

Audio = npt.NDArray[np.float32]
Reason = Literal[
    "unreadable",
    "git-lfs-pointer",
    "empty",
    "non-finite",
    "silent",
    "too-short",
    "clipped",
    "duplicate",
    "unmatched",
    "length-mismatch",
    "held-out-speaker",
    "not-used",
]
REASONS: dict[Reason, str] = {
    "unreadable": "does not open or decode, or ends before its header says",
    "git-lfs-pointer": "a pointer that git-lfs left in place of the audio: run `git lfs pull`",
    "empty": "no bytes or no samples",
    "non-finite": "holds NaN or infinity",
    "silent": "nothing above -60 dBFS once the mean is taken off",
    "too-short": "shorter than --min_seconds (impulse responses: 10 ms)",
    "clipped": "more than 1 sample in 10,000 lies on a flat top at full scale",
    "duplicate": "the same samples as another file of its role",
    "unmatched": "its other half of the pair is missing, ambiguous or left out",
    "length-mismatch": "the two halves of the pair differ by more than 10 ms",
    "held-out-speaker": "a mixed training pair whose speaker was held out for validation",
    "not-used": "lies in no folder that the layout uses",
}
"""Reason for leaving a file out -> what it means."""

_LFS = b"version https://git-lfs.github.com/spec/"
# Programs that write WAV into a pipe cannot know the size and put a huge number there.
_STREAMED = 0x7FFFF000


_INDEXED_TARS = 1024
"""Tars of which each process remembers where the members are."""


@dataclass(frozen=True, slots=True)
class TarRecording:
    """An audio file inside a tar."""

    tar: Path
    offset: int
    """First byte of its content."""
    size: int
    """Bytes of its content."""


Recording = Path | TarRecording


def locate(corpus: Path, path: str) -> Recording:
    """Find a recording by its path in the corpus, which may lead into a tar: ``speech/000.tar/utt_1.flac``.

    Raises:
        FileNotFoundError: the tar has no such member.
        ShardError: the tar is damaged.
    """
    name, inside, member = path.partition(".tar/")
    tar = corpus / f"{name}.tar"
    if not inside or not tar.is_file():
        return corpus / path
    if member not in (members := tar_recordings(tar)):
        raise FileNotFoundError(f"{tar} has no member {member}")
    return members[member]


@lru_cache(_INDEXED_TARS)
def tar_recordings(tar: Path) -> dict[str, TarRecording]:
    """Name -> place of every member of a WebDataset tar; of equal names the last, as unpacking gives.

    Raises:
        ShardError: no tar, or a damaged one.
    """
    return {
        f"{member.key}.{member.extension}": TarRecording(tar, member.offset, member.size)
        for member in scan_tar(tar)
    }


def open_recording(recording: Recording) -> OnePassFile:
    """Open a recording, to be read forwards; the caller closes it."""
    return open_sound(recording if isinstance(recording, Path) else _stream(recording))


def stamp(recording: Recording) -> tuple[int, int]:
    """Size in bytes, and time of the last change in nanoseconds.

    Raises:
        OSError: it cannot be reached.
    """
    if isinstance(recording, Path):
        status = recording.stat()
        return status.st_size, status.st_mtime_ns
    return recording.size, recording.tar.stat().st_mtime_ns


def _stream(recording: Recording) -> BinaryIO:
    if isinstance(recording, Path):
        return recording.open("rb")
    return io.BufferedReader(_TarWindow(recording))


class _TarWindow(io.RawIOBase):
    """A member of a tar as a stream of its own."""

    def __init__(self, recording: TarRecording) -> None:
        self._file = io.FileIO(recording.tar)
        self._offset = recording.offset
        self._size = recording.size
        self._file.seek(self._offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._size - self.tell()
        return self._file.readinto(memoryview(buffer)[: max(0, left)]) or 0

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        return self._file.seek(self._offset + start + offset) - self._offset

    def close(self) -> None:
        self._file.close()
        super().close()


class UnusableError(Exception):
    """A file that cannot be packed."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def check_container(recording: Recording) -> None:
    """Refuse what libsndfile would take for something else, or read without noticing that its end is missing.

    Raises:
        UnusableError: an empty file, a pointer of git-lfs, or a WAV that is shorter than its header says.
        OSError: the file cannot be read.
    """
    size, _ = stamp(recording)
    if size == 0:
        raise UnusableError("empty", "0 bytes")
    with _stream(recording) as stream:
        head = stream.read(64)
    if head.startswith(_LFS):
        raise UnusableError("git-lfs-pointer", "the audio itself was never downloaded")
    if head.startswith(b"RIFF") and len(head) >= 8:
        promised = struct.unpack("<I", head[4:8])[0] + 8
        # One byte of padding after an odd chunk is often left out.
        if promised < _STREAMED and promised > size + 1:
            raise UnusableError("unreadable", f"truncated: {size} of {promised} bytes")


def read_piece(recording: Recording, start: int, stop: int, *, first_channel: bool) -> Audio:
    """Samples [start, stop) of a recording as mono 16 kHz (T,), full scale 1; may exceed it after resampling.

    Raises:
        UnusableError: the recording changed since it was inspected.
    """
    try:
        with open_recording(recording) as sound:
            sound.seek(start)
            mono = to_mono(read_block(sound, stop - start), first_channel=first_channel)
            rate = sound.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise UnusableError("unreadable", one_line(error)) from error
    return _resampled(mono, rate)


def read_whole(path: Path) -> Audio:
    """All samples of a file as mono 16 kHz (T,), full scale 1; may exceed it after resampling.

    The channels are averaged. The header need not say how long the file is.

    Raises:
        soundfile.LibsndfileError: it does not open.
        UnusableError: it does not decode, ends before its header says, or holds NaN or infinity.
    """
    with open_sound(path) as sound:
        try:
            blocks = [to_mono(_checked_finite(block), first_channel=False) for block in sound_blocks(sound)]
        except soundfile.LibsndfileError as error:
            raise UnusableError("unreadable", one_line(error)) from error
        frames, rate = known_frames(sound.frames), sound.samplerate
    mono = np.concatenate([np.zeros(0, np.float32), *blocks])[:frames]
    if frames is not None:
        _check_complete(mono, frames)
    return _resampled(mono, rate)


def read_block(sound: soundfile.SoundFile, frames: int) -> Audio:
    """The next `frames` samples, (frames, channels).

    Raises:
        UnusableError: there are fewer, or NaN or infinity among them.
    """
    block = cast(Audio, sound.read(frames, dtype="float32", always_2d=True))
    _check_complete(block, frames)
    return _checked_finite(block)


def to_mono(block: Audio, *, first_channel: bool) -> Audio:
    """(T,) of (T, channels): the mean of all channels, or the first one."""
    if first_channel or block.shape[1] == 1:
        return np.ascontiguousarray(block[:, 0])
    return cast(Audio, block.mean(axis=1, dtype=np.float32))


def one_line(error: Exception) -> str:
    """An error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _resampled(mono: Audio, rate: int) -> Audio:
    return mono if rate == SAMPLE_RATE else cast(Audio, soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ"))


def _check_complete(block: Audio, frames: int) -> None:
    if len(block) < frames:
        raise UnusableError("unreadable", f"truncated: {frames - len(block)} samples are missing")


def _checked_finite(block: Audio) -> Audio:
    if not np.isfinite(block).all():
        raise UnusableError("non-finite", REASONS["non-finite"])
    return block
