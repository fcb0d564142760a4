"""What makes the network fast changes nothing: long inputs in tiles, compiled, folded, synchronised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mvat_dist.config.sizes import Size
from mvat_dist.models.cpu_kernels import TILE, UpConv1d, banded, norm_together
from mvat_dist.models.fold import folded
from mvat_dist.models.manner import build
from tests import oracle
from tests.models.test_models import noise, relative_error, tiny

LONG = Size("base", 7, depth=2, chunk=64)  # frames at full rate are more than a tile, and no multiple of it


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("samples", [203, TILE + 1001])
def test_gradients_equal_those_of_the_description(training: bool, samples: int) -> None:
    model = tiny(LONG).train(training)
    state = {
        key: value.clone().requires_grad_(value.is_floating_point())
        for key, value in model.state_dict().items()
    }
    noisy, again = (noise(2, samples, dtype=torch.float64).requires_grad_() for _ in range(2))

    outputs = model(noisy, return_views=True)
    expected = oracle.manner(oracle.Oracle(state, training, LONG.chunk), again)
    for estimate, views in (outputs, expected):
        total = sum(view.square().mean() for view in views.values())
        (total + (noise(*estimate.shape, dtype=torch.float64) * estimate).sum()).backward()

    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(noisy.grad, again.grad, rtol=1e-9, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(("taps", "length"), [(31, 64), (31, 4), (7, 8), (7, 94)])
def test_a_product_with_bands_is_a_convolution(taps: int, length: int) -> None:
    x, kernels = noise(3, 5, length, dtype=torch.float64), noise(3, taps, dtype=torch.float64)
    wanted = torch.stack(
        [
            nn.functional.conv1d(c[:, None], k[None, None], padding=taps // 2)[:, 0]
            for c, k in zip(x, kernels, strict=True)
        ]
    )
    torch.testing.assert_close(x @ banded(kernels, length), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (7, 3), (5, 2), (4, 4), (3, 4)])
@pytest.mark.parametrize("frames", [1, 2, 37])
def test_a_transposed_convolution_as_a_product(kernel: int, stride: int, frames: int) -> None:
    up, x = UpConv1d(5, kernel, stride).double(), noise(3, 5, frames, dtype=torch.float64)
    wanted = nn.functional.conv_transpose1d(x, up.weight, up.bias, stride)
    torch.testing.assert_close(up(x), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "size", [LONG, Size("small", 6, depth=3, chunk=10), Size("base", 9, depth=1, chunk=6, heads=3)], ids=str
)
@torch.no_grad()
def test_the_inference_form_is_the_same_function(size: Size) -> None:
    model = tiny(size).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    noisy = noise(2, 703, dtype=torch.float64)
    form = folded(model)
    output, views = form(noisy, return_views=True)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in form.modules())
    assert not form.training
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    expected, expected_views = model.eval()(noisy, return_views=True)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-14)
    for key, view in views.items():
        torch.testing.assert_close(view, expected_views[key], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_compiled_network_is_the_same_function(training: bool) -> None:
    model = tiny(Size("base", 6, depth=1, chunk=8)).train(training)
    twin = copy.deepcopy(model)
    noisy = noise(2, 203, dtype=torch.float64)
    output, expected = torch.compile(twin, backend="aot_eager")(noisy), model(noisy)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, value), other_value in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other_value, value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_synchronised_normalisation_is_the_same_function(training: bool) -> None:
    model = tiny().train(training)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    noisy = noise(2, 203, dtype=torch.float64)
    torch.testing.assert_close(synchronised(noisy), model(noisy), rtol=1e-9, atol=1e-12)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(synchronised.state_dict()[key], value, rtol=1e-9, atol=1e-12)


def test_statistics_far_from_zero_are_exact_in_float32() -> None:
    """A channel's mean may be a thousand times its deviation: no difference of two large sums is taken."""
    norm = build(Size("small", 6, depth=1)).manner_block.in_conv[1].train()
    x: Tensor = 1000 + torch.randn(2, 6, 40_000, generator=torch.Generator().manual_seed(0))
    wanted = x.double() - x.double().mean((0, 2), keepdim=True)
    wanted = wanted / wanted.square().mean((0, 2), keepdim=True).add(norm.eps).sqrt()
    with torch.no_grad():
        assert relative_error(norm_together(x, norm).double(), wanted) < 1e-4
