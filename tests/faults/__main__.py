"""Run the fault matrix and write its table: ``python -m tests.faults [--only WORDS] [--write FILE]``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults import cluster, local  # noqa: F401, both register their faults
from tests.faults.group import Bench
from tests.faults.matrix import FAULTS, CannotError, Fault, Moment, run_cell

BEGIN, END = "<!-- make faults: begin -->", "<!-- make faults: end -->"

Cells = dict[str, dict[str, Any]]
"""What came of each cell, by `key`; JSON values."""


def key(one: Fault, moment: Moment) -> str:
    return f"{one.name}, {moment.words}"


def attempt(one: Fault, moment: Moment, bench: Bench) -> dict[str, Any]:
    """Make a cell; its outcome, or in words why there is none."""
    found: dict[str, Any] = {"date": f"{datetime.date.today()}"}
    try:
        outcome = run_cell(one, moment, bench)
    except CannotError as error:
        return {**found, "words": f"not made: {error}"}
    except AssertionError as error:
        print(f"{key(one, moment)}: {error}", file=sys.stderr, flush=True)
        return {**found, "words": "**BROKEN**", "broken": True}
    return {**found, "words": outcome.words, "seconds": outcome.seconds, "figures": outcome.figures}


def table(cells: Cells) -> str:
    """Markdown: a row per fault, and what was measured, over all cells."""
    lines = [
        f"| fault | {' | '.join(moment.words for moment in Moment)} |",
        f"|---|{'---|' * len(Moment)}",
    ]
    for one in FAULTS:
        found = [cells.get(key(one, moment)) for moment in Moment]
        if any(found):
            lines.append(f"| {one.name} | {' | '.join(map(_words, found))} |")
    figures: dict[str, list[float]] = {}
    for cell in cells.values():
        for name, value in cell.get("figures", {}).items():
            figures.setdefault(name, []).append(value)
    lines += ["", "| measured | least | most | cells |", "|---|---|---|---|"]
    lines += [f"| {name} | {min(v):.1f} | {max(v):.1f} | {len(v)} |" for name, v in sorted(figures.items())]
    return "\n".join(lines)


def _words(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    return f"{cell['words']} ({cell['seconds']:.0f} s)" if "seconds" in cell else str(cell["words"])


def write(file: Path, cells: Cells) -> None:
    """Replace what stands between the markers; cells that were made before are in the JSON file beside it."""
    record = file.with_suffix(".json")
    known: Cells = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    known |= cells
    record.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    dates = sorted(cell["date"] for cell in known.values())
    between = f"{dates[0]} to {dates[-1]}" if dates[0] != dates[-1] else dates[0]
    head, rest = file.read_text(encoding="utf-8").split(BEGIN)
    made = f"{len(known)} cells, {between}, {os.cpu_count()} cores.\n\n{table(known)}"
    file.write_text(f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    """Exit code 1 where a cell broke the law."""
    given = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    given.add_argument("--only", default="", help="rows whose name holds these words")
    given.add_argument("--moment", default="", help="columns whose name holds these words")
    given.add_argument("--local", action="store_true", help="leave out the rows that need Slurm")
    given.add_argument("--write", type=Path, help="the file whose table gets the cells that were made")
    options = given.parse_args()
    chosen = [
        (one, moment)
        for one in FAULTS
        for moment in Moment
        if options.only in one.name and options.moment in moment.words and not (one.slurm and options.local)
    ]
    folder = Path(tempfile.mkdtemp(prefix="mvat faults "))
    bench = Bench(folder)
    began = time.monotonic()
    bench.undisturbed.read_status()  # trains it
    print(f"{time.monotonic() - began:.0f} s: the undisturbed run; all runs in {folder}", flush=True)
    cells: Cells = {}
    for cell in chosen:
        cells[key(*cell)] = attempt(*cell, bench)
        print(f"{key(*cell)}: {_words(cells[key(*cell)])}", flush=True)
        if options.write:
            write(options.write, {key(*cell): cells[key(*cell)]})
    print("", table(cells), sep="\n")
    if broken := [name for name, cell in cells.items() if cell.get("broken")]:
        print(f"broken: {'; '.join(broken)}; their runs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
