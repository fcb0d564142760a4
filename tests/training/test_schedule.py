"""The closed-form schedules equal torch's stateful ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from mvat_dist.config.schema import DistilConfig, LossConfig, OptimConfig
from mvat_dist.training import schedule


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.3), (101, 0.1), (50, 0.5), (7, 0.9)])
def test_onecycle_is_torchs(steps: int, warmup: float) -> None:
    config = OptimConfig(lr=3e-3, schedule="onecycle", warmup_fraction=warmup)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.999))
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=steps, pct_start=warmup
    )
    for step in range(steps):
        lr, beta1 = schedule.lr_and_beta1(step, steps, config)
        group = optimizer.param_groups[0]
        assert lr == pytest.approx(group["lr"], rel=1e-12)
        assert beta1 == pytest.approx(group["betas"][0], rel=1e-12)
        optimizer.step()
        if step + 1 < steps:
            reference.step()


def test_cosine_rises_to_the_peak_and_falls_to_nothing() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_fraction=0.1)
    rates = [schedule.lr_and_beta1(step, 100, config)[0] for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 9
    assert all(before > after for before, after in itertools.pairwise(rates[9:]))
    assert rates[-1] < 1e-2


def test_differentiable_pesq_counts_after_its_share_of_the_steps() -> None:
    config = LossConfig(pesq=0.5, pesq_after=0.25)
    assert [schedule.uses_pesq(step, 8, config) for step in range(8)] == [False] * 2 + [True] * 6
    assert schedule.uses_pesq(0, 8, LossConfig(pesq=0.5))
    assert not schedule.uses_pesq(7, 8, LossConfig())


@pytest.mark.parametrize("kind", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_short_runs_stay_within_bounds(kind: str, warmup: float, steps: int) -> None:
    config = OptimConfig(lr=1e-3, schedule=kind, warmup_fraction=warmup)  # type: ignore[arg-type]
    for step in range(steps):
        lr, beta1 = schedule.lr_and_beta1(step, steps, config)
        assert 0 <= lr <= config.lr
        assert 0.8 < beta1 < 1


def test_kd_weight_fades_linearly_to_nothing_and_stays_there() -> None:
    weights = [schedule.kd_weight(step, 100, DistilConfig(fade_by=0.4)) for step in range(100)]
    assert weights[0] == 1
    assert weights[10] == pytest.approx(0.75)
    assert weights[39] == pytest.approx(1 / 40)
    assert set(weights[40:]) == {0.0}
    assert {schedule.kd_weight(step, 100, DistilConfig()) for step in range(100)} == {1.0}


def test_a_schedule_has_everything_that_changes_with_the_step() -> None:
    optim, distil, loss = OptimConfig(lr=2e-3), DistilConfig(fade_by=0.5), LossConfig(pesq=1, pesq_after=0.5)
    hparams = schedule.Schedule(8, optim, distil, loss).at(2)
    assert (hparams.lr, hparams.beta1) == schedule.lr_and_beta1(2, 8, optim)
    assert (hparams.kd_weight, hparams.pesq) == (0.5, False)
