"""What the ranks agree on after a step, and the hooks that they run between two steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mvat_dist.distributed.collectives import all_reduce_sum, world_size
from mvat_dist.training.fault_tolerance import STOP_SIGNALS
from mvat_dist.training.schedule import Hyperparameters


@dataclass(frozen=True)
class StepEnd:
    """What is known of the step that has just ended, the same on every rank."""

    step: int
    """Steps done."""
    hparams: Hyperparameters
    last: bool
    """Whether it was the run's last step."""
    stopping: bool
    """Whether the run was asked to stop: everything is saved at once."""

    def every(self, steps: int) -> bool:
        """Whether something that is done every `steps` steps, and after the last one, is due."""
        return self.step % steps == 0 or self.last


@dataclass(frozen=True)
class Hook:
    """Something that all ranks do between two steps, whenever it is due."""

    section: str
    """Where its time is counted."""
    due: Callable[[StepEnd], bool]
    """The same on every rank."""
    run: Callable[[StepEnd], None]
    writes: bool = True
    """Whether it writes into the run's folder, which has to be there then."""


class Agreement(NamedTuple):
    """What one rank knows after a step, and after `all_reduced` what all ranks know."""

    stop_signal: int
    """Number of the signal that asked to stop; 0 without one. Of several, the largest number counts."""
    read_failed: bool
    """Whether a rank cannot read the next step's batches."""
    folder_lost: bool
    """Whether rank 0 no longer owns the run's folder."""
    bad_samples: int
    """Segments of the step that replaced bad samples."""

    def all_reduced(self, device: torch.device) -> Agreement:
        """Add up all ranks' values in one all-reduce of a small vector: no message hides another."""
        if world_size() == 1:  # nothing to ask: the host does not wait for the device
            return self
        signals = sorted(STOP_SIGNALS)
        flags = [*(self.stop_signal == number for number in signals), *self[1:]]
        counts = torch.tensor([float(flag) for flag in flags], dtype=torch.float64, device=device)
        all_reduce_sum([counts])
        *signal_counts, read_failed, folder_lost, bad_samples = counts.tolist()
        received = [int(number) for number, count in zip(signals, signal_counts, strict=True) if count]
        return Agreement(max(received, default=0), read_failed > 0, folder_lost > 0, round(bad_samples))
