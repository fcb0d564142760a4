"""Scores against closed forms, against the packages called directly, and on clips that have none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pesq
import pystoi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat_dist import metrics
from mvat_dist.config import SAMPLE_RATE
from mvat_dist.errors import UserError
from mvat_dist.metrics import METRICS, Score
from tests.signals import bursts, noise_at, syllables

CLEAN = syllables(3.0)


def orthogonal(clean: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The part of `noise` that `clean` does not explain, in float64."""
    c, n = clean.astype(np.float64), noise.astype(np.float64)
    return n - (n @ c) / (c @ c) * c


@settings(max_examples=25, deadline=None)
@given(
    snr=st.floats(-60, 60), gain=st.floats(0.01, 50), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 9)
)
def test_si_sdr_is_the_snr_of_scaled_speech_and_orthogonal_noise(snr, gain, sign, seed):
    noise = orthogonal(CLEAN, np.random.default_rng(seed).standard_normal(CLEAN.size))
    noise *= np.linalg.norm(CLEAN.astype(np.float64)) / np.linalg.norm(noise) * 10 ** (-snr / 20)
    estimate = sign * gain * (CLEAN + noise)
    assert metrics.si_sdr(estimate, CLEAN).value == pytest.approx(snr, abs=1e-6)


def test_si_sdr_counts_an_added_offset_as_distortion():
    tone = np.sin(2 * np.pi * 100 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)  # whole periods: zero mean
    # Power of the tone 1/2, of the offset 1/8: 10 log10(4).
    assert metrics.si_sdr(tone + np.sqrt(1 / 8), tone).value == pytest.approx(10 * np.log10(4), abs=1e-9)


def test_si_sdr_stays_finite_at_both_ends():
    tone = np.sin(2 * np.pi * 100 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    halves = np.arange(tone.size) < tone.size / 2
    assert metrics.si_sdr(tone, tone) == Score(metrics.SI_SDR_LIMIT)
    assert metrics.si_sdr(tone * halves, tone * ~halves) == Score(-metrics.SI_SDR_LIMIT)


@pytest.mark.parametrize(
    ("name", "best"),
    [("pesq_wb", 4.644), ("pesq_nb", 4.549), ("stoi", 1.0), ("estoi", 1.0), ("si_sdr", 100.0)],
)
def test_clean_speech_gets_the_highest_score(name, best):
    assert METRICS[name].compute(CLEAN, CLEAN).value == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("name", METRICS)
def test_more_noise_scores_lower(name):
    scores = [
        METRICS[name].compute(CLEAN + noise_at(CLEAN, snr), CLEAN).value for snr in (30, 20, 10)
    ]  # PESQ is at its floor below
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_values_are_those_of_the_packages_with_estimate_and_reference_in_their_places():
    noisy = CLEAN + noise_at(CLEAN, 5)
    assert metrics.pesq_wb(noisy, CLEAN).value == pesq.pesq(SAMPLE_RATE, CLEAN, noisy, "wb")
    assert metrics.pesq_nb(noisy, CLEAN).value == pesq.pesq(SAMPLE_RATE, CLEAN, noisy, "nb")
    assert metrics.stoi(noisy, CLEAN).value == pytest.approx(pystoi.stoi(CLEAN, noisy, SAMPLE_RATE))
    assert metrics.estoi(noisy, CLEAN).value == pytest.approx(
        pystoi.stoi(CLEAN, noisy, SAMPLE_RATE, extended=True)
    )


NAN = CLEAN.copy()
NAN[5] = np.nan
INFINITE = CLEAN.copy()
INFINITE[-1] = np.inf
SILENT = np.zeros_like(CLEAN)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("estimate", "clean", "reason"),
    [
        (SILENT, CLEAN, "silent estimate"),
        (CLEAN * 1e-6, CLEAN, "silent estimate"),
        (CLEAN, SILENT, "silent reference"),
        (SILENT, SILENT, "silent reference"),
        (NAN, CLEAN, "estimate is not finite"),
        (INFINITE, CLEAN, "estimate is not finite"),
        (CLEAN, NAN, "reference is not finite"),
        (CLEAN[:-1], CLEAN, "shapes differ: estimate (47999,), reference (48000,)"),
        (CLEAN[None], CLEAN[None], "shapes differ: estimate (1, 48000), reference (1, 48000)"),
        (CLEAN[:0], CLEAN[:0], "no samples"),
    ],
)
def test_what_cannot_be_scored_has_a_reason_and_no_value(name, estimate, clean, reason):
    assert METRICS[name].compute(estimate, clean) == Score(None, reason)


@pytest.mark.parametrize("name", ["pesq_wb", "pesq_nb"])
def test_pesq_refuses_what_it_cannot_do(name):
    noise = noise_at(CLEAN, 0)
    click = noise * (np.arange(noise.size) < 300)
    assert METRICS[name].compute(CLEAN[:3900], CLEAN[:3900]).failure == "shorter than 0.25 s"
    assert METRICS[name].compute(noise, click).failure == metrics.TOO_LITTLE_SPEECH
    # 60 utterances in 60 s end the process that hands them to PESQ.
    assert METRICS[name].compute(bursts(60, 60.0), bursts(60, 60.0)).failure == "longer than 20 s"


def test_pesq_scores_the_longest_clip_with_the_most_utterances():
    staccato = bursts(50, metrics.PESQ_LONGEST)
    assert metrics.pesq_wb(staccato, staccato).value == pytest.approx(4.644, abs=1e-3)


@pytest.mark.parametrize("name", ["stoi", "estoi"])
@pytest.mark.filterwarnings("error")
def test_stoi_refuses_less_than_30_frames_of_speech(name):
    assert METRICS[name].compute(CLEAN[:100], CLEAN[:100]).failure == "shorter than 0.4 s"
    mostly_silent = CLEAN * (np.arange(CLEAN.size) < 2000)
    assert METRICS[name].compute(CLEAN, mostly_silent).failure == metrics.TOO_LITTLE_SPEECH


def test_selection_keeps_its_order_and_shows_near_names():
    assert metrics.select("si_sdr, pesq_wb") == ("si_sdr", "pesq_wb")
    with pytest.raises(UserError, match=r"unknown metric 'pesq'; did you mean 'pesq_wb', 'pesq_nb'"):
        metrics.select("stoi,pesq")
    with pytest.raises(UserError, match="named twice"):
        metrics.select("stoi,stoi")
    with pytest.raises(UserError, match="no metric"):
        metrics.select([])


def test_scoring_processes_do_not_import_torch():
    code = (
        "import sys, numpy; from mvat_dist import scoring; x = numpy.random.randn(16000);"
        "[scoring.METRICS[name].compute(x, x) for name in scoring.METRICS];"
        "sys.exit(' '.join(name for name in ('torch', 'deepspeed') if name in sys.modules) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr.strip() == ""
    assert ran.returncode == 0
