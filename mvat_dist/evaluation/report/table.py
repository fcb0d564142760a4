"""The tables of a report, and how scores and differences are written in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report.scores import Clip, Estimate, System, TestSet

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


def label(metric: str) -> str:
    """``PESQ-WB (MOS) ↑``."""
    known = METRICS[metric]
    return known.label + (f" ({known.unit})" if known.unit else "") + " ↑"


def shown(estimate: Estimate | None, metric: str) -> str:
    """A score and its interval: ``2.31 [2.25, 2.37]``."""
    if estimate is None:
        return "-"
    digits = METRICS[metric].decimals
    text = f"{estimate.mean:.{digits}f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return _minus(text)


def change(value: float, metric: str) -> str:
    """A difference, with one more digit than a score: ``+0.083``, ``−0.004``."""
    return _minus(f"{value:+.{METRICS[metric].decimals + 1}f}")


def signed(difference: Estimate, metric: str) -> str:
    """A difference and its interval: ``+0.083 [+0.031, +0.135]``."""
    text = change(difference.mean, metric)
    if difference.low is not None and difference.high is not None:
        text += f" [{change(difference.low, metric)}, {change(difference.high, metric)}]"
    return text


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def mark(difference: Estimate | None) -> Mark:
    """Whether a difference is clearly above or below 0."""
    if difference is None or not difference.sign:
        return ""
    return "better" if difference.sign > 0 else "worse"


def difference_cell(difference: Estimate | None, metric: str) -> Cell:
    return Cell(signed(difference, metric) if difference else "-", mark=mark(difference))


def score_cell(test: TestSet, system: System, metric: str, among: frozenset[Clip] | None = None) -> Cell:
    """A mean over all clips or those of a bucket, and below it how many clips it lacks."""
    return Cell(shown(test.estimate(system, metric, among), metric), unscored(test, system, metric, among))


def unscored(test: TestSet, system: System, metric: str, among: frozenset[Clip] | None = None) -> str:
    """How many clips a mean lacks, in words; empty where it lacks none."""
    missing = test.unscored(system, metric, among)
    of_seeds = " of every seed" if len(test.seeds(system)) > 1 else ""
    return f"{missing} clips without a score{of_seeds}" if missing else ""
