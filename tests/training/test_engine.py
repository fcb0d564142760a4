"""The student engine keeps its promises at every ZeRO stage: parity, accumulation, skips, elastic state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from mvat_dist.config.schema import EngineConfig, OptimConfig
from mvat_dist.training.engine import StudentEngine, deepspeed_config
from tests.ranks_harness import on_ranks

STAGES = (0, 1, 2, 3)
STEPS = 4
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.5)
LR, BETA1 = 1e-2, 0.9


class Toy(nn.Module):
    """(B, T) -> (B, T), with what MANNER has: convolutions, normalisation, a linear map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Sequential(nn.Conv1d(1, 5, 3, padding=1, bias=False), nn.BatchNorm1d(5), nn.ReLU())
        self.out = nn.Conv1d(5, 1, 3, padding=1)

    def forward(self, noisy: Tensor, return_views: bool = False) -> Tensor:
        del return_views
        return self.out(self.inner(noisy[:, None]))[:, 0]


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    noisy, clean = torch.randn(2, 3, 64, generator=generator)
    return noisy, clean


def build(stage: int, accumulation: int, module: nn.Module | None = None) -> StudentEngine:
    module = module or Toy()
    config = deepspeed_config(
        EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
        OPTIM,
        parameters=sum(p.numel() for p in module.parameters()),
        micro_batch=3,
        accumulation=accumulation,
        precision="fp32",
    )
    return StudentEngine(module, config, OPTIM, torch.device("cpu"))


def train_step(engine: StudentEngine, step: int, parts: range, poison: bool = False) -> bool:
    for part in parts:
        noisy, clean = batch(step, part)
        if poison:
            noisy[0, 0] = float("nan")
        loss = (engine(noisy, return_views=False) - clean).square().mean()
        engine.backward(loss, last=part == parts[-1])
    engine.wait_for_gradients()
    return bool(engine.step(LR, BETA1))


def every_stage(rank: int) -> dict[str, Any]:
    """Train each stage on two ranks, two micro-batches a step; skip one step; move the state on."""
    results: dict[str, Any] = {"waits": 0}
    mine = range(2 * rank, 2 * rank + 2)
    accelerator = get_accelerator()

    def wait(device: int | None = None) -> None:
        del device
        results["waits"] += 1

    accelerator.synchronize = wait
    for stage in STAGES:
        engine = build(stage, accumulation=2)
        engine.module.train()
        applied = [train_step(engine, step, mine) for step in range(STEPS)]
        norm = engine.gradient_norm
        before = engine.weights()
        buffers = engine.snapshot_batchnorm()
        skipped = train_step(engine, 50, mine, poison=rank == 1)  # one rank's trouble
        engine.restore_batchnorm(buffers)
        state = engine.optimizer_state()
        after = engine.weights()
        results[f"{stage}"] = {
            "applied": applied,
            "norm": norm,
            "skipped": not skipped,
            "unchanged": all(torch.equal(before[key], after[key]) for key in before),
            "weights": after,
            "state": state,
        }
        resumed = Toy()
        resumed.load_state_dict(results["0"]["weights"])  # stage 0's state goes on at every stage
        other = build(stage, accumulation=2, module=resumed)
        other.load_optimizer_state(results["0"]["state"])
        results[f"{stage}"]["reloaded_state"] = other.optimizer_state()
        results[f"{stage}"]["reloaded_buffers"] = {
            name: buffer.clone() for name, buffer in other.module.named_buffers()
        }
        train_step(other, 60, mine)
        results[f"{stage}"]["continued"] = other.weights()
        other.load_weights(results["0"]["weights"])
        other.load_optimizer_state(results["0"]["state"])
        train_step(other, 60, mine)
        results[f"{stage}"]["again"] = other.weights()
        if stage == 0:
            results["waits at stage 0"] = results["waits"]
            train_step(engine, 60, mine)
            results["uninterrupted"] = engine.weights()
    return results


def plain_training() -> tuple[dict[str, Tensor], float]:
    """The same steps in plain torch: one process, the mean gradient over four micro-batches."""
    module = Toy().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    norm = 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(4):
            noisy, clean = batch(step, part)
            ((module(noisy) - clean).square().mean() / 4).backward()
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip_norm))
        optimizer.step()
    return copy.deepcopy({name: p.detach() for name, p in module.named_parameters()}), norm


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, every_stage, folder)


@pytest.mark.parametrize("stage", STAGES)
def test_equals_plain_torch(two_ranks: list[dict[str, Any]], stage: int) -> None:
    expected, norm = plain_training()
    got = two_ranks[0][f"{stage}"]
    assert all(got["applied"])
    assert got["norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > OPTIM.clip_norm  # the step was clipped, and the norm is the one before
    for name, value in expected.items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-4, atol=1e-6)


def test_no_step_waits_for_the_device(two_ranks: list[dict[str, Any]]) -> None:
    assert [results["waits at stage 0"] for results in two_ranks] == [0, 0]


@pytest.mark.parametrize("stage", STAGES)
def test_one_ranks_nan_skips_the_step_everywhere(two_ranks: list[dict[str, Any]], stage: int) -> None:
    for results in two_ranks:
        assert results[f"{stage}"]["skipped"]
        assert results[f"{stage}"]["unchanged"]


@pytest.mark.parametrize("stage", STAGES)
def test_state_moves_between_stages(two_ranks: list[dict[str, Any]], stage: int) -> None:
    for results in two_ranks:
        for key, value in results["0"]["state"].items():
            assert torch.equal(results[f"{stage}"]["reloaded_state"][key], value), key
        for key, value in results[f"{stage}"]["reloaded_buffers"].items():
            assert torch.equal(value, results["0"]["weights"][key]), key
        for name, _ in Toy().named_parameters():
            torch.testing.assert_close(
                results[f"{stage}"]["continued"][name], results["uninterrupted"][name], rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("stage", STAGES)
def test_going_back_is_as_if_nothing_had_happened(two_ranks: list[dict[str, Any]], stage: int) -> None:
    """An engine that takes older weights and moments makes the same step from there, to the last bit."""
    for results in two_ranks:
        for key, value in results[f"{stage}"]["continued"].items():
            assert torch.equal(results[f"{stage}"]["again"][key], value), key
