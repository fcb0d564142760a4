"""The teacher: frozen, outside every engine, and asked once per batch for all students."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvat_dist import modelfile
from mvat_dist.devices import Precision
from mvat_dist.losses import Lesson, energy_map
from mvat_dist.models import Manner
from mvat_dist.students import ViewKey


class LiveTeacher:
    """Runs the teacher network on every batch."""

    def __init__(self, file: Path, device: torch.device, precision: Precision) -> None:
        loaded = modelfile.load(file)
        self.file = file
        self.name = loaded.name
        self.model: Manner = loaded.model.to(device).eval().requires_grad_(False)
        self.wanted_maps: set[ViewKey] = set()
        """(side, level, view) of the maps that some student's loss needs."""
        self.wants_output = False
        """Whether some student's loss needs the enhanced waveform."""
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    @torch.no_grad()
    def __call__(self, noisy: Tensor) -> Lesson:
        """What the teacher makes of `noisy` (B, T): maps (B, T_b) and, where wanted, output (B, T)."""
        with self._autocast:
            output, views = self.model(noisy, return_views=True)
        maps = {key: energy_map(feature) for key, feature in views.items() if key in self.wanted_maps}
        return Lesson(maps, output.float() if self.wants_output else None)

    def describe(self) -> dict[str, Any]:
        """What a run records of its teacher, as JSON values."""
        size = asdict(self.model.size)
        return {
            "file": str(self.file.resolve()),
            "name": self.name,
            "size": size,
            "sha256": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the weights and BatchNorm statistics."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
