"""Read one audio file of a corpus: any rate, any channels, WAV or FLAC; or say why it is left out."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.audio import known_frames, open_sound, sound_blocks

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
SILENCE = 1e-3
"""-60 dBFS: largest distance from the mean that still counts as silent."""
FULL_SCALE = 0.99
"""Where a flat top is taken for clipping; DNS-Challenge's audiolib uses the same level."""
CLIPPED_SHARE = 1e-4

_FLAT_RUN = 4
_LFS = b"version https://git-lfs.github.com/spec/"
# Programs that write WAV into a pipe cannot know the size and put a huge number there.
_STREAMED = 0x7FFFF000


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
    """(start, stop) in samples at `rate` of the stretches to pack; silent ones are not among them."""


class UnusableError(Exception):
    """A file that cannot be packed: (reason, detail)."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def inspect(
    corpus: Path, path: str, *, first_channel: bool, piece_seconds: float, min_seconds: float
) -> Inspection:
    """Read a whole file, a piece at a time, and report what it holds; never raises for its content.

    Args:
        corpus: folder that `path` is relative to.
        path: the file.
        first_channel: take the first channel instead of the mean of all.
        piece_seconds: longest piece; a longer file is cut into pieces of equal length.
        min_seconds: shortest file.
    """
    try:
        _check_container(corpus / path)
        with open_sound(corpus / path) as sound:
            frames = known_frames(sound.frames)
            if frames is None:
                frames = _counted(corpus / path)
            return _inspect_sound(sound, frames, path, first_channel, piece_seconds, min_seconds)
    except UnusableError as unusable:
        return Inspection(path, unusable.reason, unusable.detail)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        return Inspection(path, "unreadable", _one_line(error))


def _counted(path: Path) -> int:
    """Frames of a file whose header leaves its length open, as that of a streamed FLAC."""
    with open_sound(path) as sound:
        return sum(map(len, sound_blocks(sound)))


def _check_container(path: Path) -> None:
    """Refuse what libsndfile would take for something else, or read without noticing its end is missing."""
    size = path.stat().st_size
    if size == 0:
        raise UnusableError("empty", "0 bytes")
    with path.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(_LFS):
        raise UnusableError("git-lfs-pointer", "the audio itself was never downloaded")
    if head.startswith(b"RIFF") and len(head) >= 8:
        promised = struct.unpack("<I", head[4:8])[0] + 8
        # One byte of padding after an odd chunk is often left out.
        if promised < _STREAMED and promised > size + 1:
            raise UnusableError("unreadable", f"truncated: {size} of {promised} bytes")


def _inspect_sound(
    sound: soundfile.SoundFile,
    frames: int,
    path: str,
    first_channel: bool,
    piece_seconds: float,
    min_seconds: float,
) -> Inspection:
    rate = sound.samplerate
    if frames == 0:
        raise UnusableError("empty", "no samples")
    digest = hashlib.blake2b(struct.pack("<q", rate), digest_size=16)
    clipped, pieces = 0, []
    for start, stop in cut(frames, rate, piece_seconds):
        block = _read_block(sound, stop - start)
        clipped += _clipped_samples(block[:, :1] if first_channel else block)
        mono = _fold(block, first_channel)
        digest.update(mono.tobytes())
        if np.abs(mono - mono.mean(dtype=np.float64)).max() >= SILENCE:
            pieces.append((start, stop))
    if not pieces:
        raise UnusableError("silent", REASONS["silent"])
    reason: Reason | None = None
    detail = ""
    if frames < min_seconds * rate:
        reason, detail = "too-short", f"{frames / rate:.3f} s, the limit is {min_seconds:g} s"
    elif clipped > CLIPPED_SHARE * frames:
        reason, detail = "clipped", f"{clipped} of {frames} samples on flat tops at full scale"
    return Inspection(path, reason, detail, rate, sound.channels, frames, digest.digest(), tuple(pieces))


def cut(frames: int, rate: int, piece_seconds: float) -> Iterator[tuple[int, int]]:
    """(start, stop) of as few equal pieces as keep to `piece_seconds`, covering ``range(frames)``."""
    count = max(1, math.ceil(frames / (piece_seconds * rate)))
    for number in range(count):
        yield frames * number // count, frames * (number + 1) // count


def read_piece(path: Path, start: int, stop: int, *, first_channel: bool) -> Audio:
    """Samples [start, stop) of a file as mono 16 kHz (T,), full scale 1; may exceed it after resampling.

    Raises:
        UnusableError: the file changed since it was inspected.
    """
    try:
        with open_sound(path) as sound:
            sound.seek(start)
            mono = _fold(_read_block(sound, stop - start), first_channel)
            rate = sound.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise UnusableError("unreadable", _one_line(error)) from error
    return _resampled(mono, rate)


def read_whole(path: Path) -> Audio:
    """All samples of a file, whether its header says how many or not, as the mean of its channels at 16 kHz
    (T,), full scale 1; may exceed it after resampling.

    Raises:
        soundfile.LibsndfileError: it does not open.
        UnusableError: it does not decode, ends before its header says, or holds NaN or infinity.
    """
    with open_sound(path) as sound:
        try:
            blocks = [_fold(_checked_finite(block), first_channel=False) for block in sound_blocks(sound)]
        except soundfile.LibsndfileError as error:
            raise UnusableError("unreadable", _one_line(error)) from error
        frames, rate = known_frames(sound.frames), sound.samplerate
    mono = np.concatenate([np.zeros(0, np.float32), *blocks])[:frames]
    if frames is not None:
        _check_all_there(mono, frames)
    return _resampled(mono, rate)


def _resampled(mono: Audio, rate: int) -> Audio:
    return mono if rate == SAMPLE_RATE else cast(Audio, soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ"))


def _read_block(sound: soundfile.SoundFile, frames: int) -> Audio:
    """The next `frames` samples, (frames, channels)."""
    block = cast(Audio, sound.read(frames, dtype="float32", always_2d=True))
    _check_all_there(block, frames)
    return _checked_finite(block)


def _check_all_there(block: Audio, frames: int) -> None:
    if len(block) < frames:
        raise UnusableError("unreadable", f"truncated: {frames - len(block)} samples are missing")


def _checked_finite(block: Audio) -> Audio:
    if not np.isfinite(block).all():
        raise UnusableError("non-finite", REASONS["non-finite"])
    return block


def _fold(block: Audio, first_channel: bool) -> Audio:
    if first_channel or block.shape[1] == 1:
        return np.ascontiguousarray(block[:, 0])
    return cast(Audio, block.mean(axis=1, dtype=np.float32))


def _clipped_samples(block: Audio) -> int:
    """Samples (of the worst channel) in runs of at least `_FLAT_RUN` equal values near full scale.

    Loud is not clipped: only a flat top counts, and a lone normalised peak is none.
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
