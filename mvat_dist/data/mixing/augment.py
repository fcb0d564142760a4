"""Tempo by WSOLA: other speed, same pitch (Verhelst and Roelands, ICASSP 1993).

Frames of the input are read at another pace than they are written, each from the place near its due
position where it best continues the frame before it, and are overlap-added. The search runs once, on one
reference signal; `splice` then applies the same places to any signal. It is linear in the signal, so that
stretched clean + stretched noise = stretched mixture, and both stay aligned.

Frame 40 ms, hop 20 ms and search range +-10 ms (a whole period down to 50 Hz) are design choices.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from mvat_dist.data.mixing.mix import Audio

HOP = 320
FRAME = 2 * HOP
SEARCH = 160

# Periodic Hann: the falling half of one frame and the rising half of the next sum to one.
_WINDOW = (0.5 - 0.5 * np.cos(np.pi * np.arange(FRAME) / HOP)).astype(np.float32)


def _frames(length: int) -> int:
    return -(-length // HOP)


def input_length(length: int, factor: float) -> int:
    """Samples that must be read to make `length` samples at `factor` times the tempo."""
    return round((_frames(length) - 1) * HOP * factor) + SEARCH + FRAME


def splice_points(reference: Audio, length: int, factor: float) -> NDArray[np.int64]:
    """Where each output frame is read from, shape (ceil(length / HOP),), for ``input_length`` samples.

    The place within +-`SEARCH` samples of the due position that is most like the natural continuation of the
    frame before (normalised correlation) wins. While that continuation itself is in reach it is the
    maximum by Cauchy-Schwarz, so that a search is needed only where it is not.
    """
    points = np.zeros(_frames(length), np.int64)
    energies = np.concatenate(([0.0], np.cumsum(np.square(reference, dtype=np.float64))))
    for frame in range(1, points.size):
        due = round(frame * HOP * factor)
        follow = int(points[frame - 1]) + HOP
        in_reach = abs(follow - due) <= SEARCH
        points[frame] = follow if in_reach else _most_alike(reference, energies, follow, due)
    return points


def _most_alike(reference: Audio, energies: NDArray[np.float64], follow: int, due: int) -> int:
    """The start within `SEARCH` of `due` whose next `HOP` samples are most like those at `follow`."""
    low, high = max(due - SEARCH, 0), due + SEARCH + 1
    products = np.correlate(reference[low : high + HOP - 1], reference[follow : follow + HOP], "valid")
    norms = np.sqrt(energies[low + HOP : high + HOP] - energies[low:high] + 1e-9)
    likeness = products / norms
    best = int(np.argmax(likeness))
    # Digital silence is like nothing: stay in step then.
    return low + best if likeness[best] > 0.0 else due


def splice(signal: Audio, points: NDArray[np.int64], length: int) -> Audio:
    """Overlap-add the frames of `signal` that start at `points`; shape (length,)."""
    frames = sliding_window_view(signal, FRAME)[points] * _WINDOW
    blocks = frames[:, :HOP]
    blocks[0] += signal[:HOP] * _WINDOW[HOP:]  # the frame before the first, so that it starts at full level
    blocks[1:] += frames[:-1, HOP:]
    return blocks.reshape(-1)[:length]


def change_tempo(signals: list[Audio], length: int, factor: float) -> list[Audio]:
    """`signals`, each of ``input_length(length, factor)`` samples, at `factor` times the tempo.

    The first is the reference of the search. `factor` above 1 is faster; 1 gives the input back exactly.
    """
    if factor == 1.0:
        return [signal[:length] for signal in signals]
    points = splice_points(signals[0], length, factor)
    return [splice(signal, points, length) for signal in signals]
