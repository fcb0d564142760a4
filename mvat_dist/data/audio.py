"""Sound files as libsndfile opens them: of any name, read forwards, of a length that is known or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import soundfile

_BLOCK = 1 << 20
_UNKNOWN_FRAMES = 1 << 35
"""Nine days at 44.1 kHz. libsndfile reports 2**63 - 1 for a FLAC whose header leaves its length open; a wrong
header can say up to 2**36 - 1."""


class OnePassFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A sound that is read once: after a read, soundfile seeks to where the decoder stands already, and in
    FLAC that decodes a block again, a tenth of the time of a crop."""

    def seekable(self) -> bool:
        return False


def open_sound(file: Path | BinaryIO) -> OnePassFile:
    """Open an audio file of any name, or a stream, to be read forwards; the caller closes it."""
    # As bytes: soundfile cannot encode a name that is not valid in the file system's encoding.
    return OnePassFile(os.fsencode(file) if isinstance(file, Path) else file)


def withheld(path: Path) -> OSError | None:
    """Why the system does not give a file, of which libsndfile says "System error"; None where it does."""
    try:
        path.open("rb").close()
    except OSError as error:
        return error
    return None


def known_frames(frames: int) -> int | None:
    """The number of frames that libsndfile reports; None where it does not know it."""
    return frames if 0 <= frames < _UNKNOWN_FRAMES else None


def sound_blocks(sound: soundfile.SoundFile) -> Iterator[npt.NDArray[np.float32]]:
    """The rest of `sound` in blocks (frames, channels); memory use follows the data, not the header."""
    while len(block := cast(npt.NDArray[np.float32], sound.read(_BLOCK, dtype="float32", always_2d=True))):
        yield block
