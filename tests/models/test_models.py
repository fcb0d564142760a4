"""The network equals the authors' and a literal second implementation, whatever the size and length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from mvat_dist.config.sizes import SIZES, VIEWS, Kind, Size
from mvat_dist.errors import UserError
from mvat_dist.models.attention import MultiViewBlock
from mvat_dist.models.manner import Manner, build
from mvat_dist.models.pretrained import load_manner_checkpoint
from tests import oracle
from tests.conftest import Reference

REFERENCES = ("base_h12", "base_h15_seg32_odd", "small_h30_d3")
TINY = Size("base", 7, depth=2, chunk=8)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible noise at speech level."""
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seasoned(module: nn.Module) -> nn.Module:
    """The module in float64, parameters and running statistics off their defaults as after training."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.double().state_dict().items():
        draw = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            value.copy_(1 + 0.3 * draw.abs())
        elif value.is_floating_point():
            value.add_(0.1 * draw)
    return module


def tiny(size: Size = TINY) -> Manner:
    torch.manual_seed(0)
    model = seasoned(build(size)).eval()
    assert isinstance(model, Manner)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over that of the expectation."""
    return ((actual - expected).norm() / expected.norm()).item()


# --- against the authors' network ---


@pytest.mark.parametrize("name", REFERENCES)
@torch.no_grad()
def test_matches_the_reference_vectors(name: str, reference: Callable[[str], Reference]) -> None:
    vectors = reference(name)
    model = load_manner_checkpoint(vectors.weights)
    assert sum(p.numel() for p in model.parameters()) == vectors.description["parameters"]

    output, views = model.double()(vectors.noisy.double(), return_views=True)
    assert relative_error(output, vectors.output) < 1e-8
    assert list(views) == list(vectors.energies)
    for key, expected in vectors.energies.items():
        assert relative_error(views[key].square().sum(1), expected) < 1e-8

    tolerance = max(1e-5, 3 * vectors.description["float32_relative_error_of_reference"])
    assert relative_error(model.float()(vectors.noisy).double(), vectors.output) < tolerance
    one_item = model.double()(vectors.noisy[1:].double())
    assert relative_error(one_item, vectors.output[1:]) < 1e-8


@pytest.mark.parametrize("name", REFERENCES)
def test_speaks_the_authors_key_layout(name: str, reference: Callable[[str], Reference]) -> None:
    vectors = reference(name)
    config = vectors.description["config"]
    size = Size(vectors.description["architecture"], config["hidden"], config["depth"], config["segment_len"])
    assert load_manner_checkpoint(vectors.weights).size == size
    shapes = {key: list(value.shape) for key, value in build(size).state_dict().items()}
    assert shapes == vectors.description["state_dict"]


# --- against the literal implementation ---


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("channels", "chunk", "frames"), [(6, 4, 1), (7, 8, 3), (13, 8, 16), (20, 16, 95), (12, 94, 200)]
)
def test_multi_view_block_equals_its_description(
    channels: int, chunk: int, frames: int, training: bool
) -> None:
    block = seasoned(MultiViewBlock(channels, chunk, heads=1)).train(training)
    state = {
        key: value.clone().requires_grad_(value.is_floating_point())
        for key, value in block.state_dict().items()
    }
    x, x_again = (noise(3, channels, frames, dtype=torch.float64).requires_grad_() for _ in range(2))

    output, features = block(x)
    expected, expected_features = oracle.multi_view(oracle.Oracle(state, training, chunk), x_again)

    for actual, wanted in zip([output, *features], [expected, *expected_features], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    # A sum of squares with fixed weights: every output and every feature has its own gradient.
    for parts in ((output, *features), (expected, *expected_features)):
        sum((noise(*part.shape, dtype=torch.float64) * part**2).sum() for part in parts).backward()
    torch.testing.assert_close(x.grad, x_again.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "size",
    [
        TINY,
        Size("small", 6, depth=3, chunk=10),
        Size("base", 9, depth=1, chunk=6),
        Size("base", 6, depth=2, chunk=8, kernel_size=5, stride=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_network_equals_its_description(size: Size, training: bool) -> None:
    model = tiny(size).train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    noisy = noise(2, 203, dtype=torch.float64)
    with torch.no_grad():
        output, views = model(noisy, return_views=True)
        expected, expected_views = oracle.manner(
            oracle.Oracle(state, training, size.chunk, size.stride), noisy
        )
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert list(views) == list(expected_views)
    for key, feature in views.items():
        torch.testing.assert_close(feature, expected_views[key], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_full_size_teacher_equals_its_description() -> None:
    model = build("manner-b").eval()
    noisy = noise(1, 2001)
    expected, _ = oracle.manner(oracle.Oracle(model.state_dict(), False, 64), noisy)
    assert relative_error(model(noisy), expected) < 1e-5


# --- any input ---

LENGTHS_MODEL = tiny()


@examples(max_examples=25)
@given(samples=st.integers(1, 3000), batch=st.integers(1, 3))
@example(samples=1, batch=1)
@example(samples=2, batch=1)
@torch.no_grad()
def test_any_length_and_every_item_on_its_own(samples: int, batch: int) -> None:
    noisy = noise(batch, samples, dtype=torch.float64)
    output, views = LENGTHS_MODEL(noisy, return_views=True)
    assert output.shape == noisy.shape
    assert output.isfinite().all()
    frames = TINY.frames(samples)
    assert {key: feature.shape[-1] for key, feature in views.items()} == {
        (side, level, view): frames[level if side == "encoder" else level - 1]
        for side, levels in (("encoder", (1, 2)), ("decoder", (2, 1)))
        for level in levels
        for view in VIEWS
    }
    alone = torch.cat([LENGTHS_MODEL(item[None]) for item in noisy])
    torch.testing.assert_close(output, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.5], ids=["silence", "constant"])
@torch.no_grad()
def test_input_without_deviation_gives_silence(level: float) -> None:
    output, views = tiny()(torch.full((1, 500), level, dtype=torch.float64), return_views=True)
    assert output.abs().max() < 1e-12
    assert all(feature.isfinite().all() for feature in views.values())


def test_silence_and_single_samples_have_finite_gradients() -> None:
    model = tiny()
    for noisy in (torch.zeros(1, 500).double(), noise(1, 1, dtype=torch.float64)):
        noisy.requires_grad_()
        model(noisy).sum().backward()
        assert noisy.grad is not None
        assert noisy.grad.isfinite().all()


@torch.no_grad()
def test_nothing_is_remembered_between_calls() -> None:
    model = tiny()
    short, long = noise(2, 300, dtype=torch.float64), noise(1, 901, dtype=torch.float64)
    first = model(short)
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    model(long)
    assert torch.equal(model(short), first)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("shape", [(100,), (1, 1, 100), (1, 0)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, T\).*" + str(shape).replace("(", r"\(").replace(")", r"\)")):
        tiny()(torch.zeros(shape))


# --- training ---


@pytest.mark.parametrize("kind", ["base", "small"])
def test_every_parameter_learns(kind: Kind) -> None:
    model = tiny(Size(kind, 24, depth=2, chunk=8))  # wide enough that no layer's ReLUs are all off
    estimate, views = model(noise(2, 400, dtype=torch.float64), return_views=True)
    estimate.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(feature.requires_grad for feature in views.values())


def test_runs_under_autocast() -> None:
    model = build(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        estimate, views = model(noise(2, 400), return_views=True)
    assert estimate.dtype == torch.float32
    estimate.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(feature.isfinite().all() for feature in views.values())


def test_convolutions_start_rescaled_and_linear_layers_do_not() -> None:
    # torch draws weights of deviation (3 * fan_in)**-0.5; dividing by sqrt(deviation / 0.1) leaves the
    # geometric mean of that and 0.1.
    for name, module in build("manner-s-5.3gf").named_modules():
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear) or module.weight.numel() < 2000:
            continue
        default = (3 * module.weight[0].numel()) ** -0.5
        expected = default if isinstance(module, nn.Linear) else (0.1 * default) ** 0.5
        assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
        if module.bias is not None:
            bound = 3**0.5 * default * expected / default
            assert 0.5 * bound < module.bias.abs().max().item() <= 1.1 * bound, name


def test_batch_normalisation_forgets_at_the_described_rates() -> None:
    # 0.01 in the pairs of convolution and BatchNorm (their key is "bn"), torch's 0.1 in plain sequences.
    model = tiny().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    noisy = noise(2, 203, dtype=torch.float64)
    seen: dict[str, tuple[Tensor, Tensor, int]] = {}
    with torch.no_grad():
        model(noisy)
        oracle.manner(oracle.Oracle(before, True, TINY.chunk, batch=seen), noisy)
    assert len(seen) == sum(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    for prefix, (mean, variance, count) in seen.items():
        rate = 0.01 if prefix.endswith(".bn.") else 0.1
        for name, value in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
            expected = (1 - rate) * before[prefix + name] + rate * value
            torch.testing.assert_close(model.state_dict()[prefix + name], expected, rtol=1e-9, atol=1e-12)
        assert model.state_dict()[f"{prefix}num_batches_tracked"] == 1


def test_building_is_reproducible_and_loading_draws_no_random_number() -> None:
    torch.manual_seed(5)
    first = build(TINY)
    torch.manual_seed(5)
    loaded = load_manner_checkpoint(first.state_dict())
    second = build(TINY)
    for (name, a), b, c in zip(
        first.state_dict().items(), second.state_dict().values(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name


def test_unknown_name_shows_the_nearest() -> None:
    with pytest.raises(UserError, match=r"manner-s-5\.3gf"):
        build("manner-s-5gf")


def test_every_name_can_be_built_and_recognised() -> None:
    for name, size in SIZES.items():
        if name == "manner-l":
            continue  # 95 M parameters: the recognition reads nothing that manner-b lacks
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in build(name).state_dict().items()}
        state = {key: torch.ones(()).expand(shape) for key, shape in shapes.items()}
        assert load_manner_checkpoint(state).size == size
