"""The results table: digits, the best of a column, failures, and what a test set's record holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvat_dist.errors import UserError
from mvat_dist.evaluation import table
from mvat_dist.evaluation.real_time_factor import Cost
from mvat_dist.evaluation.score_record import Scores
from mvat_dist.evaluation.statistics import Statistics
from mvat_dist.io import read_record, write_json
from tests.score_records import score, write_scores

MINUS = "\N{MINUS SIGN}"


def cells(markdown: str) -> list[list[str]]:
    """The rows of a table, without its headings."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()[2:]]


def test_the_best_of_a_column_is_bold_whichever_way_is_better() -> None:
    costs = {"small": Cost(1_000_000, 2.0, 0.5), "large": Cost(4_000_000, 8.0, 0.25)}
    scores = {
        "noisy": {"stoi": score(0.7), "si_sdr": score(-2.5, 0.25)},
        "small": {"stoi": score(0.8), "si_sdr": score(None)},
        "large": {"stoi": score(0.8), "si_sdr": score(3.0, 0.25)},
    }
    assert cells(table.score_table(scores, costs=costs)) == [
        ["noisy", "0.700", f"{MINUS}2.50 [{MINUS}2.75, {MINUS}2.25]", "-", "-", "-"],
        ["small", "**0.800**", "-", "**1.00**", "**2.00**", "0.500"],
        ["large", "**0.800**", "**3.00** [2.75, 3.25]", "4.00", "8.00", "**0.250**"],
    ]


def test_nothing_is_the_best_of_one() -> None:
    assert cells(table.score_table({"small": {"stoi": score(0.8)}})) == [["small", "0.800"]]


def test_clips_without_a_score_are_counted_and_their_reasons_listed() -> None:
    failed = Statistics(0.8, None, None, 1, {"silent reference": 2})
    scores = {name: {"stoi": failed, "estoi": failed} for name in ("noisy", "small")}
    assert cells(table.score_table(scores))[1] == ["small", "0.800 n=1", "0.800 n=1"]
    assert [*table.failures(scores, 3)] == [
        "- silent reference: 2 of 3 clips without STOI, ESTOI of noisy, small"
    ]


def test_a_record_is_read_as_written_and_one_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    write_scores(file, {"test": {"small": {"stoi": score(0.8, 0.1)}}}, {"small": "0" * 64})
    record = read_record(file, Scores)
    assert record.sections["test"].scores["small"]["stoi"] == score(0.8, 0.1)
    write_json(file, {"format": "mvat_dist.scores.1", "sections": {}})
    with pytest.raises(UserError, match=r"scores\.json has the format 'mvat_dist\.scores\.1'"):
        read_record(file, Scores)
