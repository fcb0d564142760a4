"""Checkpoints of a group of students: whole weights and optimiser states, at any ZeRO stage and rank count.

A checkpoint is a folder ``step-NNNNNNNN`` of safetensors and JSON, never pickle. It is written under a
temporary name and renamed when its manifest (sizes and checksums) is inside, so a folder with that name
is complete unless the disk damaged it later; a damaged one is named and passed over.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mvat_dist.errors import UserError
from mvat_dist.io import TEMPORARY_SUFFIX, atomic_directory, read_record, sha256, write_json, write_record

logger = logging.getLogger(__name__)

_PREFIX = "step-"
_MANIFEST = "manifest.json"
_RECORD = "checkpoint.json"

FORMAT = 2
"""Of the files of a checkpoint; raised when an older one can no longer be read."""


@dataclass
class Progress:
    """How far a student is, and what has gone wrong on the way."""

    steps: int = 0
    """Steps of the run that are behind it: a student that joined later is behind the others for a while."""
    updates: int = 0
    """Steps that changed the weights."""
    skipped: int = 0
    """Steps left out because the gradient was not finite."""
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    """Times it went back to a checkpoint after too many skipped steps in a row."""
    lr_factor: float = 1.0
    """Factor of its learning rate: every rollback halves it."""
    given_up: bool = False
    """True where rollbacks did not help: the student stays as it is, the others go on."""
    validated: int = -1
    """Steps done at the last validation; -1 before the first."""
    best: float | None = None
    """Best validation score so far (higher is better)."""

    @property
    def well(self) -> bool:
        """Whether the last gradient was finite."""
        return self.skipped_in_a_row == 0


@dataclass
class StudentState:
    """What one student needs to go on."""

    weights: dict[str, Tensor]
    """fp32 parameters and BatchNorm buffers by name."""
    optimizer: dict[str, Tensor]
    """Moments by parameter and the update count; empty before the first update."""
    progress: Progress
    open_row: list[float]
    """Sums of the loss terms, and the count of segments, since the last row of the history."""


@dataclass(frozen=True)
class _StudentRecord:
    progress: Progress
    open_row: list[float]


@dataclass(frozen=True)
class _Record:
    """``checkpoint.json``: everything but the tensors."""

    step: int
    serial: int
    """Number of the checkpoint in the order of writing."""
    students: dict[str, _StudentRecord]
    format: int = FORMAT


@dataclass(frozen=True)
class _File:
    """Size and checksum of a file, as the manifest has them."""

    bytes: int
    sha256: str


def save(folder: Path, step: int, states: dict[str, StudentState], keep: int) -> Path:
    """Write the checkpoint of `step`; of all that are there, leave it and the newest ones before it.

    `keep` usable ones stay, this one among them, and for a student that is well in none of these the newest
    that it was well in: it may have to go back there. Called on one rank, the folder's only writer: what a
    killed one left half written or half removed goes too. Newer means written later: where a student joined
    the run, the steps begin again, for that student.
    """
    for unfinished in folder.glob(f".{_PREFIX}*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(unfinished)
    path = folder / f"{_PREFIX}{step:08d}"
    serial = 1 + max((_serial(old) or 0 for old in _folders(folder)), default=0)
    with atomic_directory(path) as temporary:
        for name, state in states.items():
            save_file(state.weights, temporary / f"{name}.weights.safetensors")
            save_file(state.optimizer, temporary / f"{name}.optimizer.safetensors")
        students = {name: _StudentRecord(state.progress, state.open_row) for name, state in states.items()}
        write_record(temporary / _RECORD, _Record(step, serial, students))
        files = {file.name: asdict(_describe(file)) for file in sorted(temporary.iterdir())}
        write_json(temporary / _MANIFEST, files)
    _remove_superseded(path, keep, {name for name, state in states.items() if not state.progress.well})
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
    return name in progress and progress[name].well


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
    """Refuse a checkpoint of another format.

    Raises:
        UserError: with both formats, or without a record, as the first format was.
    """
    if not (path / _RECORD).is_file():
        raise UserError(
            f"checkpoint {path} has no {_RECORD}, so another version of mvat_dist wrote it: go on with the "
            "version that the run's environment.json names, or start another run with --name"
        )
    _record(path)


def _record(path: Path) -> _Record:
    return read_record(path / _RECORD, _Record)


def step_of(path: Path) -> int:
    """Optimiser steps done when the checkpoint was written."""
    return int(path.name.removeprefix(_PREFIX))


def load(path: Path, name: str) -> StudentState | None:
    """The state of student `name`, or None where the checkpoint does not hold that student."""
    student = _record(path).students.get(name)
    if student is None:
        return None
    return StudentState(
        load_file(path / f"{name}.weights.safetensors"),
        load_file(path / f"{name}.optimizer.safetensors"),
        student.progress,
        student.open_row,
    )


def progress_of(path: Path) -> dict[str, Progress]:
    """Progress of the students that the checkpoint holds, by name."""
    return {name: student.progress for name, student in _record(path).students.items()}


def _folders(folder: Path) -> list[Path]:
    """Folders named as checkpoints are, the oldest first; one without a manifest is half removed.

    One that cannot say when it was written counts as the newest, so that it is named before it is passed
    over.
    """
    paths = folder.glob(f"{_PREFIX}*") if folder.is_dir() else []
    checkpoints = [path for path in paths if path.name.removeprefix(_PREFIX).isdecimal()]
    serials = {path: _serial(path) for path in checkpoints}
    return sorted(checkpoints, key=lambda path: (serials[path] is None, serials[path] or 0, step_of(path)))


def _serial(path: Path) -> int | None:
    """Number of the checkpoint in the order of writing; None where it cannot be read."""
    try:
        return _record(path).serial
    except (OSError, UserError):
        return None


def _describe(file: Path) -> _File:
    return _File(file.stat().st_size, sha256(file))


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = read_record(path / _MANIFEST, dict[str, _File])
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except UserError:
        return f"{_MANIFEST} is not readable"
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _describe(file) != expected:
            return f"{name} has changed since it was written"
    return None
