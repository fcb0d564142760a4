"""CSIG, CBAK and COVL: predicted opinions of signal, background and overall quality. Higher is better.

Hu and Loizou, "Evaluation of Objective Quality Measures for Speech Enhancement" (IEEE TASLP 16(1), 2008)
fitted them to listeners' opinions. This is the variant of the enhancement literature since SEGAN (2017), at
16 kHz: wide-band PESQ (P.862.2) in place of the narrow-band raw score of the fit, coefficients and
frames of Loizou's ``composite.m``. Its scores compare with published ones on VoiceBank+DEMAND, and not with
those of the paper's own table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mvat_dist.evaluation.metrics.frames import llr, segmental_snr, wss
from mvat_dist.evaluation.metrics.perceptual import pesq_wb
from mvat_dist.evaluation.metrics.score import Audio, Measure, Score

OPINION = (1.0, 5.0)
"""The scale of opinions, to which every prediction is cut."""


def _opinion(estimate: Audio, clean: Audio, constant: float, weights: Mapping[Measure, float]) -> Score:
    value = constant
    for measure, weight in weights.items():
        part = measure(estimate, clean)
        if part.value is None:
            return part
        value += weight * part.value
    return Score(float(np.clip(value, *OPINION)))


def csig(estimate: Audio, clean: Audio) -> Score:
    """Predicted opinion of the speech's distortion, 1 to 5. Fails where `pesq_wb` does."""
    return _opinion(estimate, clean, 3.093, {llr: -1.029, pesq_wb: 0.603, wss: -0.009})


def cbak(estimate: Audio, clean: Audio) -> Score:
    """Predicted opinion of the background's intrusiveness, 1 to 5. Fails where `pesq_wb` does."""
    return _opinion(estimate, clean, 1.634, {pesq_wb: 0.478, wss: -0.007, segmental_snr: 0.063})


def covl(estimate: Audio, clean: Audio) -> Score:
    """Predicted opinion of the overall quality, 1 to 5. Fails where `pesq_wb` does."""
    return _opinion(estimate, clean, 1.594, {pesq_wb: 0.805, llr: -0.512, wss: -0.007})
