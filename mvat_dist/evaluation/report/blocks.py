"""What a report consists of. The page and its Markdown twin are written from the same blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mvat_dist.evaluation.report.charts import Chart

Mark = Literal["", "better", "worse"]
"""Whether a difference is clearly above or below 0."""

SYMBOL: dict[Mark, str] = {"": "", "better": "▲", "worse": "▼"}


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    """Of one or more lines."""
    note: str = ""
    """A smaller line below."""
    mark: Mark = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Missing:
    """What could not be shown, and why: one line in its place."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The first column names the rows."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A plot. Its numbers stand in a table nearby, which is what the Markdown twin shows."""

    caption: str
    chart: Chart


@dataclass(frozen=True)
class Figures:
    """Plots side by side where there is room."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Sound:
    """A player and a picture of what it plays."""

    label: str
    audio: bytes
    kind: str
    """MIME type."""
    picture: bytes
    """Spectrogram as PNG."""


@dataclass(frozen=True)
class Sounds:
    """One example as several networks hear it."""

    title: str
    sounds: Sequence[Sound]


@dataclass(frozen=True)
class Code:
    """Something to type."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Shown on demand."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A headline and what stands below it."""

    title: str
    blocks: Sequence[Block]


Block = Text | Missing | Items | Table | Figures | Sounds | Code | Fold | Section


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section] = field(default_factory=list)
