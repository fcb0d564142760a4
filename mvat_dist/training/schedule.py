"""What changes in the course of a training, as pure functions of the step: nothing to save or restore."""

from __future__ import annotations

import math
from typing import NamedTuple

from mvat_dist.config.schema import DistilConfig, LossConfig, OptimConfig

# torch.optim.lr_scheduler.OneCycleLR's defaults, which the authors' recipe uses.
_ONECYCLE_START_DIVISOR = 25.0
_ONECYCLE_FINAL_DIVISOR = 1e4
_ONECYCLE_BETA1 = (0.85, 0.95)


class Hyperparameters(NamedTuple):
    """What the optimiser uses at one step."""

    lr: float
    beta1: float


def at(step: int, steps: int, config: OptimConfig) -> Hyperparameters:
    """Hyperparameters of optimiser step `step`, counted from 0, of a run of `steps` steps.

    `onecycle` is torch's OneCycleLR with cosine annealing (Smith and Topin, 2017, "Super-convergence");
    `cosine` rises linearly and falls along half a cosine to 0 (Loshchilov and Hutter, 2017, "SGDR").
    """
    rise = config.warmup_fraction * steps - 1
    if config.schedule == "constant":
        return Hyperparameters(config.lr, config.betas[0])
    if config.schedule == "cosine":
        if step < rise:
            return Hyperparameters(config.lr * (step + 1) / (rise + 1), config.betas[0])
        fraction = (step - rise) / max(1.0, steps - rise)
        return Hyperparameters(_cosine(config.lr, 0.0, fraction), config.betas[0])
    low, high = _ONECYCLE_BETA1
    start = config.lr / _ONECYCLE_START_DIVISOR
    end = start / _ONECYCLE_FINAL_DIVISOR
    if step <= rise:
        fraction = step / rise if rise > 0 else 1.0
        return Hyperparameters(_cosine(start, config.lr, fraction), _cosine(high, low, fraction))
    left = steps - 1 - rise
    fraction = (step - rise) / left if left > 0 else 1.0
    return Hyperparameters(_cosine(config.lr, end, fraction), _cosine(low, high, fraction))


def distillation(step: int, steps: int, config: DistilConfig) -> float:
    """Factor, from 1 to 0, of what the teacher's part of the loss counts for at step `step`, from 0."""
    return max(0.0, 1 - step / (config.fade_by * steps)) if config.fade_by else 1.0


def pesq_counts(step: int, steps: int, config: LossConfig) -> bool:
    """Whether the likeness of PESQ is part of the loss at step `step`, from 0."""
    return config.pesq > 0 and step >= config.pesq_after * steps


def _cosine(start: float, end: float, fraction: float) -> float:
    """From `start` at fraction 0 to `end` at fraction 1 along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(fraction, 1.0)))
