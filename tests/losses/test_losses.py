"""The losses equal their formulas: numpy for waveforms, closed forms and reference values for maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from mvat_dist.config.schema import DistilConfig, LossConfig
from mvat_dist.config.sizes import SIZES, VIEWS, Size, View, ViewKey
from mvat_dist.errors import UserError
from mvat_dist.losses import stft as distances
from mvat_dist.losses.enhancement import CompressedLoss, EnhancementLoss, OutputLoss, WaveformLoss
from mvat_dist.losses.mvat import energy_map, mvat_loss, shared_blocks
from mvat_dist.losses.objective import Objective, prepare_targets
from mvat_dist.losses.pesq import PesqLoss
from mvat_dist.models.manner import build
from mvat_dist.models.pretrained import load_manner_checkpoint
from tests.conftest import Reference

SAMPLES = 3001
Array = npt.NDArray[np.float64]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- waveforms ---


def magnitudes(signal: Array, fft: int, hop: int, window: int) -> Array:
    """(T,) -> (frames, F): the formula, frame by frame."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    left = (fft - window) // 2
    hann = np.pad(hann, (left, fft - window - left))
    padded = np.pad(signal, fft // 2, mode="reflect")
    frames = [padded[start : start + fft] * hann for start in range(0, len(padded) - fft + 1, hop)]
    return np.sqrt(np.maximum(np.abs(np.fft.rfft(frames)) ** 2, 1e-7))


def distance(estimate: Array, target: Array) -> float:
    """d of one item."""
    total = float(np.mean(np.abs(estimate - target)))
    for resolution in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        a, b = magnitudes(estimate, *resolution), magnitudes(target, *resolution)
        convergence = np.linalg.norm(a - b) / np.linalg.norm(b)
        total += 0.5 * (convergence + np.mean(np.abs(np.log(a) - np.log(b)))) / 3
    return total


def enhancement(estimate: Array, clean: Array, noisy: Array) -> float:
    energy, noise_energy = np.sum(clean**2), np.sum((noisy - clean) ** 2)
    weight = energy / (energy + noise_energy + 2e-7)
    return weight * distance(estimate, clean) + (1 - weight) * distance(noisy - estimate, noisy - clean)


def test_enhancement_loss_equals_its_formula() -> None:
    clean = noise(4, SAMPLES, seed=1)
    # Weights from almost 1 to 0: nearly clean, even, drowned, and no speech at all.
    clean[3] = 0
    noisy = clean + noise(4, SAMPLES, seed=2) * torch.tensor([[0.05], [1.0], [20.0], [1.0]])
    estimate = clean + 0.3 * noise(4, SAMPLES, seed=3)
    loss = EnhancementLoss()
    actual = loss(estimate, loss.prepare(noisy, clean)).item()
    items = zip(estimate.numpy(), clean.numpy(), noisy.numpy(), strict=True)
    assert actual == pytest.approx(np.mean([enhancement(*item) for item in items]), rel=1e-10)


def test_output_loss_equals_its_formula() -> None:
    estimate, teacher = noise(2, SAMPLES, seed=1), noise(2, SAMPLES, seed=2)
    loss = OutputLoss()
    actual = loss(estimate, loss.prepare(teacher)).item()
    expected = np.mean([distance(e, t) for e, t in zip(estimate.numpy(), teacher.numpy(), strict=True)])
    assert actual == pytest.approx(expected, rel=1e-10)


def test_waveform_losses_vanish_at_their_target_and_only_there() -> None:
    noisy, clean = noise(2, SAMPLES, seed=1), noise(2, SAMPLES, seed=2)
    enhance, output = EnhancementLoss(), OutputLoss()
    for loss in (
        lambda e: enhance(e, enhance.prepare(noisy, clean)),
        lambda e: output(e, output.prepare(clean)),
    ):
        assert loss(clean).item() == pytest.approx(0, abs=1e-9)
        assert loss(clean + 1e-3).item() > 1e-3


def test_silence_has_finite_loss_and_gradient() -> None:
    enhance, output = EnhancementLoss(), OutputLoss()
    silence = torch.zeros(2, SAMPLES)
    estimate = torch.zeros(2, SAMPLES, requires_grad=True)
    for value in (
        enhance(estimate, enhance.prepare(silence, silence)),
        output(estimate, output.prepare(silence)),
        enhance(estimate, enhance.prepare(noise(2, SAMPLES), silence)),
    ):
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value, estimate)
        assert gradient.isfinite().all()


def test_gradient_reaches_the_estimate_alone() -> None:
    noisy, clean, estimate, teacher = (noise(1, SAMPLES, seed=s).requires_grad_() for s in range(4))
    enhance, output = EnhancementLoss(), OutputLoss()
    value = enhance(estimate, enhance.prepare(noisy, clean)) + output(estimate, output.prepare(teacher))
    value.backward()
    assert estimate.grad is not None
    assert noisy.grad is clean.grad is teacher.grad is None


def test_the_waveform_loss_is_its_formula_at_any_level() -> None:
    clean, estimate = noise(3, SAMPLES, seed=1), noise(3, SAMPLES, seed=3)
    clean[2] = 0
    noisy = clean + noise(3, SAMPLES, seed=2)
    loss, targets = WaveformLoss(), EnhancementLoss().prepare(noisy, clean)
    arrays = [one.numpy() for one in (estimate, clean, noisy)]
    expected = np.mean(np.abs(arrays[0] - arrays[1]).mean(1) / np.abs(arrays[2]).mean(1))
    assert loss(estimate, targets).item() == pytest.approx(expected, rel=1e-12)
    quiet = EnhancementLoss().prepare(0.01 * noisy, 0.01 * clean)
    assert loss(0.01 * estimate, quiet).item() == pytest.approx(expected, rel=1e-12)
    silent = EnhancementLoss().prepare(torch.zeros_like(noisy), torch.zeros_like(clean))
    assert loss(torch.zeros_like(noisy), silent).item() == 0


def test_an_objective_adds_terms_by_their_factors() -> None:
    size = Size("small", 6, depth=2)
    estimate, clean, noisy = (noise(2, SAMPLES, seed=seed) for seed in (3, 1, 2))
    own = LossConfig(waveform=2.5, compressed=3.0, pesq=0.5)
    plain = Objective(DistilConfig(method="none"), size, None)
    added = Objective(DistilConfig(method="none"), size, None, own)
    targets = prepare_targets(noisy, clean, config=own)
    before, after = plain(estimate, {}, prepare_targets(noisy, clean)), added(estimate, {}, targets)
    assert plain.terms == ("loss", "enhance")
    assert added.terms == ("loss", "enhance", "waveform", "compressed", "pesq")
    assert after["enhance"] == before["enhance"] == before["loss"]
    compressed, pesq = CompressedLoss(), PesqLoss()
    expected = before["loss"] + 2.5 * WaveformLoss()(estimate, targets.enhancement)
    expected += 3.0 * compressed(estimate, compressed.prepare(noisy, clean))
    expected += 0.5 * pesq(estimate, pesq.prepare(noisy, clean))
    assert after["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradient_is_that_of_the_formula() -> None:
    loss = EnhancementLoss()
    noisy, clean = noise(1, 1300, seed=1), noise(1, 1300, seed=2)
    estimate, direction = noise(1, 1300, seed=3).requires_grad_(), noise(1, 1300, seed=4)
    loss(estimate, loss.prepare(noisy, clean)).backward()
    ahead, behind = (
        enhancement((estimate.detach() + step * direction)[0].numpy(), clean[0].numpy(), noisy[0].numpy())
        for step in (1e-6, -1e-6)
    )
    assert (estimate.grad * direction).sum().item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-5)


def test_a_loss_that_was_first_asked_in_inference_mode_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward keeps the window itself; 1536 is a length that no other test asks for."""
    resolutions = (distances.Resolution(1536, 120, 1536),)
    monkeypatch.setattr(distances, "RESOLUTIONS", resolutions)
    estimate, teacher = noise(2, SAMPLES, seed=1), noise(2, SAMPLES, seed=2)
    loss = OutputLoss()
    with torch.inference_mode():
        expected = loss(estimate, loss.prepare(teacher)).item()
    found = loss(estimate.requires_grad_(), loss.prepare(teacher))
    found.backward()
    assert found.item() == pytest.approx(expected)
    assert estimate.grad is not None
    assert estimate.grad.isfinite().all()


def test_autocast_does_not_touch_the_losses() -> None:
    noisy, clean, estimate = (noise(2, SAMPLES, seed=s, dtype=torch.float32) for s in range(3))
    enhance, output = EnhancementLoss(), OutputLoss()

    def both() -> Tensor:
        return enhance(estimate, enhance.prepare(noisy, clean)) + output(estimate, output.prepare(clean))

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(both(), expected)
        half = enhance(estimate.bfloat16(), enhance.prepare(noisy.bfloat16(), clean.bfloat16()))
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("noisy", "clean", "estimate", "message"),
    [
        ((2, 3000), (2, 3001), (2, 3000), r"\(2, 3000\), \(2, 3001\)"),
        ((2, 3000), (2, 3000), (1, 3000), r"\(1, 3000\), \(2, 3000\)"),
        ((2, 1199), (2, 1199), (2, 1199), r"at least 1200 samples, got shape \(2, 1199\)"),
        ((1, 1, 3000), (1, 1, 3000), (1, 1, 3000), r"must be \(B, T\)"),
    ],
)
def test_wrong_shapes_are_named(
    noisy: tuple[int, ...], clean: tuple[int, ...], estimate: tuple[int, ...], message: str
) -> None:
    loss = EnhancementLoss()
    with pytest.raises(ValueError, match=message):
        loss(noise(*estimate), loss.prepare(noise(*noisy), noise(*clean)))


def test_the_largest_window_is_long_enough() -> None:
    loss = EnhancementLoss()
    assert loss(noise(1, 1200), loss.prepare(noise(1, 1200, seed=1), noise(1, 1200, seed=2))).isfinite()


# --- attention transfer ---

KEY: ViewKey = ("encoder", 1, "channel")
EVERY_VIEW: dict[View, float] = {"channel": 1.0, "global": 1.0, "local": 1.0}


def term(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of one map."""
    total, terms = mvat_loss({KEY: student}, {KEY: teacher}, {"channel": 1.0})
    assert torch.equal(total, terms[KEY])
    return total


def test_terms_equal_the_reference_values(shared_folder: Path, reference: Callable[[str], Reference]) -> None:
    expected = json.loads((shared_folder / "fixtures/manner_reference/mvat_loss.json").read_text())
    teacher, student = reference("base_h12"), reference("base_h15_seg32_odd")
    maps = []
    for vectors in (student, teacher):
        model = load_manner_checkpoint(vectors.weights).double()
        with torch.no_grad():
            _, views = model(teacher.noisy.double(), return_views=True)
        maps.append({key: energy_map(feature) for key, feature in views.items()})
    total, terms = mvat_loss(maps[0], maps[1], EVERY_VIEW)

    # The authors' layout counts both sides from 0 in the order of computation; both networks have 4 levels.
    named = {
        f"manner_block.{side}.{level - 1 if side == 'encoder' else 4 - level}.attn_block.{view}": value.item()
        for (side, level, view), value in terms.items()
    }
    assert named == pytest.approx(expected["per_block_view"], rel=1e-8)
    assert total.item() == pytest.approx(expected["sum"], rel=1e-8)


def test_energy_map_sums_squares_over_channels() -> None:
    feature = torch.tensor([[[1.0, 2.0], [3.0, -4.0]]])
    assert energy_map(feature).tolist() == [[10.0, 20.0]]
    assert energy_map(feature.bfloat16() * 300).dtype == torch.float32
    assert energy_map(feature.double()).dtype == torch.float64


maps_of = st.lists(st.floats(0, 1e3), min_size=12, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64).view(2, 6)
)


@examples(max_examples=60)
@given(student=maps_of, teacher=maps_of)
def test_a_term_lies_between_0_and_2_and_is_symmetric(student: Tensor, teacher: Tensor) -> None:
    value = term(student, teacher).item()
    assert 0 <= value <= 2 + 1e-12
    assert term(teacher, student).item() == pytest.approx(value, abs=1e-12)
    # |u - v|^2 = |u|^2 + |v|^2 - 2 u.v, of directions of length 1, or 0 where a map is silent.
    u, v = (m / m.norm(dim=1, keepdim=True).clamp(min=1e-12) for m in (student, teacher))
    expected = (u.square().sum(1) + v.square().sum(1) - 2 * (u * v).sum(1)).mean().item()
    assert value == pytest.approx(expected, abs=1e-9)


@given(teacher=maps_of, scale=st.floats(1e-3, 1e3))
def test_equal_directions_cost_nothing(teacher: Tensor, scale: float) -> None:
    loud = teacher + 1e-3
    assert term(scale * loud, loud).item() == pytest.approx(0, abs=1e-12)


def test_disjoint_maps_cost_2_and_silence_1() -> None:
    early = torch.tensor([[1.0, 3.0, 0.0, 0.0]])
    late = torch.tensor([[0.0, 0.0, 2.0, 5.0]])
    assert term(early, late).item() == pytest.approx(2)
    assert term(torch.zeros(1, 4), late).item() == pytest.approx(1)
    assert term(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_maps_are_cropped_before_they_are_normalised() -> None:
    short, long = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0, 9.0]])
    assert term(short, long).item() == pytest.approx(0)
    assert term(long, short).item() == pytest.approx(0)


def test_items_are_normalised_one_by_one() -> None:
    teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    student = torch.tensor([[0.0, 7.0], [100.0, 100.0]])
    assert term(student, teacher).item() == pytest.approx((2 + 0) / 2)


def test_gradient_reaches_the_student_alone_and_survives_silence() -> None:
    feature = torch.zeros(1, 3, 4, requires_grad=True)
    teacher = torch.ones(1, 4, requires_grad=True)
    term(energy_map(feature), teacher).backward()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()
    assert teacher.grad is None


def test_a_teacher_in_half_precision_does_not_overflow() -> None:
    teacher = torch.tensor([[300.0, 600.0, 30_000.0]])
    assert term(teacher, teacher.half()).item() == pytest.approx(0, abs=1e-6)


def test_factors_weigh_views_and_0_leaves_them_out() -> None:
    keys: list[ViewKey] = [(side, 1, view) for side in ("encoder", "decoder") for view in VIEWS]
    student = {key: noise(1, 5, seed=i).square() for i, key in enumerate(keys)}
    teacher = {key: noise(1, 5, seed=50 + i).square() for i, key in enumerate(keys)}
    total, terms = mvat_loss(student, teacher, {"channel": 2.0, "global": 0.0, "local": 0.5})
    assert list(terms) == [key for key in keys if key[2] != "global"]
    expected = sum({"channel": 2.0, "local": 0.5}[key[2]] * term(student[key], teacher[key]) for key in terms)
    torch.testing.assert_close(total, expected)


def test_only_blocks_of_both_networks_count() -> None:
    both, deep = noise(1, 5).square(), noise(1, 3).square()
    total, terms = mvat_loss({KEY: both}, {KEY: 2 * both, ("encoder", 4, "channel"): deep}, EVERY_VIEW)
    assert list(terms) == [KEY]
    assert total.item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="share no energy map"):
        mvat_loss({KEY: both}, {("encoder", 4, "channel"): deep}, EVERY_VIEW)
    with pytest.raises(ValueError, match="share no energy map"):
        mvat_loss({KEY: both}, {KEY: both}, {"channel": 0.0})


def test_shared_blocks() -> None:
    teacher = SIZES["manner-b"]
    assert shared_blocks(SIZES["manner-s-5.3gf"], teacher) == teacher.blocks()
    assert shared_blocks(SIZES["manner-s-3.1gf"], teacher) == [("encoder", 3), ("decoder", 3)]
    assert len(shared_blocks(SIZES["manner-s-8.1gf"], teacher)) == 6
    with pytest.raises(UserError, match="no multi-view block at the same level"):
        shared_blocks(Size("small", 30, depth=3), Size("small", 60, depth=4))


def test_a_teacher_of_weight_zero_leaves_no_trace() -> None:
    """Gradients at kd_weight 0 are those without teacher targets, bit for bit: the teacher need not run."""
    size = Size("base", 6, depth=2)
    own = LossConfig(waveform=1.0, compressed=1.0, pesq=1.0)
    objective = Objective(DistilConfig(method="mvat+output"), size, size, own)
    torch.manual_seed(0)
    student, teacher = build(size).double().eval(), build(size).double().eval()
    noisy, clean = noise(2, 3000, seed=1), noise(2, 3000, seed=2)
    with torch.no_grad():
        output, views = teacher(noisy, return_views=True)
    maps = {key: energy_map(feature) for key, feature in views.items()}
    gradients = []
    for targets in ((maps, output), ()):
        estimate, views = student(noisy, return_views=True)
        terms = objective(estimate, views, prepare_targets(noisy, clean, *targets, config=own), kd_weight=0.0)
        gradients.append(torch.autograd.grad(terms["loss"], list(student.parameters()), allow_unused=True))
    assert set(terms) == {"loss", "enhance", "waveform", "compressed", "pesq"}
    for with_teacher, without in zip(*gradients, strict=True):
        assert (with_teacher is None) == (without is None)
        assert with_teacher is None or torch.equal(with_teacher, without)
