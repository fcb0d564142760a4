"""Weights on disk: one safetensors file that names its own architecture.

Written at every save as ``students/NAME/{best,last}/model.safetensors``; read as a teacher, for
scoring and by anyone else. Checkpoints of the authors (``.pth``) are read too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.errors import UserError
from mvat_dist.files import atomic_file, read_json
from mvat_dist.models import Manner, load_manner_checkpoint
from mvat_dist.rundir import RunDir
from mvat_dist.students import Size

FORMAT = "mvat_dist.model.1"
Which = Literal["best", "last"]


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode and where it came from."""

    name: str
    model: Manner
    step: int | None
    """Optimiser steps behind it; None where the file does not say."""


def save(path: Path, weights: Mapping[str, torch.Tensor], *, name: str, size: Size, step: int) -> None:
    """Write fp32 weights and BatchNorm buffers atomically to `path`."""
    metadata = {
        "format": FORMAT,
        "name": name,
        "size": json.dumps(asdict(size)),
        "step": str(step),
        "sample_rate": str(SAMPLE_RATE),
    }
    with atomic_file(path) as temporary:
        save_file({key: value.contiguous().cpu() for key, value in weights.items()}, temporary, metadata)


def load(path: Path) -> LoadedModel:
    """The network in a model file, a student's folder or the folder of a run with one student.

    Raises:
        UserError: nothing there, several students to choose from, or a file that is something else.
    """
    file = resolve(path)
    metadata = _metadata(file)
    if metadata.get("format") != FORMAT:
        return LoadedModel(file.stem, load_manner_checkpoint(file), None)
    size = Size(**json.loads(metadata["size"]))
    return LoadedModel(metadata["name"], load_manner_checkpoint(file, size), int(metadata["step"]))


def _metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself; empty for any other file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError:
        return {}


def resolve(path: Path, which: Which = "best") -> Path:
    """The weights file that `path` stands for: itself, or the one in a student's or a run's folder.

    Raises:
        UserError: nothing there, or several students to choose from.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"no model at {path}: give a run folder, a student's folder or a checkpoint file")
    if (own := _weights(path, which)) is not None:
        return own
    found = students_of(path, which)
    if not found:
        raise UserError(f"{path} holds no weights: a run has students/NAME/best/model.safetensors")
    if len(found) > 1:
        names = ", ".join(found)
        raise UserError(f"{path} holds several students ({names}): give {path}/students/NAME")
    return next(iter(found.values()))


def _weights(student_folder: Path, which: Which) -> Path | None:
    """`which` weights of one student, or the others where those do not exist yet."""
    others: Which = "last" if which == "best" else "best"
    for choice in (which, others):
        file = student_folder / choice / "model.safetensors"
        if file.is_file():
            return file
    return None


def students_of(run: Path, which: Which = "best") -> dict[str, Path]:
    """Weights file of every student in a run folder that has one, by name."""
    folder = RunDir(run).students
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = {name: _weights(folder / name, which) for name in names}
    return {name: file for name, file in found.items() if file is not None}


def teacher_of(run: Path) -> Path | None:
    """Weights file of the teacher that a run learnt from; None for a run without one."""
    record = RunDir(run).inputs
    teacher = read_json(record)["teacher"] if record.is_file() else None
    return Path(teacher["file"]) if teacher else None


def fingerprint(model: Manner) -> str:
    """Hexadecimal SHA-256 of a network's weights and BatchNorm statistics."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
