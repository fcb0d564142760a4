"""Waiting for a condition, with a deadline that fails the test."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    true: Callable[[], bool],
    seconds: float,
    what: str | Callable[[], str] = "it did not happen",
    pause: float = 0.02,
) -> float:
    """Wait until something is true; how long that took, in seconds.

    `what` says what did not come true, or how things stand then.
    """
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(pause)
    return time.monotonic() - began
