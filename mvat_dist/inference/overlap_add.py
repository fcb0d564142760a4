"""Cut a stream into overlapping windows and join them again by cross-fades, in bounded memory.

The blocks of a stream are float arrays (T, C), frames by channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Audio = npt.NDArray[np.float32]


class Window(NamedTuple):
    """One window of a stream."""

    audio: Audio
    """(T, C)."""
    shared: int
    """Number of its first frames that the previous window holds too."""


def cut(blocks: Iterable[Audio], length: int, overlap: int) -> Iterator[Window]:
    """Cut a stream into windows of `length` frames; each shares `overlap` frames with the previous one.

    The last window shares more, so that it is as long as the others. A stream of at most `length` frames is
    one window.

    Args:
        blocks: the stream, in blocks of any length.
        length: frames of a window.
        overlap: frames, at least 1 and less than `length`.
    """
    buffer: Audio | None = None
    previous: Audio | None = None
    for block in blocks:
        buffer = block if buffer is None else np.concatenate([buffer, block])
        # Longer, not equal: the rest of the stream decides how much the next window shares.
        while len(buffer) > length:
            yield Window(buffer[:length], 0 if previous is None else overlap)
            previous, buffer = buffer[:length], buffer[length - overlap :]
    if buffer is None or len(buffer) == 0:
        return
    if previous is None:
        yield Window(buffer, 0)
    else:
        fresh = buffer[overlap:]
        yield Window(np.concatenate([previous, fresh])[-length:], length - len(fresh))


def join(windows: Iterable[Window], overlap: int) -> Iterator[Audio]:
    """Join windows to a stream by raised-cosine cross-fades over `overlap` frames; yields blocks (T, C).

    A frame near the end of a window, where the network has little context after it, counts less than the same
    frame in the next window. The weights sum to 1, so windows that agree do not change.
    """
    rise = (0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)).astype(np.float32)[:, None]
    tail: Audio | None = None
    for audio, shared in windows:
        if tail is not None:
            audio = audio[shared - overlap :].copy()
            audio[:overlap] = tail + rise * (audio[:overlap] - tail)
        # The end waits for the next window. A single window may be shorter than `overlap`: then all of it
        # waits.
        kept = min(overlap, len(audio))
        yield audio[: len(audio) - kept]
        tail = audio[len(audio) - kept :]
    if tail is not None:
        yield tail
