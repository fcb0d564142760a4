"""The command of a trial refuses to run outside of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvat_dist import trial
from mvat_dist.errors import UserError
from mvat_dist.launch import trials

FIXED = ["--config=configs/distil.yaml", "--distil.method=none", "--student=manner-s-0.6gf"]


def test_a_trial_alone_ends_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in trials.AGENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no trial of a sweep"):
        trial.main(FIXED)
    with pytest.raises(UserError, match="--processes 0"):
        trial.main(["--processes=0", *FIXED])


def test_logs_of_ranks_have_a_path_that_slurm_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_allocation", lambda: "7")
    for name in ("a%j", "a\\b", "a\nb", "a\0b"):
        with pytest.raises(UserError, match="Slurm cannot write to"):
            trial._command([], Path(name), 1)
