"""Checkpoints of a fleet: whole weights and optimiser states, whatever the ZeRO stage or rank count.

A checkpoint is a folder ``step-NNNNNNNN`` of safetensors and JSON, never pickle. It is written under a
temporary name and renamed when its manifest (sizes and checksums) is inside, so a folder with that name
is complete unless the disk damaged it later; a damaged one is named and passed over.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mvat_dist.errors import UserError
from mvat_dist.io import TEMPORARY_SUFFIX, atomic_directory, read_json, sha256, write_json

logger = logging.getLogger(__name__)

_PREFIX = "step-"
_MANIFEST = "manifest.json"
_FLEET = "fleet.json"

FORMAT = 1
"""Of the files of a checkpoint; raised when an older one can no longer be read."""


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
    """Write the checkpoint of `step`; of all that are there, leave it and the newest ones before it.

    `keep` usable ones stay, this one among them, and for a student that is well in none of these the newest
    that it was well in: it may have to go back there. Called on one rank, the folder's only writer: what a
    killed one left half written or half removed goes too. Newer means written later: where a student joined
    the fleet, the steps begin again, for that student.
    """
    for unfinished in folder.glob(f".{_PREFIX}*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(unfinished)
    path = folder / f"{_PREFIX}{step:08d}"
    serial = 1 + max((_serial(old) or 0 for old in _folders(folder)), default=0)
    with atomic_directory(path) as temporary:
        for name, state in states.items():
            save_file(state.weights, temporary / f"{name}.weights.safetensors")
            save_file(state.optimizer, temporary / f"{name}.optimizer.safetensors")
        progress = {name: state.progress for name, state in states.items()}
        write_json(
            temporary / _FLEET, {"format": FORMAT, "serial": serial, "step": step, "students": progress}
        )
        files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / _MANIFEST, files)
    _remove_superseded(path, keep, {name for name, one in progress.items() if _is_unwell(one)})
    return path


def _remove_superseded(written: Path, keep: int, unwell: set[str]) -> None:
    """Remove all but `written`, the ``keep - 1`` usable checkpoints before it, and what the `unwell` need.

    Those that stay are read in full, for a damaged one in their number is no reserve.
    """
    kept = 1
    for old in reversed(_folders(written.parent)):
        if old == written:
            continue
        if (kept < keep or unwell) and _damage(old) is None:
            well = {name for name in unwell if is_well(old, name)}
            if kept < keep or well:
                kept += 1
                unwell = unwell - well
                continue
        shutil.rmtree(old)


def is_well(path: Path, name: str) -> bool:
    """Whether the last gradient of student `name` was finite when the checkpoint was written."""
    progress = progress_of(path)
    return name in progress and not _is_unwell(progress[name])


def _is_unwell(progress: dict[str, Any]) -> bool:
    return int(progress.get("skipped_in_a_row", 0)) > 0


def newest(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """The newest `wanted` checkpoint whose files are all there and unchanged; None where there is none.

    A damaged checkpoint is reported by name and the one before it is used. Changes nothing on disk.

    Raises:
        UserError: there are checkpoints and each is damaged: the run would silently start over; or the
            newest whole one has another format.
    """
    damaged = {}
    any_whole = False
    for path in reversed(_folders(folder)):
        if not (path / _MANIFEST).is_file():
            continue
        reason = _damage(path)
        if reason is None:
            _check_format(path)
            if wanted(path):
                return path
            any_whole = True
            continue
        logger.warning("checkpoint %s is damaged (%s): looking for one before it", path, reason)
        damaged[path.name] = reason
    if damaged and not any_whole:
        named = ", ".join(f"{name} ({reason})" for name, reason in damaged.items())
        raise UserError(
            f"{folder}: every checkpoint is damaged: {named}; restore a copy of one, or move them away to "
            "start over"
        )
    return None


def _check_format(path: Path) -> None:
    """Refuse a checkpoint that another version of this package wrote in another way.

    Raises:
        UserError: with both formats.
    """
    found = read_json(path / _FLEET).get("format", FORMAT)  # the first ones did not say
    if found != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {found}, this version reads {FORMAT}: go on with the version of "
            "mvat_dist that the run's environment.json names, or start another run with --name"
        )


def step_of(path: Path) -> int:
    """Optimiser steps done when the checkpoint was written."""
    return int(path.name.removeprefix(_PREFIX))


def load(path: Path, name: str) -> StudentState | None:
    """The state of student `name`, or None where the checkpoint does not hold that student."""
    progress = progress_of(path)
    if name not in progress:
        return None
    return StudentState(
        load_file(path / f"{name}.weights.safetensors"),
        load_file(path / f"{name}.optimizer.safetensors"),
        progress[name],
    )


def progress_of(path: Path) -> dict[str, dict[str, Any]]:
    """What the students that the checkpoint holds have been through, by name, as JSON values."""
    found: dict[str, dict[str, Any]] = read_json(path / _FLEET)["students"]
    # The first checkpoints had one step for all.
    return {name: {"steps": step_of(path), **progress} for name, progress in found.items()}


def _folders(folder: Path) -> list[Path]:
    """Folders named as checkpoints are, the oldest first; one without a manifest is half removed.

    One that cannot say when it was written counts as the newest, so that it is named before it is passed
    over.
    """
    found = folder.glob(f"{_PREFIX}*") if folder.is_dir() else []
    named = [path for path in found if path.name.removeprefix(_PREFIX).isdecimal()]
    serials = {path: _serial(path) for path in named}
    return sorted(named, key=lambda path: (serials[path] is None, serials[path] or 0, step_of(path)))


def _serial(path: Path) -> int | None:
    """Number of the checkpoint in the order of writing, 0 in the first ones; None where it cannot be read."""
    try:
        return int(read_json(path / _FLEET).get("serial", 0))
    except (OSError, ValueError, AttributeError):
        return None


def _fingerprint(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(path / _MANIFEST)
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except ValueError:
        return f"{_MANIFEST} is not readable"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != expected:
            return f"{name} has changed since it was written"
    return None
