"""A student's history: one JSON object a line, each with its ``step``. W&B gets a copy of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvat_dist.io import write_text

logger = logging.getLogger(__name__)

Row = dict[str, Any]

APART = ("validation", "checkpoint")
"""Sections of a row's ``time`` that do not count for its speed: what is done between steps."""


class History:
    """The rows of one student, in the order of writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All rows, without a last line that a crash cut short; other damage is named in a warning."""
        content = self.path.read_bytes() if self.path.exists() else b""
        *lines, unfinished = content.decode("utf-8", errors="replace").split("\n")
        rows = self._parsed(lines)
        last = _parsed(unfinished)
        return rows if last is None else [*rows, last]

    def read_from(self, place: int) -> tuple[list[Row], int]:
        """The rows in complete lines from byte `place` on, and the byte after them."""
        with self.path.open("rb") as file:
            file.seek(place)
            complete, newline, _ = file.read().rpartition(b"\n")
        lines = complete.decode("utf-8", errors="replace").split("\n") if newline else []
        return self._parsed(lines), place + len(complete) + len(newline)

    def _parsed(self, lines: Sequence[str]) -> list[Row]:
        rows = []
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is None:
                logger.warning("%s, line %d is damaged and left out: %.60r", self.path, number, line)
            else:
                rows.append(row)
        return rows

    def rewind(self, step: int) -> None:
        """Forget rows after `step`: a resumed run writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_text(self.path, "".join(_line(row) for row in kept))

    def append(self, row: Row) -> None:
        """Write one row; what a kill of this process then leaves is whole."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def is_validation(row: Row) -> bool:
    """Whether a row holds scores of a validation; the others are of training."""
    return any(key.startswith("valid/") for key in row)


def _parsed(line: str) -> Row | None:
    """The row in one line, or None where the line holds none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _line(row: Row) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not know and strict readers refuse."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
