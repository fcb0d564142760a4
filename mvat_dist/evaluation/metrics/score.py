"""A score, which is a value or the reason why there is none, and the pairs that no metric is defined for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Audio = npt.NDArray[np.floating]

SILENCE = 2.0**-16
"""Peak below which a signal is silent: it would be all zeros as 16-bit audio. Design choice."""

NO_SAMPLES = "no samples"
SILENT_REFERENCE = "silent reference"
SILENT_ESTIMATE = "silent estimate"
TOO_LITTLE_SPEECH = "too little speech in the reference"


@dataclass(frozen=True)
class Score:
    """The value of one metric, or else the reason why it has none."""

    value: float | None
    failure: str | None = None


Measure = Callable[[Audio, Audio], Score]
"""(estimate (T,), clean (T,)) at 16 kHz -> Score."""


def unusable(estimate: Audio, clean: Audio) -> str | None:
    """Why no metric is defined for this pair; None for a usable one."""
    if estimate.ndim != 1 or estimate.shape != clean.shape:
        return f"shapes differ: estimate {estimate.shape}, reference {clean.shape}"
    if clean.size == 0:
        return NO_SAMPLES
    for name, audio in (("reference", clean), ("estimate", estimate)):
        if not np.isfinite(audio).all():
            return f"{name} is not finite"
    if np.abs(clean).max() < SILENCE:
        return SILENT_REFERENCE
    if np.abs(estimate).max() < SILENCE:
        return SILENT_ESTIMATE
    return None


def finite(value: float) -> Score:
    """The score of a finite value; a failure for any other."""
    return Score(float(value)) if math.isfinite(value) else Score(None, "the score is not finite")


Result = TypeVar("Result")


def remembering(measure: Callable[[Audio, Audio], Result]) -> Callable[[Audio, Audio], Result]:
    """`measure` with its last result kept, for a pair that is measured several times in a row.

    Three composite measures use one PESQ, which takes longer than all the rest together.
    """
    last: dict[tuple[object, ...], Result] = {}

    @wraps(measure)
    def measure_once(estimate: Audio, clean: Audio) -> Result:
        key = tuple((audio.dtype.str, audio.shape, audio.tobytes()) for audio in (estimate, clean))
        if key not in last:
            last.clear()
            last[key] = measure(estimate, clean)
        return last[key]

    return measure_once
