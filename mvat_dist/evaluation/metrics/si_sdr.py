"""Scale-invariant signal-to-distortion ratio."""

from __future__ import annotations

import numpy as np

from mvat_dist.evaluation.metrics.score import Audio, Score, finite, unusable

SI_SDR_LIMIT = 100.0
"""dB. Perfect and orthogonal estimates have an infinite SI-SDR, which would swallow a mean; 16-bit
audio cannot tell the values beyond this limit apart. Design choice."""


def si_sdr(estimate: Audio, clean: Audio) -> Score:
    """Scale-invariant signal-to-distortion ratio in dB, within ±`SI_SDR_LIMIT`. Higher is better.

    10 log10(||a c||^2 / ||e - a c||^2) with a = <e, c> / ||c||^2, as printed in Le Roux et al., "SDR -
    half-baked or well done?" (ICASSP 2019), section 2. Means are not removed: an offset that the
    network adds counts as distortion.
    """
    if failure := unusable(estimate, clean):
        return Score(None, failure)
    e, c = estimate.astype(np.float64), clean.astype(np.float64)
    target = (e @ c) / (c @ c) * c
    distortion = e - target
    with np.errstate(divide="ignore"):
        ratio = 10 * (np.log10(target @ target) - np.log10(distortion @ distortion))
    return finite(np.clip(ratio, -SI_SDR_LIMIT, SI_SDR_LIMIT))
