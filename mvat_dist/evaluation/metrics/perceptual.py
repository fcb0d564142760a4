"""PESQ and STOI through their packages. Higher is better."""

from __future__ import annotations

import warnings
from typing import Literal

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.evaluation.metrics.score import TOO_LITTLE_SPEECH, Audio, Score, finite, remembering, unusable

PESQ_SHORTEST = 0.25
"""Seconds; the P.862 reference code refuses less."""

PESQ_LONGEST = 19.0
"""Seconds. The P.862 reference code has room for 50 utterances and does not look: with more it
crashes, or overwrites its own delays and returns a wrong value (measured on 51 to 59 utterances in
60 s with varying delays: 0.4 to 0.8 MOS too low). In its frames of 4 ms an utterance takes at least 46 and
the pause after it 51, so a 51st begins 19.4 s after the first at the soonest; it looks for one up to 0.3 s
after the clip. In 20 s it does find 51. Design choice: a bound on the length alone (docs/metrics.md)."""

STOI_SHORTEST = 0.4
"""Seconds: STOI correlates over 30 frames of 25.6 ms with a hop of 12.8 ms (Taal et al., 2011)."""

_STOI_TOO_LITTLE = 1e-5
"""What pystoi returns, with a warning, for less than 30 frames of speech."""


def _pesq(estimate: Audio, clean: Audio, mode: Literal["wb", "nb"]) -> Score:
    from pesq import BufferTooShortError, NoUtterancesError, pesq

    if failure := unusable(estimate, clean):
        return Score(None, failure)
    if clean.size > PESQ_LONGEST * SAMPLE_RATE:
        return Score(None, f"longer than {PESQ_LONGEST:g} s")
    try:
        return finite(pesq(SAMPLE_RATE, clean, estimate, mode))
    except BufferTooShortError:
        return Score(None, f"shorter than {PESQ_SHORTEST:g} s")
    except NoUtterancesError:
        return Score(None, TOO_LITTLE_SPEECH)


@remembering
def pesq_wb(estimate: Audio, clean: Audio) -> Score:
    """Wide-band PESQ, MOS-LQO from about 1.02 to 4.64 (ITU-T P.862.2, through the `pesq` package).

    Fails for clips below `PESQ_SHORTEST` or above `PESQ_LONGEST` seconds and for references in which
    PESQ finds no utterance. Its C code can end the process: call it through `mvat_dist.evaluation.scorer`.
    """
    return _pesq(estimate, clean, "wb")


def pesq_nb(estimate: Audio, clean: Audio) -> Score:
    """Narrow-band PESQ, MOS-LQO from about 1.02 to 4.55 (ITU-T P.862 with the mapping of P.862.1).

    Fails where `pesq_wb` does.
    """
    return _pesq(estimate, clean, "nb")


def _stoi(estimate: Audio, clean: Audio, *, extended: bool) -> Score:
    # Imported late: it imports scipy.signal, which takes 0.7 s that a process which scores PESQ need not pay.
    from pystoi import stoi as short_time_intelligibility

    if failure := unusable(estimate, clean):
        return Score(None, failure)
    if clean.size < STOI_SHORTEST * SAMPLE_RATE:
        return Score(None, f"shorter than {STOI_SHORTEST:g} s")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Not enough STFT frames", RuntimeWarning)  # the score says it
        value = float(short_time_intelligibility(clean, estimate, SAMPLE_RATE, extended=extended))
    return Score(None, TOO_LITTLE_SPEECH) if value == _STOI_TOO_LITTLE else finite(value)


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
