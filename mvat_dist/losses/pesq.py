"""A differentiable PESQ (ITU-T P.862): the audible part of an error, in points of the raw score.

It has these steps of the measure: one level for both signals, bands in Bark, compensation of the mean
spectrum and of slow gains, loudness, masking, the asymmetry of added sound, the norms over bands and time.
Closed forms of psychoacoustics replace the tables of bands, thresholds and loudness. It leaves out the
alignment in time, which a network that keeps time does not need, the input's filters, the search for bad
intervals, and the weights of quiet frames and of long recordings.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.losses.enhancement import LEAST_LEVEL
from mvat_dist.losses.stft import check_shape, check_shapes, full_precision, hann, power, rms, stft

SPEECH_DB_SPL = 79.0
"""Level at which both signals are heard (P.862)."""
LEAST_SHARE = 0.1
"""Of the noisy signal's RMS: a clean signal that is quieter, at less than some -20 dB of SNR, counts as no
speech, and its item as 0 (design choice): the measure has no score where there is none, and near 1 there."""
FFT, HOP = 512, 256
"""Length and hop of the periodic Hann windows, in samples: 32 and 16 ms (P.862)."""
BANDS, BAND_BARK, FIRST_BARK = 40, 0.5, 0.5
"""Number, width and lower end of the bands: 78 Hz to 7.1 kHz (design choice)."""
EXPONENT = 0.23
"""Of intensity in loudness (Zwicker and Fastl, "Psychoacoustics", chapter 8)."""
ACTIVE_DB_SPL, TILT_FLOOR, TILT_MOST = 40.0, 1e3, 100.0
"""Of the compensated difference in mean spectra: least level of the frames it is taken from (design choice),
what is added to both spectra, and the most by which they may differ (P.862's numbers, on a scale of 1 at
0 dB SPL)."""
GAIN_FLOOR, GAIN_LEAST, GAIN_MOST, GAIN_MEMORY = 5e3, 3e-4, 5.0, 0.2
"""Of the compensated gain of each frame: what is added to both intensities, the limits, and the share of
the previous frame (P.862's numbers, on that scale; P.862 smooths recursively, here over two frames only)."""
MASKED = 0.25
"""Share of the lesser loudness up to which a difference is inaudible (P.862)."""
ADDED_FLOOR_DB_SPL = 26.0
"""Added to both intensities before their ratio is taken (design choice)."""
ADDED_EXPONENT, ADDED_LEAST, ADDED_MOST = 1.2, 3.0, 12.0
"""Weight of what was added to speech: a power of the ratio, 0 below the least, at most the last (P.862)."""
MOST, BEYOND = 45.0, 0.05
"""Disturbance of a frame from which on P.862 counts no more, and the share of the rest that counts here, so
that the worst frames have a gradient too (design choice)."""
SYLLABLE, SYLLABLE_NORM = 20, 6
"""Frames of the half-overlapping stretches, 0.32 s, and the norm in which they count (P.862)."""
DISTURBANCE_POINTS, ADDED_POINTS = 0.1, 0.0309
"""Points of raw PESQ that one unit of either disturbance costs (P.862)."""
_EPS = 1e-6
"""Keeps the gradients of roots finite. It takes 0.1 off a sixth root: less than that is nearly free."""


class PesqTargets(NamedTuple):
    """What the loss needs of a batch, prepared once for all students."""

    shape: torch.Size
    """(B, T)."""
    speech: Tensor
    """1 where the clean signal is speech, otherwise 0, (B,)."""
    intensity: Tensor
    """Intensity of the clean signal, (B, bands, frames); 1 is 0 dB SPL."""


class PesqLoss:
    """Audible disturbance 0.1 D + 0.0309 A; lower is better, 0 to about 6, and 4.5 minus it follows raw PESQ.

    D is the disturbance in sone, and A the part of it that was added to the speech: differences of specific
    loudness between estimate and clean signal minus the masked part, summed over bands, then P.862's norm
    over time. It ranks sounds as the measure does and may be a point off it. It does not depend on the
    estimate's level down to `LEAST_LEVEL`, and little on slow gains: use it beside a loss that does. Its
    value jumps where sound begins to count as added, as P.862's does.

    Sources: Rix et al., "Perceptual evaluation of speech quality (PESQ)", ICASSP 2001; Martin-Doñas et
    al., "A deep learning loss function based on the perceptual evaluation of the speech quality", IEEE
    SPL 25(11), 2018; bands by Traunmüller, JASA 88, 1990; hearing threshold by Terhardt, Hear. Res. 1, 1979.
    """

    def prepare(self, noisy: Tensor, clean: Tensor) -> PesqTargets:
        """Targets of one batch (B, T) for any number of students.

        Raises:
            ValueError: the shapes differ, or T is no more than `FFT` // 2.
        """
        check_shapes(clean, noisy)
        least = (LEAST_SHARE * rms(noisy.detach(), LEAST_LEVEL)).clamp(min=LEAST_LEVEL)
        speech = rms(clean.detach(), LEAST_LEVEL) > least
        return PesqTargets(clean.shape, speech[:, 0].float(), _intensity(clean.detach()))

    def __call__(self, estimate: Tensor, targets: PesqTargets) -> Tensor:
        """The loss () of an estimate (B, T), the mean over its items; those without speech are 0.

        Raises:
            ValueError: the estimate's shape is not that of the targets.
        """
        check_shape(estimate, targets.shape)
        intensity = _intensity(estimate)
        clean = targets.intensity * _tilt(intensity, targets.intensity)
        estimate_intensity = intensity * _gain(intensity, clean)
        loudnesses = loudness(estimate_intensity), loudness(clean)
        error = (loudnesses[0] - loudnesses[1]).abs() - MASKED * torch.minimum(*loudnesses)
        error = error.clamp(min=0)
        width = BAND_BARK * BANDS
        disturbance = _root(error.square().mean(1), 2) * width
        added = (error * _added(estimate_intensity, clean)).mean(1) * width
        points = DISTURBANCE_POINTS * _over_time(disturbance) + ADDED_POINTS * _over_time(added)
        return (points * targets.speech).mean()


def loudness(intensity: Tensor) -> Tensor:
    """Specific loudness, in sone per Bark, of intensities (..., BANDS, frames); 1 is 0 dB SPL.

    Zwicker's formula for sounds that do not spread over bands: a tone of 1 kHz at 40 dB SPL has 1 sone.
    """
    return _zwicker(intensity, _bands(intensity.dtype, intensity.device)[1]) / (BAND_BARK * _sone())


@lru_cache(maxsize=1)
def _sone() -> float:
    """The value of Zwicker's formula for the tone that has 1 sone by definition."""
    return _zwicker(torch.tensor(1e4).double(), _threshold(torch.tensor(1.0).double())).item()


def _zwicker(intensity: Tensor, threshold: Tensor) -> Tensor:
    excitation = (0.5 + 0.5 * intensity / threshold).clamp(min=1)  # nothing is heard below the threshold
    return (2 * threshold) ** EXPONENT * (excitation**EXPONENT - 1)


def _threshold(khz: Tensor) -> Tensor:
    """Intensity of the softest tone that is heard (Terhardt 1979), at frequencies in kHz."""
    db: Tensor = 3.64 * khz**-0.8 - 6.5 * torch.exp(-0.6 * (khz - 3.3) ** 2) + 1e-3 * khz**4
    return 10 ** (db / 10)


@lru_cache(maxsize=16)
def _bands(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shares of the bands in the bins of an STFT, (BANDS, FFT // 2 + 1), and their thresholds, (BANDS, 1)."""
    with torch.inference_mode(mode=False):  # as for `hann`
        bark = FIRST_BARK + BAND_BARK * torch.arange(BANDS + 1, dtype=torch.float64)
        edges = 1960 * (bark + 0.53) / (26.28 - bark)
        low, high = edges[:-1, None], edges[1:, None]
        width = SAMPLE_RATE / FFT
        bins = width * torch.arange(FFT // 2 + 1)
        overlap = torch.minimum(high, bins + width / 2) - torch.maximum(low, bins - width / 2)
        shares = overlap.clamp(min=0) / width
        return shares.to(device, dtype), _threshold((low + high) / 2000).to(device, dtype)


def _intensity(signal: Tensor) -> Tensor:
    """Intensities (B, BANDS, frames) of a signal (B, T) that is heard at `SPEECH_DB_SPL`."""
    with torch.autocast(signal.device.type, enabled=False):
        signal = full_precision(signal)
        signal = signal / rms(signal, LEAST_LEVEL)
        window = hann(FFT, signal.dtype, signal.device)
        # So that a white signal's bins add up to its power.
        window = window / (window.square().sum() * FFT / 2).sqrt()
        powers = power(stft(signal, FFT, HOP, window))
        shares, _ = _bands(signal.dtype, signal.device)
        return 10 ** (SPEECH_DB_SPL / 10) * (shares @ powers.mT)


def _tilt(estimate: Tensor, clean: Tensor) -> Tensor:
    """Factors (B, BANDS, 1) that give the clean signal the estimate's mean spectrum."""
    active = (clean.sum(1, keepdim=True) > 10 ** (ACTIVE_DB_SPL / 10)).to(clean.dtype)
    frames = active.sum(2, keepdim=True).clamp(min=1)
    means = [(signal * active).sum(2, keepdim=True) / frames for signal in (estimate, clean)]
    return ((means[0] + TILT_FLOOR) / (means[1] + TILT_FLOOR)).clamp(1 / TILT_MOST, TILT_MOST)


def _gain(estimate: Tensor, clean: Tensor) -> Tensor:
    """Factors (B, 1, frames) that give the estimate's frames the clean signal's intensity."""
    _, threshold = _bands(estimate.dtype, estimate.device)
    totals = [(signal * (signal > threshold)).sum(1, keepdim=True) for signal in (estimate, clean)]
    gains = (totals[1] + GAIN_FLOOR) / (totals[0] + GAIN_FLOOR)
    previous = torch.cat([gains[..., :1], gains[..., :-1]], -1)
    return torch.lerp(gains, previous, GAIN_MEMORY).clamp(GAIN_LEAST, GAIN_MOST)


def _added(estimate: Tensor, clean: Tensor) -> Tensor:
    """Factors (B, BANDS, frames) by which added sound counts more."""
    floor = 10 ** (ADDED_FLOOR_DB_SPL / 10)
    factor = ((estimate + floor) / (clean + floor)) ** ADDED_EXPONENT
    return torch.where(factor < ADDED_LEAST, 0.0, factor.clamp(max=ADDED_MOST))


def _over_time(disturbance: Tensor) -> Tensor:
    """The norm (B,) of disturbances (B, frames): the sixth within syllables, the second over them.

    A syllable begins at every half syllable; the last ones are filled with zeros (P.862).
    """
    disturbance = disturbance.clamp(max=MOST) + BEYOND * (disturbance - MOST).clamp(min=0)
    frames, hop = disturbance.shape[-1], SYLLABLE // 2
    last_start = (frames - 1) // hop * hop
    padded = F.pad(disturbance, (0, last_start + SYLLABLE - frames))
    syllables = padded.unfold(-1, SYLLABLE, hop) ** SYLLABLE_NORM
    norms = _root(syllables.mean(-1), SYLLABLE_NORM)
    return _root(norms.square().mean(-1), 2)


def _root(value: Tensor, order: int) -> Tensor:
    """The root of a value >= 0, with a finite gradient there."""
    root: Tensor = (value + _EPS) ** (1 / order) - _EPS ** (1 / order)
    return root
