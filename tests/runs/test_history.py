"""A history is read whole, whatever a crash has left of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mvat_dist.runs.history import History


def test_rewind_forgets_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in range(1, 6):
        history.append({"step": step, "loss": 1.0 / step})
    with history.path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    history.rewind(3)
    history.append({"step": 4, "loss": 9.0})
    assert [row["step"] for row in history.rows()] == [1, 2, 3, 4]
    assert history.rows()[-1]["loss"] == 9.0


def test_damage_in_the_middle_costs_the_damaged_lines_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = History(tmp_path / "history.jsonl")
    whole = [json.dumps({"step": step}) for step in range(1, 6)]
    # What file systems leave after a power cut: a half row, zeros, a scalar; and a torn last line.
    lines = [whole[0], '{"step": 9, "lo', whole[1], "\0" * 20, "17", "\udcff", *whole[2:]]
    history.path.write_text("\n".join(lines) + '\n{"step": 6', errors="surrogateescape")
    history.rewind(4)
    assert [row["step"] for row in history.rows()] == [1, 2, 3, 4]
    assert [record.args[1] for record in caplog.records if isinstance(record.args, tuple)] == [2, 4, 5, 6]
    assert str(history.path) in caplog.text


def test_a_strict_reader_takes_a_record_with_nan(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    history = History(tmp_path / "history.jsonl")
    history.path.write_text('{"step": 1, "loss": NaN}\n')  # as older versions wrote it
    history.append({"step": 2, "loss": math.inf, "time": {"data": -math.inf, "step": 0.5}})
    history.rewind(2)
    rows = [json.loads(line, parse_constant=refuse) for line in history.path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "time": {"data": None, "step": 0.5}},
    ]


def test_a_follower_reads_complete_lines_and_each_of_them_once(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.rewind(0)
    assert history.read_from(0) == ([], 0)
    history.append({"step": 1})
    with history.path.open("a") as file:
        file.write('{"step": 2, "lo')
    rows, place = history.read_from(0)
    assert (rows, history.read_from(place)) == ([{"step": 1}], ([], place))
    with history.path.open("a") as file:
        file.write('ss": 0.5}\n{"step": 3}\n')
    rows, place = history.read_from(place)
    assert rows == [{"step": 2, "loss": 0.5}, {"step": 3}]
    assert place == history.path.stat().st_size
