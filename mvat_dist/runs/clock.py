"""What time it is, as every record of the project writes it."""

from __future__ import annotations

import time


def now() -> str:
    """Local time with its offset from UTC: ``2026-11-22T20:15:00+0100``."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
