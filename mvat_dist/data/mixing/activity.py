"""Where a signal is active: the two measures of the DNS-Challenge synthesizer, without its loops.

One asks how much of a stretch of speech is speech, the other over which frames a ratio of speech to noise
is taken (``activitydetector`` and ``active_rms`` of the synthesizer's ``audiolib``; the constants are its).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.mixing.mix import Audio

ACTIVITY_FRAME = round(0.05 * SAMPLE_RATE)
RATIO_FRAME = round(0.1 * SAMPLE_RATE)

_REFERENCE_POWER = 10.0**-2.5
"""Mean square to which a stretch is brought before its frames are judged: -25 dBFS."""

_ATTACK, _RELEASE = 0.8, 0.05
"""Weight of a frame against the one before it, where the probability rises and where it falls."""

_PROBABILITY = 0.13
"""Smoothed probability above which a frame is active."""

_NOISE_RANGE_DB = 25.0
"""Frames of noise whose level lies further below its peak are not active."""


def active_share(signal: Audio) -> float:
    """Share of active 50 ms frames, 0 to 1; a last shorter frame counts as one.

    A frame's probability is a logistic function of its energy; each is smoothed with the one before it,
    fast where it rises, slowly where it falls, so that the end of a word does not end the activity.
    """
    energies = _frame_energies(signal, ACTIVITY_FRAME)
    power = float(energies.sum()) / max(signal.size, 1)
    if power == 0.0:
        return 0.0
    # The synthesizer's decibels are of 20 log10 of the energy, twice the usual: 0.4 a dB, not 0.2.
    decibels = 20.0 * np.log10(energies * (_REFERENCE_POWER / power) + np.finfo(np.float64).eps)
    probability = 1.0 / (1.0 + np.exp(1.0 - 0.2 * decibels))
    before = np.concatenate(([0.0], probability[:-1]))
    weight = np.where(probability > before, _ATTACK, _RELEASE)
    smoothed = weight * probability + (1.0 - weight) * before
    return float(np.mean(smoothed > _PROBABILITY))


def ratio_samples(speech: Audio, noise: Audio) -> NDArray[np.bool_] | None:
    """Samples (T,) over which the ratio of speech to noise is taken: the 100 ms frames with active noise.

    A frame is active where the noise's RMS is at most 25 dB below its peak. None where no frame is, or where
    the speech has no energy in any of them: no ratio exists then.
    """
    peak = float(np.abs(noise).max())
    energies = _frame_energies(noise, RATIO_FRAME)
    sizes = np.diff(np.append(np.arange(0, noise.size, RATIO_FRAME), noise.size))
    active = energies / sizes > peak**2 * 10.0 ** (-_NOISE_RANGE_DB / 10.0)
    chosen = np.repeat(active, sizes)
    return chosen if np.any(speech[chosen]) else None


def _frame_energies(signal: Audio, frame: int) -> NDArray[np.float64]:
    """Sum of squares of each frame, the last one maybe shorter."""
    squares = np.square(signal, dtype=np.float64)
    return np.add.reduceat(squares, np.arange(0, signal.size, frame))
