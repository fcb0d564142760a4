"""The command of a trial refuses to run outside of a sweep."""

from __future__ import annotations

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
