"""The systems to score: the networks that the user's MODEL arguments stand for, by name."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import nn

from mvat_dist.config import locations
from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.models import log_mmse, weights
from mvat_dist.models.log_mmse import LogMmse
from mvat_dist.models.weights import LoadedModel
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.weights import Which, resolve, students_of, teacher_of

TEACHER = "teacher"
CLASSICAL = "log-mmse"
"""The MODEL that is no file: a filter that learns nothing, for a network to be better than."""


@dataclass(frozen=True)
class System:
    """A network or a classical filter, and what its rows are called."""

    name: str
    full_name: str
    """The name that it gets beside another system of the same `name`."""
    own_name: str
    """What its file calls it."""
    model: nn.Module
    """(B, T) -> (B, T), in eval mode."""
    fingerprint: str
    size: Size | None = None
    """None where it is no network."""
    step: int | None = None


def load_systems(models: Sequence[str], which: Which) -> dict[str, System]:
    """The systems in `models`, by the names of their rows, which are unique.

    Args:
        models: paths, each a run (its teacher and all its students), a student's folder, a model file or
            an authors' checkpoint; or NAME=PATH to choose the name; or `CLASSICAL`. A network that is met
            twice, such as the teacher of two runs, counts once.
        which: weights, where there is a choice.

    Raises:
        UserError: nothing there, no trained weights in it, a file that is something else, or two systems of
            one name.
    """
    arguments = [split_name(model) for model in models]
    _refuse_taken_names(arguments)
    labels = [path.name for _, path in arguments]
    if len(set(labels)) != len(labels):
        labels = locations.labels([str(path.absolute()) for _, path in arguments])
    systems = [
        system
        for (name, path), label in zip(arguments, labels, strict=True)
        for system in _load(path, name, label, which)
    ]
    unique = list({(system.name, system.fingerprint): system for system in systems}.values())
    count = Counter(system.name for system in unique)
    named = [(system.name if count[system.name] == 1 else system.full_name, system) for system in unique]
    for name, times in Counter(name for name, _ in named).items():
        if times > 1 or name == NOISY:
            raise UserError(f"two things to score are called {name!r}: name them, as NAME=PATH")
    return dict(named)


def _refuse_taken_names(arguments: Sequence[tuple[str, Path]]) -> None:
    """A chosen name must not be one that a run gives: records would take one network for the other."""
    chosen = {name for name, path in arguments if name and not RunDir(path).config.is_file()}
    runs = [path for name, path in arguments if not name and RunDir(path).config.is_file()]
    names = {TEACHER, *(student for run in runs for student in students_of(run))} if runs else set()
    if taken := sorted(chosen & names):
        raise UserError(
            f"{', '.join(taken)} is a network of {', '.join(map(str, runs))}: choose another NAME"
        )


def split_name(model: str) -> tuple[str, Path]:
    """(name or nothing, path) of a MODEL argument."""
    name, separator, path = model.partition("=")
    if separator and name and "/" not in name and not Path(model).exists():
        return name, Path(path)
    return "", Path(model)


def _load(path: Path, name: str, label: str, which: Which) -> list[System]:
    """The systems of one argument: those of a run, or a single one."""
    if str(path) == CLASSICAL and not path.exists():
        label = name or CLASSICAL
        return [System(label, label, CLASSICAL, LogMmse().eval(), _classical_version())]
    if not RunDir(path).config.is_file():
        loaded = weights.load(resolve(path, which))
        return [_system(name or loaded.name, name or label, loaded)]
    students = students_of(path, which)
    if not students:
        raise UserError(f"{path} holds no trained student yet: weights are saved with its first checkpoint")
    networks = {**_load_teacher(path), **{student: weights.load(file) for student, file in students.items()}}
    return [
        _system(f"{name}/{network}" if name else network, f"{name or label}/{network}", loaded)
        for network, loaded in networks.items()
    ]


def _load_teacher(run: Path) -> dict[str, LoadedModel]:
    """The teacher of a run, called `TEACHER`; nothing, and a note, where its weights are gone or changed."""
    teacher = teacher_of(run)
    if teacher is None:
        return {}
    file, sha256 = teacher
    if not file.exists():
        print(f"note: the teacher of {run} is no longer at {file}; it is left out", file=sys.stderr)
        return {}
    loaded = weights.load(file)
    if weights.fingerprint(loaded.model) != sha256:
        print(
            f"note: {file} no longer holds the weights that taught {run}; it is left out (name it to score "
            f"it: NAME={file})",
            file=sys.stderr,
        )
        return {}
    return {TEACHER: loaded}


def _classical_version() -> str:
    """Changes with what the filter computes, as a network's fingerprint does with its weights."""
    code = hashlib.sha256(Path(log_mmse.__file__).read_bytes()).hexdigest()
    return f"{CLASSICAL} {code}, scipy {metadata.version('scipy')}"


def _system(name: str, full_name: str, loaded: LoadedModel) -> System:
    model = loaded.model
    return System(name, full_name, loaded.name, model, weights.fingerprint(model), model.size, loaded.step)
