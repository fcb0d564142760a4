"""The demonstration fails where a student is no better than doing nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvat_dist import quickstart
from mvat_dist.errors import UserError
from tests.score_records import score, write_scores


def scores(folder: Path, noisy: float, student: float | None) -> Path:
    by_model = {"noisy": {"si_sdr": score(noisy)}, "a": {"si_sdr": score(student)}}
    write_scores(folder / "scores.json", {"test": by_model}, {"a": "0" * 64})
    return folder


@pytest.mark.parametrize("student", [1.99, 2.0, None])
def test_a_student_must_beat_the_noisy_input(tmp_path: Path, student: float | None) -> None:
    with pytest.raises(UserError, match="SI-SDR of a is not above"):
        quickstart._check(scores(tmp_path, 2.0, student), ["a"])


def test_a_better_student_passes(tmp_path: Path) -> None:
    quickstart._check(scores(tmp_path, 2.0, 2.01), ["a"])
