"""Spectra and their gradients equal torch's own STFT and autograd's word for what is made from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mvat_dist.losses.stft import RESOLUTIONS, Resolution, distance, hann, power, reference, stft

DOUBLE, CPU = torch.float64, torch.device("cpu")
SHAPES = [*RESOLUTIONS, Resolution(512, 128, 512), Resolution(16, 16, 10), Resolution(8, 3, 4)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def torch_powers(signal: Tensor, fft: int, hop: int, window: int) -> Tensor:
    taper = torch.hann_window(window, dtype=DOUBLE)
    spectrum = torch.stft(signal, fft, hop, window, taper, center=True, return_complex=True)
    return spectrum.mT.abs().square()


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(function(at := at.clone().requires_grad_()), at)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("samples", [1201, 2999])
def test_powers_and_their_gradients_are_those_of_torch(shape: Resolution, samples: int) -> None:
    signal = noise(3, samples)
    fft, hop, window = shape

    def powers(x: Tensor) -> Tensor:
        return power(stft(x, fft, hop, hann(window, DOUBLE, CPU)))

    expected = torch_powers(signal, *shape)
    torch.testing.assert_close(powers(signal), expected, rtol=1e-10, atol=1e-14)
    weight = noise(*expected.shape, seed=1)
    torch.testing.assert_close(
        gradient(lambda x: (weight * powers(x)).sum(), signal),
        gradient(lambda x: (weight * torch_powers(x, *shape)).sum(), signal),
        rtol=1e-10,
        atol=1e-14,
    )


def test_the_gradient_of_a_spectrum_heeds_phases() -> None:
    signal, taper = noise(2, 50), hann(8, DOUBLE, CPU)
    found = torch.autograd.gradcheck(lambda x: stft(x, 10, 3, taper), signal.requires_grad_(), atol=1e-8)
    assert found


def test_float32_has_the_gradient_of_float64_however_it_is_laid_out() -> None:
    signal, target = noise(2, 4001), noise(2, 4001, seed=1)
    weight = noise(2, 513, 34, seed=2)
    window = hann(600, torch.float32, CPU)

    def weighted(x: Tensor) -> Tensor:
        """Gradients come in with their axes exchanged, twice into one spectrum."""
        spectrum = stft(x, 1024, 120, window.to(x.dtype))
        return (weight.to(x.dtype) * power(spectrum).mT).sum() + (spectrum * spectrum).real.sum()

    for function in (weighted, lambda x: distance(x, reference(target.to(x.dtype))).sum()):
        exact, found = gradient(function, signal), gradient(function, signal.float())
        assert (found - exact).norm() < 2e-3 * exact.norm()


def test_a_second_derivative_is_refused() -> None:
    estimate = noise(1, 1301).requires_grad_()
    value = distance(estimate, reference(noise(1, 1301, seed=1))).sum()
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(value, estimate, create_graph=True)


def test_silence_has_a_finite_gradient_where_denormal_numbers_are_zero() -> None:
    silence, quiet = torch.zeros(1, 1301), 1e-7 * noise(1, 1301).float()
    assert torch.set_flush_denormal(True)
    try:
        for estimate in (silence, quiet):
            assert gradient(lambda x: distance(x, reference(silence)).sum(), estimate).isfinite().all()
    finally:
        torch.set_flush_denormal(False)


def plain_distance(estimate: Tensor, target: Tensor) -> Tensor:
    """The formula, for autograd to differentiate."""
    total = (estimate - target).abs().mean(-1)
    for resolution in RESOLUTIONS:
        a, b = (torch_powers(one, *resolution).clamp(min=1e-7).sqrt() for one in (estimate, target))
        convergence = torch.linalg.vector_norm(a - b, dim=(1, 2)) / torch.linalg.vector_norm(b, dim=(1, 2))
        total = total + 0.5 * (convergence + (a.log() - b.log()).abs().mean((1, 2))) / 3
    return total


def test_the_distance_and_its_gradient_are_those_of_its_formula() -> None:
    target, estimate = noise(3, 5001), noise(3, 5001, seed=1)
    estimate[1] *= 1e-3  # many of its bins are floored
    estimate[2, 1500:3500] = 0
    given = reference(target)
    torch.testing.assert_close(
        distance(estimate, given), plain_distance(estimate, target), rtol=1e-10, atol=0
    )
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=DOUBLE)
    torch.testing.assert_close(
        gradient(lambda x: (weight * distance(x, given)).sum(), estimate),
        gradient(lambda x: (weight * plain_distance(x, target)).sum(), estimate),
        rtol=1e-7,
        atol=1e-12,
    )


def test_at_the_target_the_gradient_of_the_distance_is_that_of_its_formula() -> None:
    target = noise(1, 3001)
    found = gradient(lambda x: distance(x, reference(target)).sum(), target)
    assert torch.equal(found, gradient(lambda x: plain_distance(x, target).sum(), target))
