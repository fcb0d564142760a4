"""The losses that weigh what is heard: formulas by numpy, closed forms, and PESQ itself by its package."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pesq
import pytest
import torch
from scipy.signal import lfilter
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import interpolate

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.losses import CompressedLoss, PesqLoss
from mvat_dist.losses.pesq import loudness
from mvat_dist.models.logmmse import LogMmse
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
    for noisy, clean, given in ((silence, silence, silence), (loud, silence, silence), (loud, loud, silence)):
        estimate = given.clone().requires_grad_()
        value = loss(estimate, loss.prepare(noisy, clean))
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value, estimate)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_estimate_of_another_shape_is_refused(loss: CompressedLoss | PesqLoss) -> None:
    targets = loss.prepare(noise(2, SAMPLES), noise(2, SAMPLES))
    for other in (noise(1, SAMPLES), noise(2, SAMPLES - 1)):
        with pytest.raises(ValueError, match="differ in shape"):
            loss(other, targets)
    with pytest.raises(ValueError, match="differ in shape"):
        loss.prepare(noise(2, SAMPLES), noise(1, SAMPLES))


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


def test_a_tone_of_1_khz_and_40_db_has_one_sone() -> None:
    """What a sone is; ten times the intensity is about twice as loud (Stevens's rule, 3.01 dB / 10 dB)."""
    intensity = torch.zeros(40, 1, dtype=torch.float64)
    band = 15  # 8.0 to 8.5 Bark, by Traunmüller's formula 914 to 1003 Hz
    assert loudness(intensity).abs().max().item() == 0
    found = []
    for db in (40.0, 70.0, 80.0):
        intensity[band] = 10 ** (db / 10)
        found.append(0.5 * loudness(intensity).sum().item())
    assert found[0] == pytest.approx(1.0, rel=0.1)
    assert found[2] / found[1] == pytest.approx(10**0.23, rel=0.02)


def test_the_pesq_loss_heeds_neither_level_nor_a_smooth_filter() -> None:
    """As the measure: it aligns levels and evens out mean spectra. The noise itself costs far more."""
    clean = torch.from_numpy(syllables(2.0)).double()[None]
    noisy = clean + torch.from_numpy(noise_at(clean[0].numpy(), 5.0)).double()
    loss = PesqLoss()
    targets = loss.prepare(noisy, clean)
    value = loss(noisy, targets).item()
    assert loss(3.7 * noisy, targets).item() == pytest.approx(value, rel=1e-9)
    assert loss(0.5 * clean, targets).item() == pytest.approx(0, abs=1e-6)
    filtered = torch.from_numpy(lfilter([1.0, 0.5], [1.0], clean.numpy()))
    assert loss(filtered, targets).item() < 0.1 * value


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
