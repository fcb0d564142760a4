"""Where weights lie in a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.io import read_json
from mvat_dist.models import metadata
from mvat_dist.runs.folder import RunDir

Which = Literal["best", "last"]


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


def first_weights(init: str, name: str, size: Size) -> Path:
    """The file that `train.init` stands for, of a student called `name` and of `size`.

    Raises:
        UserError: there is none, or it says that it is of another size.
    """
    place = Path(init)
    of_run = students_of(place) if place.is_dir() and _weights(place, "best") is None else {}
    if len(of_run) > 1 and name not in of_run:
        raise UserError(f"--train.init {place} has no weights of {name}, but of {', '.join(of_run)}")
    try:
        file = of_run.get(name) or resolve(place)
        description = metadata.read(file)
    except UserError as error:
        raise UserError(f"--train.init: {error}") from error
    if description and description.size != size:
        raise UserError(
            f"--train.init {file} is {description.size}, but the student {name} is {size}: give weights of "
            "its size, or declare the student's size so"
        )
    return file


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
    students = sorted(folder.iterdir(), key=lambda student: student.name) if folder.is_dir() else []
    files = {student.name: _weights(student, which) for student in students}
    return {name: file for name, file in files.items() if file is not None}


def teacher_of(run: Path) -> tuple[Path, str] | None:
    """File and fingerprint of the weights that a run learnt from; None for a run without a teacher.

    Raises:
        UserError: the run's record of it is damaged.
    """
    record = RunDir(run).inputs
    try:
        teacher = read_json(record)["teacher"] if record.is_file() else None
        return (Path(teacher["file"]), str(teacher["sha256"])) if teacher else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record} is damaged ({type(error).__name__}: {error}): copy it again, or score the "
            "students' folders"
        ) from error
