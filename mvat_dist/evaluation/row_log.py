"""The rows of an evaluation while it is under way: written as they are scored, by several processes.

    OUT/rows-FINGERPRINT/00000.jsonl ...    one file per rank, a row a line
    OUT/rows.jsonl                          all of them in order, once they are complete

The fingerprint is that of everything that decides a score. Rows of other weights, clips or metrics lie
in a folder of another name, so none is ever taken for one of these.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvat_dist.errors import UserError
from mvat_dist.io import make_folder, only_writer, write_text

Row = dict[str, Any]

_NAME_DIGITS = 16


class RowLog:
    """The rows of one fingerprint below one folder."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self._out = out
        self.folder = out / f"rows-{fingerprint[:_NAME_DIGITS]}"

    @contextmanager
    def appending(self, rank: int) -> Iterator[Callable[[Row], None]]:
        """A function that writes one row to the file of `rank`; what a kill then leaves is whole.

        Raises:
            UserError: another process writes that file.
            OSError: a place that cannot be written.
        """
        make_folder(self.folder)
        path = self.folder / f"{rank:05d}.jsonl"
        with path.open("ab") as file, only_writer(path, f"scoring into {self._out}"):
            whole = path.read_bytes().rfind(b"\n") + 1
            file.truncate(whole)  # a kill in the middle of a line

            def append(row: Row) -> None:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()

            yield append

    def rows(self) -> list[Row]:
        """Every whole row of every rank, in no order."""
        return [row for path in sorted(self.folder.glob("*.jsonl")) for row in _whole(path)]

    def finished_rows(self) -> list[Row]:
        """The rows of ``rows.jsonl``, of whatever fingerprint they are."""
        path = self._out / "rows.jsonl"
        return _whole(path) if path.is_file() else []

    def finish(self, rows: list[Row]) -> None:
        """Write the complete `rows` in their order to ``rows.jsonl``."""
        write_text(self._out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def clear(self) -> None:
        """Remove what the ranks have written, and what evaluations of other fingerprints have left.

        What another process is writing just now stays.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        for left in self._out.glob("rows-" + _NAME_DIGITS * "[0-9a-f]"):
            if not any(map(_is_written, left.glob("*.jsonl"))):
                shutil.rmtree(left, ignore_errors=True)


def _is_written(path: Path) -> bool:
    try:
        with only_writer(path, "scoring"):
            return False
    except (UserError, OSError):
        return True


def _whole(path: Path) -> list[Row]:
    """The rows of a file, without a last one that has no end: a kill has torn it."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
