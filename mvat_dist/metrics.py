"""Scores of one enhanced utterance against its clean reference. Higher is better in all of them.

A score is a value or a reason why there is none, never a stand-in number: a zero for a clip that PESQ
refuses would move a mean as much as a bad network does. Every function takes the estimate and the
clean reference as float arrays (T,) at 16 kHz and equal in length.

Importable without torch: `mvat_dist.scoring` runs these functions in small child processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.errors import UserError, nearest

Audio = npt.NDArray[np.floating]

SILENCE = 2.0**-16
"""Peak below which a signal is silent: it would be all zeros as 16-bit audio. Design choice."""

SI_SDR_LIMIT = 100.0
"""dB. Perfect and orthogonal estimates have an infinite SI-SDR, which would swallow a mean; 16-bit
audio cannot tell the values beyond this limit apart. Design choice."""

PESQ_SHORTEST = 0.25
"""Seconds; the P.862 reference code refuses less."""

PESQ_LONGEST = 20.0
"""Seconds. The P.862 reference code has room for 50 utterances and does not look: with more it
crashes, or overwrites its own delays and returns a wrong value (measured on 51 to 59 utterances in
60 s with varying delays: 0.4 to 0.8 MOS too low). An utterance and its pause take at least 0.39 s, and
at most 50 fit into 20 s. Design choice."""

STOI_SHORTEST = 0.4
"""Seconds: STOI correlates over 30 frames of 25.6 ms with a hop of 12.8 ms (Taal et al., 2011)."""

_STOI_TOO_LITTLE = 1e-5
"""What pystoi returns, with a warning, for less than 30 frames of speech."""

SILENT_REFERENCE = "silent reference"
SILENT_ESTIMATE = "silent estimate"
TOO_LITTLE_SPEECH = "too little speech in the reference"


@dataclass(frozen=True)
class Score:
    """The value of one metric, or else the reason why it has none."""

    value: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Metric:
    """How to compute a score and how to print it."""

    compute: Callable[[Audio, Audio], Score]
    """(estimate (T,), clean (T,)) -> Score."""
    label: str
    unit: str
    decimals: int


def _unusable(estimate: Audio, clean: Audio) -> str | None:
    """Why no metric is defined for this pair; None for a usable one."""
    if estimate.ndim != 1 or estimate.shape != clean.shape:
        return f"shapes differ: estimate {estimate.shape}, reference {clean.shape}"
    if clean.size == 0:
        return "no samples"
    for name, audio in (("reference", clean), ("estimate", estimate)):
        if not np.isfinite(audio).all():
            return f"{name} is not finite"
    if np.abs(clean).max() < SILENCE:
        return SILENT_REFERENCE
    if np.abs(estimate).max() < SILENCE:
        return SILENT_ESTIMATE
    return None


def _finite(value: float) -> Score:
    return Score(float(value)) if math.isfinite(value) else Score(None, "the score is not finite")


def si_sdr(estimate: Audio, clean: Audio) -> Score:
    """Scale-invariant signal-to-distortion ratio in dB, within ±`SI_SDR_LIMIT`.

    10 log10(||a c||^2 / ||e - a c||^2) with a = <e, c> / ||c||^2, as printed in Le Roux et al., "SDR -
    half-baked or well done?" (ICASSP 2019), section 2. Means are not removed: an offset that the
    network adds counts as distortion.
    """
    if failure := _unusable(estimate, clean):
        return Score(None, failure)
    e, c = estimate.astype(np.float64), clean.astype(np.float64)
    target = (e @ c) / (c @ c) * c
    distortion = e - target
    with np.errstate(divide="ignore"):
        ratio = 10 * (np.log10(target @ target) - np.log10(distortion @ distortion))
    return _finite(np.clip(ratio, -SI_SDR_LIMIT, SI_SDR_LIMIT))


def _pesq(estimate: Audio, clean: Audio, mode: Literal["wb", "nb"]) -> Score:
    from pesq import BufferTooShortError, NoUtterancesError, pesq

    if failure := _unusable(estimate, clean):
        return Score(None, failure)
    if clean.size > PESQ_LONGEST * SAMPLE_RATE:
        return Score(None, f"longer than {PESQ_LONGEST:g} s")
    try:
        return _finite(pesq(SAMPLE_RATE, clean, estimate, mode))
    except BufferTooShortError:
        return Score(None, f"shorter than {PESQ_SHORTEST:g} s")
    except NoUtterancesError:
        return Score(None, TOO_LITTLE_SPEECH)


def pesq_wb(estimate: Audio, clean: Audio) -> Score:
    """Wide-band PESQ, MOS-LQO from about 1.02 to 4.64 (ITU-T P.862.2, through the `pesq` package).

    Fails for clips below `PESQ_SHORTEST` or above `PESQ_LONGEST` seconds and for references in which
    PESQ finds no utterance. Its C code can end the process: call it through `mvat_dist.scoring`.
    """
    return _pesq(estimate, clean, "wb")


def pesq_nb(estimate: Audio, clean: Audio) -> Score:
    """Narrow-band PESQ, MOS-LQO from about 1.02 to 4.55 (ITU-T P.862 with the mapping of P.862.1).

    Fails where `pesq_wb` does.
    """
    return _pesq(estimate, clean, "nb")


def _stoi(estimate: Audio, clean: Audio, *, extended: bool) -> Score:
    # Imported late: scipy.signal below it takes 0.7 s, which a process that scores PESQ need not pay.
    from pystoi import stoi as short_time_intelligibility

    if failure := _unusable(estimate, clean):
        return Score(None, failure)
    if clean.size < STOI_SHORTEST * SAMPLE_RATE:
        return Score(None, f"shorter than {STOI_SHORTEST:g} s")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Not enough STFT frames", RuntimeWarning)  # told by the score
        value = float(short_time_intelligibility(clean, estimate, SAMPLE_RATE, extended=extended))
    return Score(None, TOO_LITTLE_SPEECH) if value == _STOI_TOO_LITTLE else _finite(value)


def stoi(estimate: Audio, clean: Audio) -> Score:
    """Short-time objective intelligibility, a correlation from -1 to 1; speech lies within 0 to 1.

    Taal et al., "An Algorithm for Intelligibility Prediction of Time-Frequency Weighted Noisy Speech"
    (IEEE TASLP 19(7), 2011), through the `pystoi` package. Fails for clips with less than
    `STOI_SHORTEST` seconds of speech.
    """
    return _stoi(estimate, clean, extended=False)


def estoi(estimate: Audio, clean: Audio) -> Score:
    """Extended STOI, a correlation from -1 to 1; speech lies within 0 to 1.

    Jensen and Taal, "An Algorithm for Predicting the Intelligibility of Speech Masked by Modulated
    Noise Maskers" (IEEE/ACM TASLP 24(11), 2016), through the `pystoi` package. Fails where `stoi` does.
    """
    return _stoi(estimate, clean, extended=True)


METRICS: dict[str, Metric] = {
    "pesq_wb": Metric(pesq_wb, "PESQ-WB", "MOS", 2),
    "pesq_nb": Metric(pesq_nb, "PESQ-NB", "MOS", 2),
    "stoi": Metric(stoi, "STOI", "", 3),
    "estoi": Metric(estoi, "ESTOI", "", 3),
    "si_sdr": Metric(si_sdr, "SI-SDR", "dB", 2),
}
"""Every metric by the name that rows, configurations and the command line use."""


def select(names: str | Iterable[str]) -> tuple[str, ...]:
    """Metric names from a comma-separated selection, in its order.

    Raises:
        UserError: an unknown or repeated name, or none at all.
    """
    wanted = [one.strip() for one in (names.split(",") if isinstance(names, str) else names)]
    for name in wanted:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}; did you mean {nearest(name, METRICS)}?")
    if not wanted:
        raise UserError(f"no metric named; there are {', '.join(METRICS)}")
    if len(set(wanted)) != len(wanted):
        raise UserError(f"a metric is named twice in {', '.join(wanted)!r}")
    return tuple(wanted)
