"""A rank's micro-batch: noisy and clean waveforms, and the teacher's targets where a cache has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvat_dist.config.sizes import ViewKey
from mvat_dist.data.mixing.segments import Segment
from mvat_dist.data.shards.target_codec import SegmentTargets


@dataclass(frozen=True)
class TeacherTargets:
    """What the teacher makes of one batch; carries no gradient."""

    maps: dict[ViewKey, Tensor]
    """Energy maps (B, T_b) by (side, level, view)."""
    output: Tensor | None
    """Enhanced waveform (B, T), where the method distils it."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> TeacherTargets:
        """The targets with `function` applied to each of their tensors."""
        maps = {key: function(values) for key, values in self.maps.items()}
        return TeacherTargets(maps, None if self.output is None else function(self.output))


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch."""

    noisy: Tensor
    """(B, T) float32: the network's input."""
    clean: Tensor
    """(B, T) float32: the target."""
    recipes: list[dict[str, Any]]
    """How each segment was made."""
    teacher_targets: TeacherTargets | None = None
    """The teacher's targets of these segments, where the data was opened with a teacher cache."""

    @property
    def replaced(self) -> int:
        """Segments that replace bad samples."""
        return sum(bool(recipe["bad_samples"]) for recipe in self.recipes)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader calls this where there is a GPU."""
        return self._apply(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, copied without waiting where its memory is page-locked."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Batch:
        targets = self.teacher_targets and self.teacher_targets.apply(function)
        return Batch(function(self.noisy), function(self.clean), self.recipes, targets)


def collate(segments: Sequence[Segment]) -> Batch:
    """Stack segments, (T,) each, into one micro-batch."""
    noisy = torch.from_numpy(np.stack([segment.noisy for segment in segments]))
    clean = torch.from_numpy(np.stack([segment.clean for segment in segments]))
    targets = [segment.teacher_targets for segment in segments if segment.teacher_targets is not None]
    assert len(targets) in (0, len(segments)), "a segment without its teacher targets"
    return Batch(noisy, clean, [segment.recipe for segment in segments], _collate_targets(targets))


def _collate_targets(targets: Sequence[SegmentTargets]) -> TeacherTargets | None:
    """Stack the teacher targets of a batch's segments; None where there are none."""
    if not targets:
        return None
    maps = {key: torch.from_numpy(np.stack([each.maps[key] for each in targets])) for key in targets[0].maps}
    outputs = [each.output for each in targets if each.output is not None]
    assert len(outputs) in (0, len(targets)), "teacher targets without the output"
    return TeacherTargets(maps, torch.from_numpy(np.stack(outputs)) if outputs else None)
