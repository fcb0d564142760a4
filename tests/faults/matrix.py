"""The cells of the matrix: a fault at a moment of a run."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from mvat_dist.runs.folder import RunDir
from tests.faults.group import STEPS, Bench
from tests.faults.processes import MissedError

_ATTEMPTS = 5


class Moment(enum.Enum):
    """When a fault strikes, and the step that is the last one recorded then."""

    BEFORE = ("before the first checkpoint", 2)
    MIDDLE = ("in the middle", 9)
    LAST = ("in the last step", STEPS - 1)

    def __init__(self, words: str, step: int) -> None:
        self.words = words
        self.step = step


class CannotError(Exception):
    """The cell cannot be made here."""


def cannot(why: str) -> NoReturn:
    raise CannotError(why)


@dataclass
class Outcome:
    """What came of a cell that kept the law."""

    words: str
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """Of the whole cell."""
    said: str = ""


Disturb = Callable[[Bench, RunDir, Moment], Outcome]


@dataclass(frozen=True)
class Fault:
    """A row of the matrix."""

    name: str
    disturb: Disturb
    ci: tuple[Moment, ...]
    """Cells that run with the tests; the others by `make faults` only."""
    slurm: bool


FAULTS: list[Fault] = []


def fault(name: str, *, ci: Sequence[Moment] = (), slurm: bool = False) -> Callable[[Disturb], Disturb]:
    """Add a row to the matrix."""

    def added(disturb: Disturb) -> Disturb:
        FAULTS.append(Fault(name, disturb, tuple(ci), slurm))
        return disturb

    return added


def ci_cells(*, slurm: bool) -> list[tuple[Fault, Moment]]:
    """The third of the matrix that runs with every change."""
    return [(one, moment) for one in FAULTS for moment in Moment if one.slurm == slurm and moment in one.ci]


def run_cell(one: Fault, moment: Moment, bench: Bench) -> Outcome:
    """Disturb a new run; a moment that was missed, on a busy machine, is tried again.

    Raises:
        AssertionError: the law was broken.
        CannotError: the cell cannot be made here.
    """
    assert bench.undisturbed
    for attempt in range(_ATTEMPTS):
        run = RunDir(bench.folder / "my runs" / f"{one.disturb.__name__} {moment.name} {attempt}".lower())
        began = time.monotonic()
        try:
            outcome = one.disturb(bench, run, moment)
        except MissedError as error:
            missed = error
            continue
        outcome.seconds = time.monotonic() - began
        return outcome
    raise AssertionError(f"missed {_ATTEMPTS} times: {missed}")
