"""Weights on disk: one safetensors file that names its own architecture.

Written at every save as ``students/NAME/{best,last}/model.safetensors``; read as a teacher, for
scoring and by anyone else. Checkpoints of the authors (``.pth``) are read too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.errors import UserError
from mvat_dist.files import atomic_file, read_json
from mvat_dist.models import Manner, load_manner_checkpoint
from mvat_dist.rundir import RunDir
from mvat_dist.students import Size

FORMAT = "mvat_dist.model.1"
Which = Literal["best", "last"]
_OWN = ("format", "name", "size", "sample_rate", "step")


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode and where it came from."""

    name: str
    model: Manner
    step: int | None
    """Optimiser steps behind it; None where the file does not say."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What an exported file says of its origin (`mvat_dist.deploy.lineage`); empty for other files."""


def save(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    size: Size,
    step: int | None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write weights and BatchNorm buffers atomically to `path`, and `about` them what else is to be said."""
    metadata = {
        **(about or {}),
        "format": FORMAT,
        "name": name,
        "size": json.dumps(asdict(size)),
        "sample_rate": str(SAMPLE_RATE),
    }
    if step is not None:
        metadata["step"] = str(step)
    with atomic_file(path) as temporary:
        # As bytes: a file that safetensors makes itself is for its owner alone.
        temporary.write_bytes(
            serialise({key: value.contiguous().cpu() for key, value in weights.items()}, metadata)
        )


def load(path: Path) -> LoadedModel:
    """The network in a model file, a student's folder or the folder of a run with one student.

    Raises:
        UserError: nothing there, several students to choose from, or a file that is something else.
    """
    file = resolve(path)
    metadata = _metadata(file)
    if metadata.get("format") != FORMAT:
        return LoadedModel(file.stem, load_manner_checkpoint(file), None)
    try:
        name, size = metadata["name"], Size(**json.loads(metadata["size"]))
        if Path(name).name != name:  # an export is written to a file of this name
            raise ValueError(f"its name {name!r} cannot be that of a file")
        step = int(metadata["step"]) if "step" in metadata else None
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{file}: its description is damaged ({error}): copy the file again") from error
    about = {key: value for key, value in metadata.items() if key not in _OWN}
    return LoadedModel(name, load_manner_checkpoint(file, size), step, about)


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
        names, one = ", ".join(found), next(iter(found.values())).parents[1]
        raise UserError(f"{path} holds several students ({names}): give one's folder, such as {one}")
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
    """Weights file of every student in a run folder, or in those of its parts, that has one, by name."""
    places = [one.students for one in _runs(run)]
    folders = sorted(
        (folder for place in places if place.is_dir() for folder in place.iterdir()), key=lambda one: one.name
    )
    found = {folder.name: _weights(folder, which) for folder in folders}
    return {name: file for name, file in found.items() if file is not None}


def _runs(run: Path) -> list[RunDir]:
    """The run, and those that it was divided into."""
    return [RunDir(run), *(RunDir(part) for part in RunDir(run).part_folders())]


def teacher_of(run: Path) -> Path | None:
    """Weights file of the teacher that a run learnt from; None for a run without one."""
    records = [one.inputs for one in _runs(run) if one.inputs.is_file()]
    teacher = read_json(records[0])["teacher"] if records else None
    return Path(teacher["file"]) if teacher else None


def fingerprint(model: Manner) -> str:
    """Hexadecimal SHA-256 of a network's weights and BatchNorm statistics."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
