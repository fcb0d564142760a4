"""The teacher behind one call: run on every batch, or read from a cache. Asked once for all students."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mvat_dist.config.sizes import Size, ViewKey
from mvat_dist.data.batch import Batch, TeacherTargets
from mvat_dist.data.shards.targets import TeacherCache
from mvat_dist.distributed.device import Precision
from mvat_dist.losses.mvat import energy_map
from mvat_dist.models import weights
from mvat_dist.models.manner import Manner


class Teacher(Protocol):
    """What the students need of a teacher."""

    @property
    def size(self) -> Size:
        """Its architecture."""

    def select(self, maps: Collection[ViewKey], output: bool) -> None:
        """Choose what its targets hold: energy maps by (side, level, view), and whether its output."""

    def __call__(self, batch: Batch) -> TeacherTargets:
        """Its targets for a micro-batch, on the batch's device."""

    def enhance(self, noisy: Tensor) -> Tensor | None:
        """Its output for `noisy` (B, T); None where there is no network to run."""

    def describe(self) -> dict[str, Any]:
        """What a run records of its teacher, as JSON values."""


class LiveTeacher:
    """Runs the teacher network on every batch; it is frozen, and outside every engine."""

    def __init__(self, file: Path, device: torch.device, precision: Precision) -> None:
        loaded = weights.load(file)
        self.file = file
        self.name = loaded.name
        self.model: Manner = loaded.model.to(device).eval().requires_grad_(False)
        self._maps: set[ViewKey] = set()
        self._output = False
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    @property
    def size(self) -> Size:
        """Its architecture."""
        return self.model.size

    def select(self, maps: Collection[ViewKey], output: bool) -> None:
        """Choose what its targets hold."""
        self._maps, self._output = set(maps), output

    def __call__(self, batch: Batch) -> TeacherTargets:
        """Its targets for the batch's noisy side."""
        return self.forward(batch.noisy)

    @torch.no_grad()
    def forward(self, noisy: Tensor) -> TeacherTargets:
        """Its targets for `noisy` (B, T): maps (B, T_b) and, where selected, output (B, T)."""
        with self._autocast:
            output, views = self.model(noisy, return_views=True)
        maps = {key: energy_map(feature) for key, feature in views.items() if key in self._maps}
        return TeacherTargets(maps, output.float() if self._output else None)

    @torch.no_grad()
    def enhance(self, noisy: Tensor) -> Tensor:
        """Its output (B, T) for `noisy` (B, T)."""
        with self._autocast:
            output: Tensor = self.model(noisy)
        return output.float()

    def describe(self) -> dict[str, Any]:
        """What a run records of its teacher, as JSON values."""
        size = asdict(self.model.size)
        return {
            "file": str(self.file.resolve()),
            "name": self.name,
            "size": size,
            "sha256": weights.fingerprint(self.model),
        }


class CachedTeacher:
    """Hands on the targets that the readers found in a teacher cache."""

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache

    @property
    def size(self) -> Size:
        """Architecture of the teacher that filled the cache."""
        return self._cache.size

    def select(self, maps: Collection[ViewKey], output: bool) -> None:
        """Choose what its targets hold, before the readers start.

        Raises:
            UserError: the cache does not hold it.
        """
        self._cache.select(maps, output)

    def __call__(self, batch: Batch) -> TeacherTargets:
        """The targets that came with the batch."""
        assert batch.teacher_targets is not None, "the data was opened with the cache"
        return batch.teacher_targets

    def enhance(self, noisy: Tensor) -> None:
        """Return nothing: a cache holds no network."""
        del noisy

    def describe(self) -> dict[str, Any]:
        """The teacher that filled the cache, and which cache it was."""
        teacher = asdict(self._cache.manifest.teacher)
        return {**teacher, "cache": str(self._cache.folder), "codec": self._cache.codec}
