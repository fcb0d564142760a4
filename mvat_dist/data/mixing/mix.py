"""Joining and mixing waveforms: pure functions on float32 arrays of shape (T,).

The mixture follows the DNS-Challenge synthesizer (Reddy et al., "The INTERSPEECH 2020 Deep Noise
Suppression Challenge", section 3): several clips joined until a segment is full, a broadband SNR over the
segment or over its active frames, a random level of the mixture, and one common gain where the peak would
clip. Sums are taken with NumPy, never with BLAS: a BLAS sum depends on the
number of its threads, and a mixture must not depend on the process that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Audio = NDArray[np.float32]

PEAK = 0.99
"""Largest magnitude of a mixture, as in the DNS synthesizer: a mixture must survive as 16-bit audio."""

SILENCE_DBFS = -65.0
"""RMS level below which a stretch counts as silent (design choice: about 18 steps of 16-bit audio)."""


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
    at = 0
    for number, piece in enumerate(pieces):
        target = joined[at : at + piece.size]
        target[:] = piece
        ramp = np.linspace(0.0, 1.0, min(fade, piece.size), endpoint=False, dtype=np.float32)
        if number > 0:
            target[: ramp.size] *= ramp
        if number < len(pieces) - 1:
            target[target.size - ramp.size :] *= ramp[::-1]
        at += piece.size + gap
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
    measured: NDArray[np.bool_] | None = None,
) -> Mixture:
    """Add `noise` to `speech` at `snr_db` and scale the sum to an RMS of `level` dBFS.

    The level is lower where the peak would pass `PEAK`. ``noisy - clean`` is the scaled noise, up to
    float32 rounding, unless there is another target. `snr_db` None leaves the noise as it is: for a silent
    side no ratio exists.

    Args:
        target: the clean side, in step with `speech`; by default the speech itself.
        measured: samples (T,) over which the ratio is taken; by default all.
    """
    factor = 1.0
    if snr_db is not None:
        of = slice(None) if measured is None else measured
        factor = noise_gain(speech[of], noise[of], snr_db)
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
