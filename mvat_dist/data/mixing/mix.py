"""Join, mix and measure waveforms: pure functions on float32 arrays of shape (T,).

The mixture follows the DNS-Challenge synthesizer (Reddy et al., "The INTERSPEECH 2020 Deep Noise
Suppression Challenge", section 3): several clips joined until a segment is full, a broadband SNR over the
segment or over its active frames, a random level of the mixture, and one common gain where the peak would
clip. Sums are taken with NumPy, never with BLAS: a BLAS sum depends on the number of its threads, and a
mixture must not depend on the process that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.schema import SAMPLE_RATE

Audio = NDArray[np.float32]

PEAK = 0.99
"""Largest magnitude of a mixture, as in the DNS synthesizer: a mixture must survive as 16-bit audio."""

SILENCE_DBFS = -65.0
"""RMS level below which a signal counts as silent (design choice: about 18 steps of 16-bit audio)."""


ACTIVITY_FRAME = round(0.05 * SAMPLE_RATE)
RATIO_FRAME = round(0.1 * SAMPLE_RATE)

_REFERENCE_POWER = 10.0**-2.5
"""Mean square to which a signal is scaled before its frames are judged: -25 dBFS."""

_ATTACK, _RELEASE = 0.8, 0.05
"""Weight of a frame against the one before it, where the probability rises and where it falls."""

_PROBABILITY = 0.13
"""Smoothed probability above which a frame is active."""

_NOISE_RANGE_DB = 25.0
"""Frames of noise whose level lies further below its peak are not active."""


class Mixture(NamedTuple):
    """A mixture and how it was made.

    ``noisy = speech_gain * speech + noise_gain * noise`` and ``clean = speech_gain * target``.
    """

    noisy: Audio
    clean: Audio
    speech_gain: float
    noise_gain: float
    peak_gain: float
    """Common factor, contained in the two gains, that kept the peak at `PEAK`; 1 where it was not needed."""


def energy(signal: Audio) -> float:
    """Sum of squares over all samples, in float64."""
    return float(np.square(signal, dtype=np.float64).sum())


def level_dbfs(signal: Audio) -> float:
    """RMS level in dB relative to full scale (a constant 1.0 has 0 dBFS); -inf for digital silence."""
    power = energy(signal) / max(signal.size, 1)
    return 10.0 * float(np.log10(power)) if power > 0.0 else -np.inf


def is_silent(signal: Audio) -> bool:
    """Whether the RMS level is below `SILENCE_DBFS`."""
    return level_dbfs(signal) < SILENCE_DBFS


def from_db(gain: float) -> float:
    """The amplitude factor of a gain in dB."""
    return float(10.0 ** (gain / 20.0))


def join(pieces: Sequence[Audio], gap: int, fade: int) -> Audio:
    """The pieces one after the other with `gap` samples of silence between two.

    The inner ends are faded over `fade` samples, so that a piece that was cut inside a sound does not
    start with a click; the two outer ends are left as they are.
    """
    if len(pieces) == 1:
        return pieces[0]
    total = sum(piece.size for piece in pieces) + gap * (len(pieces) - 1)
    joined = np.zeros(total, np.float32)
    start = 0
    for number, piece in enumerate(pieces):
        target = joined[start : start + piece.size]
        target[:] = piece
        ramp = np.linspace(0.0, 1.0, min(fade, piece.size), endpoint=False, dtype=np.float32)
        if number > 0:
            target[: ramp.size] *= ramp
        if number < len(pieces) - 1:
            target[target.size - ramp.size :] *= ramp[::-1]
        start += piece.size + gap
    return joined


def noise_gain(speech: Audio, noise: Audio, snr_db: float) -> float:
    """Factor of `noise` at which 10 log10(sum speech^2 / sum (factor * noise)^2) equals `snr_db`.

    Broadband and over all samples given, pauses included. Both signals must have energy.
    """
    return float(np.sqrt(energy(speech) / energy(noise))) * from_db(-snr_db)


def limit_gain(noisy: Audio, clean: Audio) -> float:
    """Common factor, at most 1, that brings the larger peak of the two down to `PEAK`."""
    peak = max(float(np.abs(noisy).max()), float(np.abs(clean).max()))
    return 1.0 if peak <= PEAK else PEAK * (1.0 - 1e-6) / peak  # the margin absorbs float32 rounding


def mix(
    speech: Audio,
    noise: Audio,
    snr_db: float | None,
    level: float,
    *,
    target: Audio | None = None,
    snr_mask: NDArray[np.bool_] | None = None,
) -> Mixture:
    """Add `noise` to `speech` at `snr_db` and scale the sum to an RMS of `level` dBFS.

    The level is lower where the peak would pass `PEAK`. ``noisy - clean`` is the scaled noise, up to
    float32 rounding, unless there is another target. `snr_db` None leaves the noise as it is: for a silent
    side no ratio exists.

    Args:
        target: the clean side, in step with `speech`; by default the speech itself.
        snr_mask: samples (T,) over which the ratio is taken; by default all.
    """
    factor = 1.0
    if snr_db is not None:
        samples = slice(None) if snr_mask is None else snr_mask
        factor = noise_gain(speech[samples], noise[samples], snr_db)
    noisy = speech + np.float32(factor) * noise
    power = energy(noisy)
    scale = from_db(level) / float(np.sqrt(power / noisy.size)) if power > 0.0 else 1.0
    noisy *= np.float32(scale)
    clean = np.float32(scale) * (speech if target is None else target)
    peak_gain = limit_gain(noisy, clean)
    if peak_gain < 1.0:
        noisy *= np.float32(peak_gain)
        clean *= np.float32(peak_gain)
    scale *= peak_gain
    return Mixture(noisy, clean, scale, scale * factor, peak_gain)


def active_share(signal: Audio) -> float:
    """Share of active 50 ms frames, 0 to 1; a last shorter frame counts as one.

    This is ``activitydetector`` of the synthesizer's ``audiolib``, without its loop. A frame's probability is
    a logistic function of its energy. It is smoothed with that of the frame before, fast where it rises and
    slowly where it falls, so that the end of a word does not end the activity.
    """
    energies = _frame_energies(signal, ACTIVITY_FRAME)
    power = float(energies.sum()) / max(signal.size, 1)
    if power == 0.0:
        return 0.0
    # The synthesizer takes 20 log10 of the energy, twice the usual decibels: a slope of 0.4 per dB, not 0.2.
    decibels = 20.0 * np.log10(energies * (_REFERENCE_POWER / power) + np.finfo(np.float64).eps)
    probability = 1.0 / (1.0 + np.exp(1.0 - 0.2 * decibels))
    previous = np.concatenate(([0.0], probability[:-1]))
    weight = np.where(probability > previous, _ATTACK, _RELEASE)
    smoothed = weight * probability + (1.0 - weight) * previous
    return float(np.mean(smoothed > _PROBABILITY))


def active_noise_samples(speech: Audio, noise: Audio) -> NDArray[np.bool_] | None:
    """Mask (T,) of the 100 ms frames with active noise, over which the ratio of speech to noise is taken.

    This is the rule of ``active_rms`` of the synthesizer's ``audiolib``: a frame is active where the noise's
    RMS is at most 25 dB below its peak. None where no frame is active, or where the speech has no energy in
    any of them: no ratio exists then.
    """
    peak = float(np.abs(noise).max())
    energies = _frame_energies(noise, RATIO_FRAME)
    sizes = np.diff(np.append(np.arange(0, noise.size, RATIO_FRAME), noise.size))
    active = energies / sizes > peak**2 * 10.0 ** (-_NOISE_RANGE_DB / 10.0)
    mask = np.repeat(active, sizes)
    return mask if np.any(speech[mask]) else None


def _frame_energies(signal: Audio, frame: int) -> NDArray[np.float64]:
    """Sum of squares of each frame, the last one maybe shorter."""
    squares = np.square(signal, dtype=np.float64)
    return np.add.reduceat(squares, np.arange(0, signal.size, frame))
