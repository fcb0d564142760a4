"""A recording of any length in bounded memory: overlapping windows, joined by cross-fades.

The pieces of a stream are float arrays (T, C), frames by channels. Nothing here knows what is done to
the windows.
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
    """Its first frames, of which the window before has heard the same."""


def cut(blocks: Iterable[Audio], length: int, overlap: int) -> Iterator[Window]:
    """Windows of `length` frames that share `overlap` with the one before.

    The last one shares more, so that it is as long as the others; a stream of at most `length` frames
    is one window.

    Args:
        blocks: the stream, in pieces of any length.
        length: frames of a window.
        overlap: frames, at least 1 and less than `length`.
    """
    buffer: Audio | None = None
    before: Audio | None = None
    for block in blocks:
        buffer = block if buffer is None else np.concatenate([buffer, block])
        # Longer, not as long: what follows decides how much the next window shares.
        while len(buffer) > length:
            yield Window(buffer[:length], 0 if before is None else overlap)
            before, buffer = buffer[:length], buffer[length - overlap :]
    if buffer is None or len(buffer) == 0:
        return
    if before is None:
        yield Window(buffer, 0)
    else:
        fresh = buffer[overlap:]
        yield Window(np.concatenate([before, fresh])[-length:], length - len(fresh))


def join(windows: Iterable[Window], overlap: int) -> Iterator[Audio]:
    """The stream from its windows, (T, C) at a time: a raised-cosine cross-fade over `overlap` frames.

    A frame near the end of a window, which has heard little of what comes after it, thus counts less
    than the same frame in the next window. Weights sum to 1: windows that agree come out as they are.
    """
    rise = (0.5 - 0.5 * np.cos(np.pi * (np.arange(overlap) + 0.5) / overlap)).astype(np.float32)[:, None]
    tail: Audio | None = None
    for audio, shared in windows:
        if tail is not None:
            audio = audio[shared - overlap :].copy()
            audio[:overlap] = tail + rise * (audio[:overlap] - tail)
        # The end waits for the next window; of one window alone, which may be shorter than that, all of it.
        held = min(overlap, len(audio))
        yield audio[: len(audio) - held]
        tail = audio[len(audio) - held :]
    if tail is not None:
        yield tail
