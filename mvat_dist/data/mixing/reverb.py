"""Synthetic rooms, speech in a room, and the target that keeps all, a part or nothing of the room."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import random_bits

EARLY = round(0.05 * SAMPLE_RATE)
"""Samples after the direct sound that count as early: 50 ms, the limit of the early-to-late index C50 for
speech (ISO 3382-1, annex A)."""

Target = Literal["reverberant", "early", "dry"]

VERSION = 2
"""Of synthetic rooms: raised when the same random numbers come to give other samples."""
T60 = (0.2, 1.0)
"""Shortest and longest reverberation time of synthetic rooms in seconds (design choice): a furnished office,
a lecture hall."""
DRR_DB = (-3.0, 12.0)
"""Smallest and largest ratio of direct to reverberant energy in synthetic rooms (design choice): far from
the speaker, near."""
_GAP = round(0.002 * SAMPLE_RATE)
"""Samples between the direct sound and the tail (design choice): about 0.7 m of detour."""


class SyntheticRoom(NamedTuple):
    """A room of Polack's model: the direct sound, then white noise that decays exponentially.

    Source: Polack, "La transmission de l'énergie sonore dans les salles", thesis, Université du Maine, 1988.
    It has no early reflections of its own, and all frequencies decay alike.
    """

    t60: float
    """Seconds in which the tail falls by 60 dB; it ends there."""
    drr_db: float
    """Energy of the direct sound over that of the tail."""
    seed: int
    """Of the noise."""

    def impulse_response(self) -> Audio:
        """(T,), the direct sound first, with magnitude 1."""
        tail = round(self.t60 * SAMPLE_RATE)
        # Uniform noise from raw bits: NumPy keeps those as they are, but promises that of no distribution.
        bits = random_bits("room", self.seed).random_raw(tail)
        noise = (bits >> np.uint64(11)) * 2.0**-52 - 1.0
        noise *= 10.0 ** (-3.0 * np.arange(tail) / tail)
        response = np.zeros(1 + _GAP + tail, np.float32)
        response[0] = 1.0
        response[1 + _GAP :] = noise * 10.0 ** (-self.drr_db / 20.0) / np.linalg.norm(noise)
        return response


def direct_sound(impulse_response: Audio) -> int:
    """Sample at which the direct sound arrives: the largest magnitude (design choice)."""
    return int(np.argmax(np.abs(impulse_response)))


def reverberate(speech: Audio, impulse_response: Audio) -> Audio:
    """Convolve `speech` with the room; the length stays, and the direct sound is not delayed.

    The DNS synthesizer leaves the delay in.
    """
    # Imported here because it takes half a second, which only runs with rooms need. (scipy.signal: one.)
    from scipy import fft

    direct = direct_sound(impulse_response)
    size = fft.next_fast_len(speech.size + impulse_response.size - 1, real=True)
    spectrum = fft.rfft(speech, size) * fft.rfft(impulse_response, size)
    wet: Audio = fft.irfft(spectrum, size)[direct : direct + speech.size]
    return wet


def target(speech: Audio, wet: Audio, impulse_response: Audio, kind: Target) -> Audio:
    """The clean target for `speech` that became `wet` in the room, aligned with it.

    `reverberant` is `wet` itself, the DNS synthesizer's choice; `early` keeps what arrives until `EARLY`
    after the direct sound; `dry` is the direct sound: the speech with its gain and sign. So
    ``wet - target`` is what the room adds.
    """
    if kind == "reverberant":
        return wet
    direct = direct_sound(impulse_response)
    if kind == "early":
        return reverberate(speech, impulse_response[: direct + EARLY])
    dry: Audio = speech * impulse_response[direct]
    return dry
