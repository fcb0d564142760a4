"""Learning rate, momentum and the teacher's weight as pure functions of the step: nothing to save."""

from __future__ import annotations

import math
from typing import NamedTuple

from mvat_dist.config.schema import DistilConfig, LossConfig, OptimConfig

# torch.optim.lr_scheduler.OneCycleLR's defaults, which the authors' recipe uses.
_ONECYCLE_START_DIVISOR = 25.0
_ONECYCLE_FINAL_DIVISOR = 1e4
_ONECYCLE_BETA1 = (0.85, 0.95)


class Hyperparameters(NamedTuple):
    """What changes from step to step."""

    lr: float
    beta1: float
    kd_weight: float
    """Factor, 0 to 1, of the teacher's terms in the loss; at 0 the teacher is not asked."""
    pesq: bool
    """Whether the differentiable PESQ is part of the loss."""


class Schedule:
    """The hyperparameters of every step of a run."""

    def __init__(self, steps: int, optim: OptimConfig, distil: DistilConfig, loss: LossConfig) -> None:
        self._steps, self._optim, self._distil, self._loss = steps, optim, distil, loss

    def at(self, step: int) -> Hyperparameters:
        """Hyperparameters of optimiser step `step`, counted from 0."""
        return Hyperparameters(
            *lr_and_beta1(step, self._steps, self._optim),
            kd_weight(step, self._steps, self._distil),
            uses_pesq(step, self._steps, self._loss),
        )


def lr_and_beta1(step: int, steps: int, config: OptimConfig) -> tuple[float, float]:
    """Learning rate and beta1 of optimiser step `step`, counted from 0, of a run of `steps` steps.

    `onecycle` is torch's OneCycleLR with cosine annealing (Smith and Topin, 2017, "Super-convergence");
    `cosine` rises linearly and falls along half a cosine to 0 (Loshchilov and Hutter, 2017, "SGDR").
    """
    rise = config.warmup_fraction * steps - 1
    if config.schedule == "constant":
        return config.lr, config.betas[0]
    if config.schedule == "cosine":
        if step < rise:
            return config.lr * (step + 1) / (rise + 1), config.betas[0]
        fraction = (step - rise) / max(1.0, steps - rise)
        return _cosine(config.lr, 0.0, fraction), config.betas[0]
    low, high = _ONECYCLE_BETA1
    start = config.lr / _ONECYCLE_START_DIVISOR
    end = start / _ONECYCLE_FINAL_DIVISOR
    if step <= rise:
        fraction = step / rise if rise > 0 else 1.0
        return _cosine(start, config.lr, fraction), _cosine(high, low, fraction)
    remaining = steps - 1 - rise
    fraction = (step - rise) / remaining if remaining > 0 else 1.0
    return _cosine(config.lr, end, fraction), _cosine(low, high, fraction)


def kd_weight(step: int, steps: int, config: DistilConfig) -> float:
    """Factor, from 1 to 0, of the teacher's terms in the loss at step `step`, counted from 0."""
    return max(0.0, 1 - step / (config.fade_by * steps)) if config.fade_by else 1.0


def uses_pesq(step: int, steps: int, config: LossConfig) -> bool:
    """Whether the differentiable PESQ is part of the loss at step `step`, counted from 0."""
    return config.pesq > 0 and step >= config.pesq_after * steps


def _cosine(start: float, end: float, fraction: float) -> float:
    """From `start` at fraction 0 to `end` at fraction 1 along half a cosine."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(fraction, 1.0)))
