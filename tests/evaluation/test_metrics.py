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

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.errors import UserError
from mvat_dist.evaluation.metrics import dnsmos, registry
from mvat_dist.evaluation.metrics.composite import FRAME, HOP, llr, segmental_snr, wss
from mvat_dist.evaluation.metrics.perceptual import PESQ_LONGEST
from mvat_dist.evaluation.metrics.registry import GROUPS, METRICS, Score
from mvat_dist.evaluation.metrics.score import TOO_LITTLE_SPEECH
from mvat_dist.evaluation.metrics.si_sdr import SI_SDR_LIMIT
from tests.signals import bursts, noise_at, syllables

CLEAN = syllables(3.0)
REFERENCED = GROUPS["paper"]
"""The metrics that need nothing but their packages: DNSMOS needs weights."""


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
    assert METRICS["si_sdr"].compute(estimate, CLEAN).value == pytest.approx(snr, abs=1e-6)


def test_si_sdr_counts_an_added_offset_as_distortion():
    tone = np.sin(2 * np.pi * 100 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)  # whole periods: zero mean
    # Power of the tone 1/2, of the offset 1/8: 10 log10(4).
    assert METRICS["si_sdr"].compute(tone + np.sqrt(1 / 8), tone).value == pytest.approx(
        10 * np.log10(4), abs=1e-9
    )


def test_si_sdr_stays_finite_at_both_ends():
    tone = np.sin(2 * np.pi * 100 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    halves = np.arange(tone.size) < tone.size / 2
    assert METRICS["si_sdr"].compute(tone, tone) == Score(SI_SDR_LIMIT)
    assert METRICS["si_sdr"].compute(tone * halves, tone * ~halves) == Score(-SI_SDR_LIMIT)


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("pesq_wb", 4.644), ("pesq_nb", 4.549), ("stoi", 1.0), ("estoi", 1.0), ("si_sdr", 100.0),
        ("segsnr", 35.0), ("csig", 5.0), ("cbak", 5.0), ("covl", 5.0),
    ],
)  # fmt: skip
def test_clean_speech_gets_the_highest_score(name, best):
    assert METRICS[name].compute(CLEAN, CLEAN).value == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("name", REFERENCED)
def test_more_noise_scores_lower(name):
    scores = [
        METRICS[name].compute(CLEAN + noise_at(CLEAN, snr), CLEAN).value for snr in (30, 20, 10)
    ]  # PESQ is at its floor below
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


def test_values_are_those_of_the_packages_with_estimate_and_reference_in_their_places():
    noisy = CLEAN + noise_at(CLEAN, 5)
    assert METRICS["pesq_wb"].compute(noisy, CLEAN).value == pesq.pesq(SAMPLE_RATE, CLEAN, noisy, "wb")
    assert METRICS["pesq_nb"].compute(noisy, CLEAN).value == pesq.pesq(SAMPLE_RATE, CLEAN, noisy, "nb")
    assert METRICS["stoi"].compute(noisy, CLEAN).value == pytest.approx(
        pystoi.stoi(CLEAN, noisy, SAMPLE_RATE)
    )
    assert METRICS["estoi"].compute(noisy, CLEAN).value == pytest.approx(
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
    assert METRICS[name].compute(noise, click).failure == TOO_LITTLE_SPEECH
    # 60 utterances in 60 s end the process that hands them to PESQ.
    assert METRICS[name].compute(bursts(60, 60.0), bursts(60, 60.0)).failure == "longer than 19 s"


def test_pesq_scores_the_longest_clip_with_the_most_utterances():
    frames = np.arange(round(PESQ_LONGEST * SAMPLE_RATE)) // 64
    # 45 frames of 4 ms and 53 of silence: nearly the densest that PESQ's code tells apart, 48 or 49 here.
    staccato = np.where(frames % 98 < 45, bursts(1, 2 * PESQ_LONGEST)[: frames.size], 0).astype(np.float32)
    assert METRICS["pesq_wb"].compute(staccato, staccato).value == pytest.approx(4.644, abs=1e-3)


def test_pesq_never_gets_a_clip_with_room_for_a_51st_utterance():
    """By the constants of its code: MINUTTLENGTH, JOINSPEECHLGTH, SEARCHBUFFER, all in frames of 4 ms."""
    shortest, joined_up_to, searched_around, smeared = 50, 50, 75, 4
    period = shortest - smeared + joined_up_to + 1
    begins = searched_around + 50 * period
    assert begins >= searched_around + PESQ_LONGEST / 0.004 + searched_around


@pytest.mark.parametrize("name", ["stoi", "estoi"])
@pytest.mark.filterwarnings("error")
def test_stoi_refuses_less_than_30_frames_of_speech(name):
    assert METRICS[name].compute(CLEAN[:100], CLEAN[:100]).failure == "shorter than 0.4 s"
    mostly_silent = CLEAN * (np.arange(CLEAN.size) < 2000)
    assert METRICS[name].compute(CLEAN, mostly_silent).failure == TOO_LITTLE_SPEECH


# Segmental SNR, LLR, WSS, PESQ-WB, CSIG, CBAK, COVL as pysepm (github.com/schmiph2/pysepm, commit 7ef88af)
# computes them, with pesq 0.0.4 and in float64. Its authors checked it against Loizou's MATLAB code; on the
# recording in its folder examples/, ours agrees with the MATLAB results in its tests/results.mat.
PYSEPM = {
    "white noise at 5 dB": (-2.0959034, 2.7677367, 34.7453509, 1.0237228, 1.0, 1.7480801, 1.0),
    "white noise at 15 dB": (2.9514754, 2.1780408, 25.2301401, 1.1389134, 1.3114896, 2.1877326, 1.2190574),
    "clipped": (22.7331971, 0.9871308, 8.6489849, 1.2629033, 2.7609322, 3.6093163, 2.0446833),
    "dull": (4.8694197, 1.5428999, 19.0905873, 1.7473125, 2.3871702, 2.6423547, 2.0769878),
    "half as loud": (-1.5512985, 1.5854687, 18.8658625, 1.6973803, 2.3152802, 2.2155549, 2.0165701),
}


@pytest.mark.parametrize("damage", PYSEPM)
def test_composite_measures_are_those_of_an_independent_implementation(damage):
    clean = CLEAN.astype(np.float64)
    dull = np.convolve(clean, [0.5, 0.5])[: clean.size]
    estimate = {
        "white noise at 5 dB": clean + noise_at(clean, 5),
        "white noise at 15 dB": clean + noise_at(clean, 15),
        "clipped": np.clip(clean, -0.05, 0.05),
        "dull": dull + noise_at(clean, 25, seed=2),
        "half as loud": 0.5 * clean + noise_at(clean, 30, seed=3),
    }[damage]
    measures = [
        segmental_snr,
        llr,
        wss,
        *(METRICS[name].compute for name in ("pesq_wb", "csig", "cbak", "covl")),
    ]
    assert [measure(estimate, clean).value for measure in measures] == pytest.approx(PYSEPM[damage], abs=1e-3)


def test_llr_and_wss_of_equal_signals_are_zero_and_levels_do_not_matter_to_them():
    clean, estimate = CLEAN.astype(np.float64), CLEAN + noise_at(CLEAN, 10).astype(np.float64)
    assert llr(clean, clean).value == pytest.approx(0, abs=1e-9)
    assert wss(clean, clean).value == 0
    assert llr(0.25 * estimate, clean).value == pytest.approx(llr(estimate, clean).value, abs=1e-6)
    assert wss(0.25 * estimate, clean).value == pytest.approx(wss(estimate, clean).value, abs=1e-6)


@pytest.mark.parametrize("gain", [1.5, 0.9, -0.5, 20.0])
def test_segmental_snr_of_a_scaled_signal_is_the_same_in_every_frame(gain):
    expected = np.clip(-20 * np.log10(abs(gain - 1)), -10, 35)
    assert segmental_snr(gain * CLEAN, CLEAN).value == pytest.approx(expected, abs=1e-4)


def test_llr_leaves_out_digital_silence_in_the_reference():
    half = np.arange(CLEAN.size) < CLEAN.size // 2
    noisy = CLEAN + noise_at(CLEAN, 10)
    # Frames across the edge count in one and not in the other.
    assert llr(noisy, CLEAN * half).value == pytest.approx(llr(noisy[half], CLEAN[half]).value, abs=0.1)


@pytest.mark.parametrize("name", ["segsnr", "csig", "cbak", "covl"])
def test_measures_on_frames_refuse_less_than_two_frames(name):
    short = CLEAN[4000 : 4000 + FRAME + HOP - 1]
    assert METRICS[name].compute(short, short).value is None
    assert segmental_snr(short, short).failure == "shorter than 0.0375 s"


def test_a_composite_without_a_pesq_fails_for_its_reason():
    assert METRICS["covl"].compute(bursts(60, 60.0), bursts(60, 60.0)) == Score(None, "longer than 19 s")


def test_a_changed_signal_is_scored_anew():
    estimate = CLEAN.copy()
    assert METRICS["segsnr"].compute(estimate, CLEAN).value == 35
    estimate *= 2
    assert METRICS["segsnr"].compute(estimate, CLEAN).value == pytest.approx(0, abs=1e-4)


def test_dnsmos_hears_every_whole_second_of_windows_of_9_s(monkeypatch, tmp_path):
    windows = []

    class Session:
        """Gives each window its first sample, its middle one and its last one as raw opinions."""

        def get_inputs(self):
            return [type("Input", (), {"name": "audio"})]

        def run(self, _outputs, inputs):
            (window,) = inputs["audio"]
            windows.append(window.size)
            return [[[window[0], window[window.size // 2], window[-1]]]]

    monkeypatch.setattr(dnsmos, "_session", lambda _weights: Session())
    monkeypatch.setenv(dnsmos.WEIGHTS_VARIABLE, str(tmp_path / "sig_bak_ovr.onnx"))
    ramp = np.linspace(1, 4, 12 * SAMPLE_RATE + 100)
    sig = METRICS["dnsmos_sig"].compute(ramp, ramp).value
    raw = ramp[[0, SAMPLE_RATE, 2 * SAMPLE_RATE]]
    assert sig == pytest.approx(np.mean(-0.08397278 * raw**2 + 1.22083953 * raw + 0.0052439), abs=1e-6)
    METRICS["dnsmos_ovrl"].compute(ramp, ramp)
    assert windows == [144160] * 3  # once for all three opinions
    short = ramp[: 2 * SAMPLE_RATE]
    METRICS["dnsmos_bak"].compute(short, short)
    assert windows == [144160] * (3 + 7)  # 2 s are repeated to 16 s


# What speechmos 0.0.1.1 says of these signals: sig, bak, ovrl.
SPEECHMOS = {3.0: (1.186738, 1.031062, 1.090285), 12.3: (2.012192, 1.321111, 1.355441)}


@pytest.mark.parametrize("seconds", SPEECHMOS)
def test_dnsmos_is_that_of_its_authors_package(seconds):
    weights = dnsmos.weights_file()
    if weights is None:
        pytest.skip(
            "no DNSMOS weights: pip install 'mvat_dist[dnsmos]', or set MVAT_DNSMOS to sig_bak_ovr.onnx"
        )
    clean = syllables(seconds)
    noisy = (clean + noise_at(clean, 5)).astype(np.float32)
    found = [METRICS[name].compute(noisy, clean).value for name in GROUPS["dnsmos"]]
    assert found == pytest.approx(SPEECHMOS[seconds], abs=1e-3)


def test_missing_dnsmos_is_said_before_anything_is_scored(monkeypatch, tmp_path):
    monkeypatch.setenv(dnsmos.WEIGHTS_VARIABLE, str(tmp_path / "none.onnx"))
    with pytest.raises(UserError, match=r"none.onnx: no such file"):
        registry.select("stoi,dnsmos")
    (tmp_path / "none.onnx").write_text("text")
    with pytest.raises(UserError, match="no ONNX network"):
        registry.select("dnsmos_ovrl")
    monkeypatch.setattr(dnsmos, "weights_file", lambda: None)
    with pytest.raises(UserError, match=r"dnsmos is not installed.*pip install"):
        registry.select("dnsmos")


def test_groups_stand_for_their_members():
    assert registry.select("stoi,composite") == ("stoi", "csig", "cbak", "covl")
    with pytest.raises(UserError, match="named twice"):
        registry.select("paper,stoi")


def test_selection_keeps_its_order_and_shows_near_names():
    assert registry.select("si_sdr, pesq_wb") == ("si_sdr", "pesq_wb")
    with pytest.raises(UserError, match=r"unknown metric 'pesq'; did you mean 'pesq_wb', 'pesq_nb'"):
        registry.select("stoi,pesq")
    with pytest.raises(UserError, match="named twice"):
        registry.select("stoi,stoi")
    with pytest.raises(UserError, match="no metric"):
        registry.select([])


def test_scoring_processes_do_not_import_torch():
    code = (
        "import sys, numpy; import mvat_dist.data.pool; from mvat_dist.evaluation import scorer;"
        "x = numpy.random.randn(16000);"
        "[m.compute(x, x) for name, m in scorer.METRICS.items() if not name.startswith('dnsmos')];"
        "sys.exit(' '.join(name for name in ('torch', 'deepspeed') if name in sys.modules) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr.strip() == ""
    assert ran.returncode == 0
