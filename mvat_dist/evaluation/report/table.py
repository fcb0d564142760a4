"""The tables of a report; what stands in their cells is written by `mvat_dist.evaluation.table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mvat_dist.evaluation.report.scores import Clip, Estimate, System, TestSet
from mvat_dist.evaluation.table import MISSING, difference_text, score_text

Mark = Literal["", "better", "worse"]
"""Whether a difference is clearly above or below 0."""

SYMBOLS: dict[Mark, str] = {"": "", "better": "▲", "worse": "▼"}

_NARROW = 28
"""Letters of a cell that stay on one line: a mean and its interval."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    """Of one or more lines."""
    note: str = ""
    """A smaller line below."""
    mark: Mark = ""

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.mark]

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @property
    def narrow(self) -> bool:
        return len(self.text) <= _NARROW or "\n" in self.text


@dataclass(frozen=True)
class Table:
    """The first column names the rows."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def mark(difference: Estimate | None) -> Mark:
    """Whether a difference is clearly above or below 0."""
    if difference is None or not difference.sign:
        return ""
    return "better" if difference.sign > 0 else "worse"


def difference_cell(difference: Estimate | None, metric: str) -> Cell:
    return Cell(difference_text(difference, metric) if difference else MISSING, mark=mark(difference))


def score_cell(test: TestSet, system: System, metric: str, among: frozenset[Clip] | None = None) -> Cell:
    """A mean over all clips or those of a bucket, and below it how many clips it lacks."""
    return Cell(
        score_text(test.estimate(system, metric, among), metric), unscored(test, system, metric, among)
    )


def unscored(test: TestSet, system: System, metric: str, among: frozenset[Clip] | None = None) -> str:
    """How many clips a mean lacks, in words; empty where it lacks none."""
    missing = test.unscored(system, metric, among)
    of_seeds = " of every seed" if len(test.seeds(system)) > 1 else ""
    return f"{missing} clips without a score{of_seeds}" if missing else ""
