"""What a transmission does to the noisy side: something, but no delay and no other length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing.bandwidth import CODECS, limit_bandwidth, through_codec, transmit, writable
from mvat_dist.data.mixing.sampler import Draws
from tests.signals import noise_at, syllables

SPEECH = syllables(2.0)
NOISY = SPEECH + noise_at(SPEECH, 10.0)

codecs = pytest.mark.parametrize(
    "codec",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in writable(), reason="not in this libsndfile"))
        for name in CODECS
    ],
)


def lag(received: np.ndarray, sent: np.ndarray) -> float:
    """Delay of `received` in samples, between samples by a parabola through the correlation's peak."""
    likeness = correlate(received.astype(np.float64), sent.astype(np.float64), method="fft")
    peak = int(np.argmax(likeness))
    left, middle, right = likeness[peak - 1 : peak + 2]
    return peak - (sent.size - 1) + 0.5 * (left - right) / (left - 2 * middle + right)


def similarity(received: np.ndarray, sent: np.ndarray) -> float:
    return float(np.corrcoef(received, sent)[0, 1])


@codecs
def test_a_codec_loses_something_and_stays_in_step(codec):
    received = through_codec(NOISY, codec)
    assert received.shape == NOISY.shape
    assert received.dtype == np.float32
    assert abs(lag(received, NOISY)) < 0.2
    assert 0.8 < similarity(received, NOISY) < 0.9999
    # The end is there, too: a codec's delay that was only cut off would leave silence.
    assert similarity(received[-3200:-1600], NOISY[-3200:-1600]) > 0.7
    np.testing.assert_array_equal(through_codec(NOISY, codec), received)


@codecs
@pytest.mark.parametrize("samples", [1, 160, 3001, 40_007])
def test_a_codec_keeps_any_length(codec, samples):
    signal = np.resize(NOISY, samples)
    assert through_codec(signal, codec).shape == (samples,)


@settings(max_examples=40)
@given(edge=st.floats(500, 7900), samples=st.integers(4000, 20_000))
def test_a_limited_band_ends_at_its_edge(edge, samples):
    white = (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)
    narrow = limit_bandwidth(white, edge)
    assert narrow.shape == white.shape
    assert narrow.dtype == np.float32
    window = np.hanning(samples)
    before, after = (np.abs(np.fft.rfft(signal * window)) ** 2 for signal in (white, narrow))
    frequency = np.fft.rfftfreq(samples, 1 / 16_000)
    passed, stopped = frequency < 0.85 * edge, frequency > 1.02 * edge
    assert after[passed].sum() == pytest.approx(before[passed].sum(), rel=0.02)
    assert after[stopped].sum() <= 1e-4 * max(before[stopped].sum(), before[passed].sum())
    # In step: what is left of the pass band is the signal itself.
    spectrum = np.fft.rfft(white * window) * np.conj(np.fft.rfft(narrow * window))
    assert abs(np.angle(spectrum[passed].sum())) < 0.01


def test_the_recipe_says_what_was_done():
    plain = DataConfig()
    untouched, recipe = transmit(NOISY, plain, Draws(0, 0, 0))
    assert untouched is NOISY
    assert recipe == {"bandwidth_hz": None, "codec": None}
    both = replace(
        plain,
        bandwidth_probability=1.0,
        bandwidth_hz=(3000.0, 3500.0),
        codec_probability=1.0,
        codecs="mu-law",
    )
    received, recipe = transmit(NOISY, both, Draws(0, 0, 0))
    assert 3000 <= recipe["bandwidth_hz"] <= 3500
    assert recipe["codec"] == "mu-law"
    np.testing.assert_array_equal(
        received, through_codec(limit_bandwidth(NOISY, recipe["bandwidth_hz"]), "mu-law")
    )
    some = replace(plain, codec_probability=0.5, codecs="mu-law, gsm")
    drawn = [transmit(NOISY[:800], some, Draws(0, 0, place))[1]["codec"] for place in range(200)]
    assert {name: drawn.count(name) > 25 for name in ("mu-law", "gsm")} == {"mu-law": True, "gsm": True}
    assert 70 < drawn.count(None) < 130


def test_a_loud_signal_stays_within_full_scale():
    loud = (0.99 * np.sign(NOISY)).astype(np.float32)
    config = replace(DataConfig(), bandwidth_probability=1.0)
    received, _ = transmit(loud, config, Draws(0, 0, 0))
    assert np.abs(limit_bandwidth(loud, 4000.0)).max() > 1.0
    assert np.abs(received).max() <= 1.0
