"""Load the records that runs and their evaluations left on disk; damaged ones are named and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mvat_dist.config import parser, sizes
from mvat_dist.config.schema import Config
from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.evaluation.statistics import Row
from mvat_dist.io import read_record
from mvat_dist.models import metadata
from mvat_dist.runs.folder import RunDir

T = TypeVar("T")


@dataclass(frozen=True)
class Fingerprint:
    """The part of ``inputs.json`` about the weights that a student began with."""

    sha256: str


@dataclass(frozen=True)
class Teacher:
    """The part of ``inputs.json`` about the teacher."""

    file: str | None = None
    name: str | None = None
    sha256: str | None = None
    """Of the weights."""

    @property
    def label(self) -> str:
        """``teacher NAME (FINGERPRINT)``: two teachers of one name differ in the fingerprint."""
        return f"teacher {self.name or 'unknown'}" + (f" ({self.sha256[:8]})" if self.sha256 else "")


UNKNOWN_TEACHER = Teacher()


@dataclass(frozen=True)
class Inputs:
    """What a run was given beside its configuration, from ``inputs.json``."""

    teacher: Teacher | None = None
    init: dict[str, Fingerprint] | None = None
    """By student, where ``train.init`` named weights to begin with."""


@dataclass(frozen=True)
class Status:
    """How far a run has come, from ``STATUS``."""

    state: str = "unknown"
    step: int | None = None
    time: str = ""


@dataclass(frozen=True)
class Ranks:
    """The part of ``environment.json`` about processes."""

    world_size: int = 1


@dataclass(frozen=True)
class Environment:
    """Where and with which code a run was last started, from ``environment.json``."""

    host: str = "unknown"
    platform: str = "unknown"
    commit: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    """Versions."""
    ranks: Ranks = field(default_factory=Ranks)


@dataclass(frozen=True)
class Network:
    """What ``scores.json`` says of one network. Lower is better in all three costs."""

    step: int | None = None
    parameters: float | None = None
    gmac_at_4_s: float | None = None
    real_time_factor: float | None = None


@dataclass(frozen=True)
class Scores:
    """What a report reads of ``scores.json``: the networks and the options of the evaluation."""

    networks: dict[str, Network] = field(default_factory=dict)
    machine: str = "an unknown machine"
    time: str = ""
    weights: str = "best"
    models: list[str] | None = None
    data: str | None = None
    noisy: str | None = None
    clean: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    max_seconds: float | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """One ``scores.json`` and the rows beside it."""

    folder: Path
    record: Scores
    rows: list[Row]

    @property
    def name(self) -> str:
        """The folder's name: what was scored and which weights, ``dns-best``."""
        return self.folder.name


@dataclass(frozen=True, eq=False)
class Run:
    """The records of one run."""

    folder: RunDir
    config: Config
    inputs: Inputs
    status: Status
    environment: Environment
    histories: dict[str, list[Row]]
    """By student: the rows of its history, each with its ``step``."""
    evaluations: list[Evaluation]

    @property
    def name(self) -> str:
        return self.folder.path.name

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """The students, by name."""
        return sizes.select(self.config.student, self.config.sizes)

    @property
    def teacher_label(self) -> str:
        """`Teacher.label` of this run's teacher."""
        return (self.inputs.teacher or UNKNOWN_TEACHER).label


def load_runs(paths: Iterable[Path], problems: list[str]) -> list[Run]:
    """Every run of `paths`, in their order, none of them twice.

    Args:
        paths: folders of runs.
        problems: gains one line for everything that is left out: what, where, and why.

    Raises:
        UserError: no folder has a usable run.
    """
    folders = dict.fromkeys(path.resolve() for path in paths)
    runs = [run for run in (_load_run(folder, problems) for folder in folders) if run is not None]
    if not runs:
        raise UserError(f"no run to report on ({'; '.join(problems)}): give run folders, such as runs/*/")
    return runs


def _load_run(path: Path, problems: list[str]) -> Run | None:
    folder = RunDir(path)
    if not folder.config.is_file():
        problems.append(f"{path} is left out: it is no run folder (it has no config.yaml)")
        return None
    try:
        config = parser.parse(["--config", str(folder.config)])
    except (UserError, OSError, UnicodeDecodeError) as error:
        problems.append(f"{path} is left out: its config.yaml cannot be used ({_one_line(error)})")
        return None
    evaluations = (
        _load_evaluation(scores, problems) for scores in sorted(path.glob("evaluate/*/scores.json"))
    )
    run = Run(
        folder,
        config,
        _record(folder.inputs, Inputs, problems) or Inputs(),
        _record(folder.status, Status, problems) or Status(),
        _record(folder.environment, Environment, problems) or Environment(),
        {
            student: _rows(folder.history(student), {"step": int}, problems)
            for student in sizes.select(config.student, config.sizes)
            if folder.history(student).exists()
        },
        [evaluation for evaluation in evaluations if evaluation is not None],
    )
    for evaluation in run.evaluations:
        _name_outdated_scores(run, evaluation, problems)
    return run


def _load_evaluation(scores: Path, problems: list[str]) -> Evaluation | None:
    record = _record(scores, Scores, problems)
    rows = _rows(scores.with_name("rows.jsonl"), {"subset": str, "key": str, "model": str}, problems)
    return Evaluation(scores.parent, record, rows) if record and rows else None


def _name_outdated_scores(run: Run, evaluation: Evaluation, problems: list[str]) -> None:
    """Name the students whose scores are of other weights than those that the run has by now."""
    which = evaluation.record.weights
    if which not in ("best", "last"):
        return
    for student in run.sizes:
        network = evaluation.record.networks.get(student)
        file = run.folder.weights(student, "best" if which == "best" else "last")
        if network is None or network.step is None or not file.is_file():
            continue
        try:
            weights = metadata.read(file)
        except (UserError, OSError):
            continue  # training says so
        if weights is not None and weights.step != network.step:
            problems.append(
                f"{evaluation.folder}: the scores of {student} are of step {network.step}, and its {which} "
                f"weights of step {weights.step} by now: evaluate it again"
            )


def _record(path: Path, record: type[T], problems: list[str]) -> T | None:
    """The record in a file; None where there is none or it is damaged."""
    try:
        return read_record(path, record)
    except FileNotFoundError:
        return None
    except (OSError, UserError) as error:
        problems.append(f"{path} is damaged and left out ({_one_line(error)})")
        return None


def _rows(path: Path, required: dict[str, type], problems: list[str]) -> list[Row]:
    """The rows of a JSONL file that have the `required` keys, with values of these types."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        problems.append(f"{path} cannot be read ({_one_line(error)})")
        return []
    rows, damaged = [], []
    for line_number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is not None and all(isinstance(row.get(key), kind) for key, kind in required.items()):
            rows.append(row)
        else:
            damaged.append(line_number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
        problems.append(f"{path}: {len(damaged)} damaged lines are left out (line {shown})")
    return rows


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def number(value: Any) -> float | None:
    """A finite number as such; None for anything else that a row may hold in its place."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
