"""Time limits as Slurm writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist import submit
from mvat_dist.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:01", 91), ("1:30:00", 90), ("2-12", 3600), ("2-12:30", 3630), ("1-00:00:01", 1441)],
)
def test_time_limits(text: str, expected: int) -> None:
    assert submit.minutes(text) == expected


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_a_time_limit_is_never_cut_short(days: int, hours: int, minutes: int, seconds: int) -> None:
    asked = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    given_seconds = 60 * submit.minutes(f"{days}-{hours:02}:{minutes:02}:{seconds:02}")
    assert asked <= given_seconds < asked + 60


@pytest.mark.parametrize("text", ["", "soon", "0", "0:00", "1:2:3:4", "-5", "1.5", "1-", "2h"])
def test_time_limits_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        submit.minutes(text)
