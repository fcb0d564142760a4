"""Read what runs and their evaluations left on disk. Damage is named and left out; the rest counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mvat_dist.config import parser
from mvat_dist.config import sizes as students
from mvat_dist.config.schema import Config
from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.evaluation.statistics import Row
from mvat_dist.io import read_json
from mvat_dist.models import metadata
from mvat_dist.runs.folder import RunDir


@dataclass(frozen=True)
class Evaluation:
    """One ``scores.json`` and the rows beside it."""

    folder: Path
    record: dict[str, Any]
    rows: list[Row]

    @property
    def name(self) -> str:
        """The folder's name: what was scored and which weights, ``dns-best``."""
        return self.folder.name


@dataclass(frozen=True, eq=False)
class Run:
    """The records of one run."""

    path: Path
    config: Config
    inputs: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    environments: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """By the folders in which students were trained: that of the run."""
    histories: dict[str, list[Row]] = field(default_factory=dict)
    """By student: the rows of the record, each with its ``step``."""
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """The students, by name."""
        return students.select(self.config.student, self.config.sizes)

    def home_of(self, student: str) -> Path:
        """The folder in which `student` was trained."""
        del student
        return self.path

    @property
    def teacher(self) -> dict[str, Any] | None:
        """``file``, ``name``, ``size`` and ``sha256`` of the weights; None for a run without one."""
        found = self.inputs.get("teacher")
        return found if isinstance(found, dict) else None


class Reader:
    """Reads runs and remembers what it could not use."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """One line each: what was left out, where, and why."""

    def runs(self, paths: Iterable[Path]) -> list[Run]:
        """Every run of `paths`, in their order, none of them twice.

        Raises:
            UserError: there is none.
        """
        found: dict[Path, Run | None] = {}
        for path in map(Path.resolve, paths):
            if path not in found:
                found[path] = self._run(path)
        runs = [run for run in found.values() if run is not None]
        if not runs:
            listed = "; ".join(self.problems)
            raise UserError(f"no run to report on ({listed}): give run folders, such as runs/*/")
        return runs

    def _run(self, path: Path) -> Run | None:
        folder = RunDir(path)
        if not folder.config.is_file():
            self.problems.append(f"{path} is left out: it is no run folder (it has no config.yaml)")
            return None
        try:
            config = parser.parse(["--config", str(folder.config)])
        except (UserError, OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{path} is left out: its config.yaml cannot be used ({_one_line(error)})")
            return None
        found = sorted(path.glob("evaluate/*/scores.json"))
        made = Run(
            path,
            config,
            self._json(folder.inputs),
            self._json(folder.status),
            {path: self._json(folder.environment)},
            {
                name: self._rows(folder.history(name), {"step": int})
                for name in students.select(config.student, config.sizes)
            },
            [one for one in map(self._evaluation, found) if one is not None],
        )
        for evaluation in made.evaluations:
            self._name_outdated(made, evaluation)
        return made

    def _name_outdated(self, run: Run, evaluation: Evaluation) -> None:
        """Say whose scores are of other weights than those that the run has by now."""
        which, scored = evaluation.record.get("weights"), evaluation.record.get("networks")
        if which not in ("best", "last") or not isinstance(scored, dict):
            return
        for name in run.sizes:
            said = scored.get(name)
            file = RunDir(run.home_of(name)).weights(name, which)
            if not isinstance(said, dict) or said.get("step") is None or not file.is_file():
                continue
            try:
                here = metadata.read(file)
            except (UserError, OSError):
                continue  # training says so
            if here is not None and here.step != said["step"]:
                self.problems.append(
                    f"{evaluation.folder}: the scores of {name} are of step {said['step']}, and its {which} "
                    f"weights of step {here.step} by now: evaluate it again"
                )

    def _evaluation(self, scores: Path) -> Evaluation | None:
        record = self._json(scores)
        rows = self._rows(scores.with_name("rows.jsonl"), {"subset": str, "key": str, "model": str})
        return Evaluation(scores.parent, record, rows) if record and rows else None

    def _json(self, path: Path) -> dict[str, Any]:
        """The object in a file; empty where there is none."""
        try:
            value = read_json(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.problems.append(f"{path} is damaged and left out ({_one_line(error)})")
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{path} is damaged and left out (it holds no object)")
            return {}
        return value

    def _rows(self, path: Path, needed: dict[str, type]) -> list[Row]:
        """The rows of a JSONL file that have what is needed."""
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            self.problems.append(f"{path} cannot be read ({_one_line(error)})")
            return []
        rows, damaged = [], []
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is not None and all(isinstance(row.get(key), kind) for key, kind in needed.items()):
                rows.append(row)
            else:
                damaged.append(number)
        if damaged:
            shown = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
            self.problems.append(f"{path}: {len(damaged)} damaged lines are left out (line {shown})")
        return rows


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def number(value: Any) -> float | None:
    """A finite number as such; None for anything else that a record may hold in its place."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
