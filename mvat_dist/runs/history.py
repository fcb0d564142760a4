"""A student's record: one JSON object a line, each with its ``step``. It is the truth and needs nothing."""

from __future__ import annotations

import json
import logging
import math
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

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rows(self, size: int | None = None) -> list[Row]:
        """Every whole row, without a last line that a crash cut short; other damage is named in a warning.

        With `size`, those that were there when the history had so many bytes.
        """
        found = []
        content = self.path.read_bytes()[:size] if self.path.exists() else b""
        *lines, torn = content.decode("utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is None:
                logger.warning("%s, line %d is damaged and left out: %.60r", self.path, number, line)
            else:
                found.append(row)
        row = _parsed(torn)
        return found if row is None else [*found, row]

    def rewind(self, step: int) -> None:
        """Forget rows after `step`: a resumed run writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_text(self.path, "".join(_line(row) for row in kept))

    def append(self, row: Row) -> None:
        """Write one row; what a kill of this process then leaves is whole."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


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
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
