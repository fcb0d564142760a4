"""Checkpoints of a fleet: whole weights and optimiser states, whatever the ZeRO stage or rank count.

A checkpoint is a folder ``step-NNNNNNNN`` of safetensors and JSON, never pickle. It is written under a
temporary name and renamed when its manifest (sizes and checksums) is inside, so a folder with that name
is complete unless the disk damaged it later; a damaged one is named and passed over.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mvat_dist.files import atomic_directory, read_json, write_json

logger = logging.getLogger(__name__)

_PREFIX = "step-"
_MANIFEST = "manifest.json"
_FLEET = "fleet.json"


@dataclass
class StudentState:
    """What one student needs to go on."""

    weights: dict[str, Tensor]
    """fp32 parameters and BatchNorm buffers by name."""
    optimizer: dict[str, Tensor]
    """Moments by parameter and the update count; empty before the first update."""
    progress: dict[str, Any]
    """JSON values: counters, best score, sums of the open row of the record."""


def save(folder: Path, step: int, states: dict[str, StudentState], keep: int) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`. Called on one rank."""
    path = folder / f"{_PREFIX}{step:08d}"
    with atomic_directory(path) as temporary:
        for name, state in states.items():
            save_file(state.weights, temporary / f"{name}.weights.safetensors")
            save_file(state.optimizer, temporary / f"{name}.optimizer.safetensors")
        progress = {name: state.progress for name, state in states.items()}
        write_json(temporary / _FLEET, {"step": step, "students": progress})
        files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / _MANIFEST, files)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; None without one.

    A damaged checkpoint is reported by name and the one before it is used.
    """
    for path in reversed(_complete(folder)):
        damaged = _damage(path)
        if damaged is None:
            return path
        logger.warning("checkpoint %s is damaged (%s): using the one before it", path, damaged)
    return None


def step_of(path: Path) -> int:
    """Optimiser steps done when the checkpoint was written."""
    return int(path.name.removeprefix(_PREFIX))


def load(path: Path, name: str) -> StudentState | None:
    """The state of student `name`, or None where the checkpoint does not hold that student."""
    progress = read_json(path / _FLEET)["students"]
    if name not in progress:
        return None
    return StudentState(
        load_file(path / f"{name}.weights.safetensors"),
        load_file(path / f"{name}.optimizer.safetensors"),
        progress[name],
    )


def _complete(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    found = folder.glob(f"{_PREFIX}*") if folder.is_dir() else []
    return sorted(path for path in found if (path / _MANIFEST).is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(path / _MANIFEST)
    except ValueError:
        return f"{_MANIFEST} is not readable"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != expected:
            return f"{name} has changed since it was written"
    return None
