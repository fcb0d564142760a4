"""SegSNR, LLR and WSS on frames, and the composite measures CSIG, CBAK and COVL that rest on them.

Frames, windows and constants are those of the MATLAB code that Loizou published with "Speech Enhancement:
Theory and Practice" (CRC Press, 2007), on which every composite score in the literature rests; P. C. Loizou
and Y. Hu built it on code of B. Pellom and J. Hansen. Frames last 30 ms, with a hop of 7.5 ms.

Hu and Loizou, "Evaluation of Objective Quality Measures for Speech Enhancement" (IEEE TASLP 16(1), 2008)
fitted CSIG, CBAK and COVL to listeners' opinions of signal, background and overall quality. This is the
variant of the enhancement literature since SEGAN (2017), at 16 kHz: wide-band PESQ (P.862.2) in place of the
narrow-band raw score of the fit, coefficients and frames of Loizou's ``composite.m``. Its scores compare with
published ones on VoiceBank+DEMAND, and not with those of the paper's own table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.evaluation.metrics.perceptual import pesq_wb
from mvat_dist.evaluation.metrics.score import (
    SILENCE,
    Audio,
    Measure,
    Score,
    finite,
    remembering,
    unusable,
)

Array = npt.NDArray[np.float64]

FRAME = 30 * SAMPLE_RATE // 1000
"""Samples."""
HOP = FRAME // 4
SEGMENT_LIMITS = (-10.0, 35.0)
"""dB: frames of the segmental SNR are cut to it, as silence and perfect frames would swallow the mean."""
KEPT = 0.95
"""Share of the frames, the best ones, over which LLR and WSS are averaged (Hu and Loizou, 2008)."""
ORDER = 16
"""Of the linear prediction at 16 kHz."""

OPINION = (1.0, 5.0)
"""The scale of opinions, to which every prediction is cut."""

_EPS = np.finfo(np.float64).eps
_WINDOW = np.hanning(FRAME + 2)[1:-1]

_CENTRES = np.array(
    [50, 120, 190, 260, 330, 400, 470, 540, 617.372, 703.378, 798.717, 904.128, 1020.38, 1148.30, 1288.72,
     1442.54, 1610.70, 1794.16, 1993.93, 2211.08, 2446.71, 2701.97, 2978.04, 3276.17, 3597.63]
)  # fmt: skip
_BANDWIDTHS = np.array(
    [70, 70, 70, 70, 70, 70, 70, 77.3724, 86.0056, 95.3398, 105.411, 116.256, 127.914, 140.423, 153.823,
     168.154, 183.457, 199.776, 217.153, 235.631, 255.255, 276.072, 298.126, 321.465, 346.136]
)  # fmt: skip
"""Critical bands in Hz. They end at 3.8 kHz: at 16 kHz too, WSS hears the telephone band only."""
_FFT = 1024
_FLOOR = 1e-10
_GLOBAL_PEAK, _LOCAL_PEAK = 20.0, 1.0
"""Klatt's constants of the weights (ICASSP 1982), in dB."""


def _frames(audio: Audio) -> Array:
    """(F, FRAME) windowed frames; the published code leaves out the last one that would fit exactly."""
    count = (audio.size - FRAME) // HOP
    frames = np.lib.stride_tricks.sliding_window_view(audio.astype(np.float64), FRAME)[::HOP]
    return frames[: max(0, count)] * _WINDOW


def _framed(estimate: Audio, clean: Audio) -> tuple[Array, Array] | Score:
    """Frames of both, or why there are none."""
    if failure := unusable(estimate, clean):
        return Score(None, failure)
    if clean.size < FRAME + HOP:
        return Score(None, f"shorter than {(FRAME + HOP) / SAMPLE_RATE:g} s")
    return _frames(estimate), _frames(clean)


@remembering
def segmental_snr(estimate: Audio, clean: Audio) -> Score:
    """Segmental signal-to-noise ratio in dB, from -10 to 35: the mean SNR of frames. Higher is better.

    Quackenbush, Barnwell and Clements, "Objective Measures of Speech Quality" (1988), equation 2.12, with
    frames cut to `SEGMENT_LIMITS`. Levels count: nothing is rescaled, and no offset removed.
    """
    framed = _framed(estimate, clean)
    if isinstance(framed, Score):
        return framed
    distortion, speech = (np.square(frames).sum(1) for frames in (framed[1] - framed[0], framed[1]))
    ratios = 10 * np.log10(speech / (distortion + _EPS) + _EPS)
    return finite(np.clip(ratios, *SEGMENT_LIMITS).mean())


@remembering
def llr(estimate: Audio, clean: Audio) -> Score:
    """Log-likelihood ratio, from 0: how badly the estimate's prediction filter fits clean speech. Lower is
    better.

    log(a_e' R_c a_e / a_c' R_c a_c) per frame (Quackenbush et al., 1988, equation 2.18), averaged over the
    lowest `KEPT` of the frames, without the cut to 2 that some use outside composite measures. Frames of
    digital silence in the reference predict nothing and are left out (design choice).
    """
    framed = _framed(estimate, clean)
    if isinstance(framed, Score):
        return framed
    speaking = np.abs(framed[1]).max(1) >= SILENCE
    # The published code adds this constant to both signals: a filter exists for a silent estimate too.
    ours, theirs = (frames[speaking] + _EPS * _WINDOW for frames in framed)
    correlation = _autocorrelation(theirs)
    lags = np.abs(np.subtract.outer(np.arange(ORDER + 1), np.arange(ORDER + 1)))
    matrices = correlation[:, lags]
    filters = _prediction(_autocorrelation(ours)), _prediction(correlation)
    mismatch, best = (np.einsum("fi,fij,fj->f", a, matrices, a) for a in filters)
    return finite(_trimmed_mean(np.log(mismatch / best)))


def _autocorrelation(frames: Array) -> Array:
    """(F, FRAME) -> (F, ORDER + 1)."""
    lagged = [np.einsum("ft,ft->f", frames[:, : FRAME - lag], frames[:, lag:]) for lag in range(ORDER + 1)]
    return np.stack(lagged, 1)


def _prediction(correlation: Array) -> Array:
    """(F, ORDER + 1) coefficients 1, -a_1, ... of the error filter, by Levinson and Durbin's recursion."""
    filters = np.zeros_like(correlation)
    filters[:, 0] = 1
    error = correlation[:, 0].copy()
    for order in range(1, ORDER + 1):
        reflection = -(filters[:, :order] * correlation[:, order:0:-1]).sum(1) / error
        filters[:, : order + 1] += reflection[:, None] * filters[:, order::-1]
        error *= 1 - reflection**2
    return filters


@remembering
def wss(estimate: Audio, clean: Audio) -> Score:
    """Weighted spectral slope distance, from 0: how much the slopes between critical bands differ. Lower is
    better.

    Klatt, "Prediction of Perceived Phonetic Distance from Critical-Band Spectra" (ICASSP 1982), normalised
    by the sum of the weights and averaged over the lowest `KEPT` of the frames, as Hu and Loizou (2008) do.
    """
    framed = _framed(estimate, clean)
    if isinstance(framed, Score):
        return framed
    ours, theirs = (_band_levels(frames + _EPS * _WINDOW) for frames in framed)
    slopes = np.diff(ours), np.diff(theirs)
    weights = (_slope_weights(ours, slopes[0]) + _slope_weights(theirs, slopes[1])) / 2
    distances = (weights * (slopes[0] - slopes[1]) ** 2).sum(1) / weights.sum(1)
    return finite(_trimmed_mean(distances))


def _band_filters() -> Array:
    """(FFT bins, bands) Gaussian weights, zero below -30 dB."""
    per_hertz = _FFT / SAMPLE_RATE
    bins = np.arange(_FFT // 2)[:, None]
    offset = (bins - np.floor(_CENTRES * per_hertz)) / (_BANDWIDTHS * per_hertz)
    filters = np.exp(-11 * offset**2) * _BANDWIDTHS[0] / _BANDWIDTHS
    return np.where(filters > np.exp(-30.0 / (2 * 2.303)), filters, 0.0)


_FILTERS = _band_filters()


def _band_levels(frames: Array) -> Array:
    """(F, bands) energies in dB."""
    power = np.abs(np.fft.rfft(frames, _FFT)[:, : _FFT // 2]) ** 2
    return 10 * np.log10(np.maximum(power @ _FILTERS, _FLOOR))


def _slope_weights(levels: Array, slopes: Array) -> Array:
    """(F, bands - 1): slopes near spectral peaks count most."""
    below = levels[:, :-1]
    nearest = np.empty_like(below)
    # Uphill the peak lies to the right, else to the left. The published code stops one band before it
    # uphill; the composite weights were fitted to that.
    for band in range(below.shape[1]):
        falling = slopes[:, band] <= 0
        chained = falling & (slopes[:, band - 1] <= 0) if band else np.zeros_like(falling)
        nearest[:, band] = np.where(chained, nearest[:, band - 1], below[:, band])
    for band in reversed(range(below.shape[1] - 1)):
        climbing = (slopes[:, band] > 0) & (slopes[:, band + 1] > 0)
        nearest[:, band] = np.where(climbing, nearest[:, band + 1], nearest[:, band])
    highest = levels.max(1, keepdims=True)
    weights: Array = _GLOBAL_PEAK / (_GLOBAL_PEAK + highest - below)
    return weights * (_LOCAL_PEAK / (_LOCAL_PEAK + nearest - below))


def _trimmed_mean(distances: Array) -> float:
    """Mean of the lowest `KEPT`."""
    return float(np.sort(distances)[: round(distances.size * KEPT)].mean())


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
