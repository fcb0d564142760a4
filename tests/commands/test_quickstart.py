"""The demonstration fails where a student is no better than doing nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvat_dist import quickstart
from mvat_dist.errors import UserError


def scores(folder: Path, noisy: float, student: float | None) -> Path:
    by_model = {"noisy": {"si_sdr": {"mean": noisy}}, "a": {"si_sdr": {"mean": student}}}
    record = {"sections": {"test": {"scores": by_model}}, "networks": {"a": {"step": 7}}}
    (folder / "scores.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("student", [1.99, 2.0, None])
def test_a_student_must_beat_the_noisy_input(tmp_path: Path, student: float | None) -> None:
    with pytest.raises(UserError, match="SI-SDR of a is not above"):
        quickstart._check(scores(tmp_path, 2.0, student), ["a"])


def test_a_better_student_passes(tmp_path: Path) -> None:
    quickstart._check(scores(tmp_path, 2.0, 2.01), ["a"])
