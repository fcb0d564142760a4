"""Speech in a room, and what of the room the target keeps."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import fft  # scipy.signal takes 0.5 s more to import, which every reader would wait for

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.data.mix.mixing import Audio

EARLY = round(0.05 * SAMPLE_RATE)
"""Samples after the direct sound that count as early: 50 ms, the limit of the early-to-late index C50 for
speech (ISO 3382-1, annex A)."""

Target = Literal["reverberant", "early", "dry"]


def direct_sound(impulse_response: Audio) -> int:
    """Sample at which the direct sound arrives: the largest magnitude (design choice)."""
    return int(np.argmax(np.abs(impulse_response)))


def reverberate(speech: Audio, impulse_response: Audio) -> Audio:
    """`speech` in the room, as long as before and not delayed: the direct sound lies at lag zero.

    The DNS synthesizer leaves the delay in.
    """
    direct = direct_sound(impulse_response)
    size = fft.next_fast_len(speech.size + impulse_response.size - 1, real=True)
    spectrum = fft.rfft(speech, size) * fft.rfft(impulse_response, size)
    wet: Audio = fft.irfft(spectrum, size)[direct : direct + speech.size]
    return wet


def target(speech: Audio, wet: Audio, impulse_response: Audio, kind: Target) -> Audio:
    """The clean target for `speech` that became `wet`, aligned with it.

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
