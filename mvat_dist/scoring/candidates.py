"""What there is to score: the networks that the user's MODEL arguments stand for, by name."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch import nn

from mvat_dist import locations, modelfile, weightsfile
from mvat_dist.errors import UserError
from mvat_dist.modelfile import LoadedModel
from mvat_dist.models import logmmse
from mvat_dist.models.logmmse import LogMmse
from mvat_dist.rundir import RunDir
from mvat_dist.students import Size
from mvat_dist.summary import NOISY
from mvat_dist.weightsfile import Which

TEACHER = "teacher"
CLASSICAL = "log-mmse"
"""The MODEL that is no file: a filter that learns nothing, for a network to be better than."""


@dataclass(frozen=True)
class Candidate:
    """A network and the name that its rows get, alone and beside another of that name."""

    name: str
    full_name: str
    own_name: str
    """What its file calls it."""
    model: nn.Module
    """(B, T) -> (B, T), in eval mode."""
    fingerprint: str
    size: Size | None = None
    """None where it is no network."""
    step: int | None = None


def networks_of(models: Sequence[str], which: Which) -> dict[str, Candidate]:
    """The networks in `models`, by the names of their rows, which are unique.

    Args:
        models: paths, each a run (its teacher and all its students), a student's folder, a model file or
            an authors' checkpoint; or NAME=PATH to choose the name; or `CLASSICAL`. A network that is met
            twice, such as the teacher of two runs, counts once.
        which: weights, where there is a choice.

    Raises:
        UserError: nothing there, no trained weights in it, a file that is something else, or two networks of
            one name.
    """
    split = [_split(model) for model in models]
    labels = [path.name for _, path in split]
    if len(set(labels)) != len(labels):
        labels = locations.labels([str(path.absolute()) for _, path in split])
    found = [
        candidate
        for (name, path), label in zip(split, labels, strict=True)
        for candidate in _candidates(path, name, label, which)
    ]
    unique = list({(one.name, one.fingerprint): one for one in found}.values())
    count = Counter(one.name for one in unique)
    named = [(one.name if count[one.name] == 1 else one.full_name, one) for one in unique]
    for name, times in Counter(name for name, _ in named).items():
        if times > 1 or name == NOISY:
            raise UserError(f"two things to score are called {name!r}: name them, as NAME=PATH")
    return dict(named)


def _split(model: str) -> tuple[str, Path]:
    """(name or nothing, path)."""
    name, separator, path = model.partition("=")
    if separator and name and "/" not in name and not Path(model).exists():
        return name, Path(path)
    return "", Path(model)


def _candidates(path: Path, name: str, label: str, which: Which) -> list[Candidate]:
    if str(path) == CLASSICAL and not path.exists():
        label = name or CLASSICAL
        return [Candidate(label, label, CLASSICAL, LogMmse().eval(), _classical_version())]
    if not RunDir(path).config.is_file():
        loaded = modelfile.load(weightsfile.resolve(path, which))
        return [_candidate(name or loaded.name, name or label, loaded)]
    students = weightsfile.students_of(path, which)
    if not students:
        raise UserError(f"{path} holds no trained student yet: weights are saved with its first checkpoint")
    files = dict(students)
    teacher = weightsfile.teacher_of(path)
    if teacher is not None and teacher.exists():
        files = {TEACHER: teacher, **files}
    elif teacher is not None:
        print(f"note: the teacher of {path} is no longer at {teacher}; it is left out", file=sys.stderr)
    return [
        _candidate(f"{name}/{own}" if name else own, f"{name or label}/{own}", modelfile.load(file))
        for own, file in files.items()
    ]


def _classical_version() -> str:
    """Changes with what the filter computes, as a network's fingerprint does with its weights."""
    code = hashlib.sha256(Path(logmmse.__file__).read_bytes()).hexdigest()
    return f"{CLASSICAL} {code}, scipy {metadata.version('scipy')}"


def _candidate(name: str, full_name: str, loaded: LoadedModel) -> Candidate:
    model = loaded.model
    return Candidate(
        name, full_name, loaded.name, model, modelfile.fingerprint(model), model.size, loaded.step
    )
