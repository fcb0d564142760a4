"""The losses that weigh what is heard: formulas by numpy, closed forms, and PESQ itself by its package."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pesq
import pytest
import torch
from scipy.signal import lfilter
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import interpolate

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.losses import pesq as pesq_losses
from mvat_dist.losses.enhancement import CompressedLoss
from mvat_dist.losses.pesq import PesqLoss, loudness
from mvat_dist.models.log_mmse import LogMmse
from tests.signals import noise_at, syllables

SAMPLES = 5001
Array = npt.NDArray[np.float64]
LOSSES = [CompressedLoss(), PesqLoss()]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_vanishes_at_the_target_and_grows_with_noise(loss: CompressedLoss | PesqLoss) -> None:
    noisy, clean = noise(2, SAMPLES, seed=1), noise(2, SAMPLES, seed=2)
    targets = loss.prepare(noisy, clean)
    values = [loss(clean + level * noisy, targets).item() for level in (0.0, 0.1, 0.3, 1.0)]
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert values[1] > 1e-5
    assert values == sorted(values)


@pytest.mark.parametrize("loss", LOSSES)
def test_silence_has_finite_loss_and_gradient(loss: CompressedLoss | PesqLoss) -> None:
    silence, loud = torch.zeros(2, SAMPLES), noise(2, SAMPLES).float()
    cases = (
        (silence, silence, silence),
        (loud, silence, silence),
        (loud, loud, silence),
        (loud, silence, loud),
    )
    for noisy, clean, given in cases:
        estimate = given.clone().requires_grad_()
        value = loss(estimate, loss.prepare(noisy, clean))
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value, estimate)
        assert gradient.isfinite().all()
        if isinstance(loss, PesqLoss) and clean is silence:
            assert value == 0
            assert not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_estimate_of_another_shape_is_refused(loss: CompressedLoss | PesqLoss) -> None:
    targets = loss.prepare(noise(2, SAMPLES), noise(2, SAMPLES))
    for other in (noise(1, SAMPLES), noise(2, SAMPLES - 1)):
        with pytest.raises(ValueError, match="differ in shape"):
            loss(other, targets)
    with pytest.raises(ValueError, match="differ in shape"):
        loss.prepare(noise(2, SAMPLES), noise(1, SAMPLES))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_too_short_to_be_reflected_is_refused(loss: CompressedLoss | PesqLoss) -> None:
    assert loss.prepare(noise(2, 257), noise(2, 257)).shape == (2, 257)
    for shape in ((2, 256), (2, 1, 257)):
        with pytest.raises(ValueError, match=r"must be \(B, T\) with T of more than 256 samples"):
            loss.prepare(noise(*shape), noise(*shape))


@pytest.mark.parametrize("loss", LOSSES)
def test_precision_and_graphs_are_those_of_float32(loss: CompressedLoss | PesqLoss) -> None:
    """Whatever autocast says, also of halves, and first asked in inference mode; targets are constant."""
    noisy, clean, estimate = (noise(2, SAMPLES, seed=seed).float() for seed in range(3))
    pesq_losses._bands.cache_clear()
    with torch.inference_mode():
        expected = loss(estimate, loss.prepare(noisy, clean)).item()
    with torch.autocast("cpu", torch.bfloat16):
        given = [one.clone().requires_grad_() for one in (noisy, clean, estimate)]
        value = loss(given[2], loss.prepare(*given[:2]))
        half = loss(estimate.bfloat16(), loss.prepare(noisy.bfloat16(), clean.bfloat16()))
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert [one.grad is None for one in given] == [True, True, False]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_formula(loss: CompressedLoss | PesqLoss) -> None:
    noisy, clean = noise(2, SAMPLES, seed=1), noise(2, SAMPLES, seed=2)
    estimate, direction = (clean + 0.3 * noisy).requires_grad_(), noise(2, SAMPLES, seed=4)
    targets = loss.prepare(noisy, clean)
    (gradient,) = torch.autograd.grad(loss(estimate, targets), estimate)
    with torch.no_grad():
        ahead, behind = (loss(estimate + step * direction, targets) for step in (1e-7, -1e-7))
    assert (gradient * direction).sum().item() == pytest.approx(((ahead - behind) / 2e-7).item(), rel=1e-4)


def test_the_compressed_loss_is_its_formula_at_any_level() -> None:
    clean, estimate = noise(3, SAMPLES, seed=1), noise(3, SAMPLES, seed=3)
    clean[2] = 0
    noisy = clean + noise(3, SAMPLES, seed=2)

    def compressed(signal: Array, level: float) -> tuple[Array, Array]:
        """Magnitudes (frames, F), and the spectrum with its phase."""
        padded = np.pad(signal / level, 256, mode="reflect")
        window = np.hanning(513)[:512]
        frames = [padded[at : at + 512] * window for at in range(0, len(signal) + 1, 128)]
        spectrum = np.fft.rfft(frames) / np.sqrt(np.sum(window**2))
        floored = np.sqrt(np.abs(spectrum) ** 2 + 1e-6)
        return floored**0.3, floored**0.3 * spectrum / floored

    expected = []
    for one, other, both in zip(estimate.numpy(), clean.numpy(), noisy.numpy(), strict=True):
        found, wanted = (compressed(signal, np.sqrt(np.mean(both**2))) for signal in (one, other))
        sizes, phases = (np.mean(np.abs(a - b) ** 2) for a, b in zip(found, wanted, strict=True))
        expected.append(0.7 * sizes + 0.3 * phases)
    loss = CompressedLoss()
    value = loss(estimate, loss.prepare(noisy, clean)).item()
    assert value == pytest.approx(np.mean(expected), rel=1e-10)
    for factor in (0.01, 30.0):
        again = loss(factor * estimate, loss.prepare(factor * noisy, factor * clean))
        assert again.item() == pytest.approx(value, rel=1e-12)


def root(value: float, order: int) -> float:
    return float((value + 1e-6) ** (1 / order) - 1e-6 ** (1 / order))


def loudness_at(power: float, threshold: float) -> float:
    """Zwicker's, where a tone of 1 kHz and 40 dB has 1 sone in half a Bark."""

    def formula(intensity: float, quiet: float) -> float:
        return float((2 * quiet) ** 0.23 * (max(0.5 + 0.5 * intensity / quiet, 1) ** 0.23 - 1))

    of_one_khz = 3.64 - 6.5 * np.exp(-0.6 * 2.3**2) + 1e-3
    return formula(power, threshold) / (0.5 * formula(1e4, 10 ** (of_one_khz / 10)))


def bands_of(signal: Array) -> tuple[Array, list[float]]:
    """Intensities (frames, 40) of half Barks from 0.5 on, and their hearing thresholds."""
    signal = signal / np.sqrt(np.mean(signal**2))
    padded, window = np.pad(signal, 256, mode="reflect"), np.hanning(513)[:512]
    frames = [padded[at : at + 512] * window for at in range(0, len(signal) + 1, 256)]
    power = np.abs(np.fft.rfft(frames)) ** 2 / (256 * np.sum(window**2))
    edges = [1960 * (bark + 0.53) / (26.28 - bark) for bark in np.arange(0.5, 20.6, 0.5)]
    found = np.zeros((len(frames), 40))
    for band, (low, high) in enumerate(itertools.pairwise(edges)):
        for at in range(257):
            overlap = min(high, 31.25 * (at + 0.5)) - max(low, 31.25 * (at - 0.5))
            found[:, band] += power[:, at] * max(overlap, 0) / 31.25
    middles = [(low + high) / 2000 for low, high in itertools.pairwise(edges)]
    decibels = [3.64 * f**-0.8 - 6.5 * np.exp(-0.6 * (f - 3.3) ** 2) + 1e-3 * f**4 for f in middles]
    return 10**7.9 * found, [10 ** (one / 10) for one in decibels]


def pesq_loss_by_loops(estimate: Array, clean: Array) -> float:
    (heard, quiet), (reference, _) = bands_of(estimate), bands_of(clean)
    active = reference.sum(1) > 1e4
    tilt = (heard[active].mean(0) + 1e3) / (reference[active].mean(0) + 1e3)
    reference = reference * np.clip(tilt, 0.01, 100)
    gains = [
        (x[x > quiet].sum() + 5e3, y[y > quiet].sum() + 5e3) for x, y in zip(reference, heard, strict=True)
    ]
    plain = [one / other for one, other in gains]
    disturbed, added = [], []
    for at, (wanted, found) in enumerate(zip(reference, heard, strict=True)):
        louder = found * np.clip(0.8 * plain[at] + 0.2 * plain[max(at - 1, 0)], 3e-4, 5)
        errors, more = [], []
        for x, y, threshold in zip(wanted, louder, quiet, strict=True):
            a, b = loudness_at(x, threshold), loudness_at(y, threshold)
            errors.append(max(abs(a - b) - 0.25 * min(a, b), 0))
            ratio = ((y + 10**2.6) / (x + 10**2.6)) ** 1.2
            more.append(errors[-1] * (0 if ratio < 3 else min(ratio, 12)))
        disturbed.append(20 * root(float(np.mean(np.square(errors))), 2))
        added.append(20 * float(np.mean(more)))

    def over_time(values: list[float]) -> float:
        values = [min(one, 45) + 0.05 * max(one - 45, 0) for one in values]
        syllables = [values[start : start + 20] for start in range(0, len(values), 10)]
        norms = [root(sum(one**6 for one in syllable) / 20, 6) for syllable in syllables]
        return root(float(np.mean(np.square(norms))), 2)

    return 0.1 * over_time(disturbed) + 0.0309 * over_time(added)


@pytest.mark.parametrize(
    "samples", [SAMPLES, 9000, 2500]
)  # syllables: one and a half, with a rest, half of one
@pytest.mark.parametrize("kind", ["noise", "uneven", "speech"])
def test_the_pesq_loss_is_its_formula(samples: int, kind: str) -> None:
    if kind != "speech":
        clean, estimate = noise(2, samples, seed=1), noise(2, samples, seed=3)
        if kind == "uneven":  # frames' gains beyond both of their limits
            clean[:, : samples // 2] *= 1e-3
            estimate[:, samples // 2 :] *= 1e-3
    else:
        clean = torch.from_numpy(np.stack([syllables(0.6, seed=one)[:samples] for one in range(2)])).double()
        estimate = 0.3 * clean + 0.01 * noise(2, clean.shape[-1], seed=3)
    expected = [pesq_loss_by_loops(a.numpy(), b.numpy()) for a, b in zip(estimate, clean, strict=True)]
    loss = PesqLoss()
    assert loss(estimate, loss.prepare(clean, clean)).item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_the_loudness_of_tones() -> None:
    """A tone of 1 kHz and 40 dB has 1 sone; ten times the intensity is 10^0.23 times as loud; too soft a one
    has none.
    """
    intensity = torch.zeros(40, 1, dtype=torch.float64)

    def sones(band: int, db: float) -> float:
        intensity.zero_()
        intensity[band] = 10 ** (db / 10)
        return 0.5 * loudness(intensity).sum().item()

    # 78 to 137 Hz: threshold about 21 dB; 914 to 1003 Hz: 3; 3.2 to 3.5 kHz: -5
    assert sones(15, 40.0) == pytest.approx(1.0, rel=0.1)
    assert sones(15, 80.0) / sones(15, 70.0) == pytest.approx(10**0.23, rel=0.02)
    assert (sones(0, 18.0), sones(15, 2.0), sones(31, -7.0)) == (0, 0, 0)
    assert min(sones(0, 25.0), sones(15, 6.0), sones(31, -2.0)) > 0


@pytest.mark.parametrize(("snr", "counts"), [(-19.0, True), (-21.0, False)])
def test_what_drowns_in_noise_is_no_speech(snr: float, counts: bool) -> None:
    clean = noise(2, 16000, seed=1)
    noisy = clean.clone()
    noisy[0] += 10 ** (-snr / 20) * noise(16000, seed=2)
    loss = PesqLoss()
    both = loss(noisy, loss.prepare(noisy, clean)).item()  # the second is right, and has a share in the mean
    alone = loss(noisy[:1], loss.prepare(clean[:1], clean[:1])).item()
    assert both == pytest.approx(0.5 * alone if counts else 0.0, abs=1e-9)
    assert alone > 1


@pytest.mark.parametrize("gain", [3.7, 0.3, 0.003, 1e-3])
def test_the_pesq_loss_does_not_heed_the_level(gain: float) -> None:
    """As the measure, which aligns levels; so nothing is won by muting."""
    clean = torch.from_numpy(syllables(2.0)).double()[None]
    noisy = clean + torch.from_numpy(noise_at(clean[0].numpy(), 5.0)).double()
    loss = PesqLoss()
    targets = loss.prepare(noisy, clean)
    assert loss(gain * noisy, targets).item() == pytest.approx(loss(noisy, targets).item(), rel=1e-9)
    assert loss(gain * clean, targets).item() == pytest.approx(0, abs=1e-6)


def test_the_pesq_loss_does_not_heed_a_smooth_filter() -> None:
    """As the measure, which evens out mean spectra. The noise itself costs far more."""
    clean = torch.from_numpy(syllables(2.0)).double()[None]
    noisy = clean + torch.from_numpy(noise_at(clean[0].numpy(), 5.0)).double()
    loss = PesqLoss()
    targets = loss.prepare(noisy, clean)
    filtered = torch.from_numpy(lfilter([1.0, 0.5], [1.0], clean.numpy()))
    assert loss(filtered, targets).item() < 0.1 * loss(noisy, targets).item()


def test_an_error_at_the_very_end_is_heard() -> None:
    clean = noise(1, 32000, seed=1)
    estimate = clean.clone()
    estimate[:, -1600:] += noise(1, 1600, seed=2)
    loss = PesqLoss()
    assert loss(estimate, loss.prepare(clean, clean)).item() > 0.1


def degraded(clean: npt.NDArray[np.float32], seed: int) -> list[npt.NDArray[np.float32]]:
    """The clean signal with white and coloured noise, enhanced by log-MMSE, clipped, low-passed."""
    made = []
    for snr in (0.0, 8.0, 16.0, 24.0):
        white = noise_at(clean, snr, seed)
        coloured = lfilter([1.0], [1.0, -0.95], white).astype(np.float32)
        coloured *= np.linalg.norm(white) / np.linalg.norm(coloured)
        made += [clean + white, clean + coloured]
        made.append(LogMmse()(torch.from_numpy(made[-1])[None])[0].numpy())
    made.append(np.clip(clean, -0.1, 0.1))
    made.append(lfilter([0.25] * 4, [1.0], clean).astype(np.float32))
    return made


def test_the_pesq_loss_ranks_sounds_as_pesq_does() -> None:
    loss, scores, values = PesqLoss(), [], []
    for seed in range(2):
        clean = syllables(4.0, per_second=2.0 + seed, seed=seed)
        for sound in degraded(clean, seed):
            reference, estimate = torch.from_numpy(clean)[None], torch.from_numpy(sound)[None]
            scores.append(pesq.pesq(SAMPLE_RATE, clean, sound, "wb"))
            values.append(loss(estimate, loss.prepare(estimate, reference)).item())
    assert spearmanr(scores, values).statistic < -0.85


def test_following_its_gradient_raises_pesq() -> None:
    """Smooth gains of time and frequency that lower the loss make a better sound by the measure itself."""
    clean = syllables(3.0)
    noisy = clean + noise_at(clean, 20.0)
    reference, given = torch.from_numpy(clean)[None], torch.from_numpy(noisy)[None]
    loss, window = PesqLoss(), torch.hann_window(512)
    targets = loss.prepare(given, reference)
    spectrum = torch.stft(given, 512, 128, window=window, return_complex=True)
    weights = torch.full((1, 1, 33, spectrum.shape[-1] // 6), 2.0, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=0.2)

    def enhanced() -> Tensor:
        gains = interpolate(weights, spectrum.shape[1:], mode="bilinear")[0].sigmoid()
        return torch.istft(spectrum * gains, 512, 128, window=window, length=given.shape[-1])

    for _ in range(60):
        optimiser.zero_grad()
        loss(enhanced(), targets).backward()
        optimiser.step()
    found = enhanced()[0].detach().numpy()
    before, after = (pesq.pesq(SAMPLE_RATE, clean, one, "wb") for one in (noisy, found))
    assert after > before + 0.8
