"""Compare what two things say of themselves: streams of data, teacher caches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def differences(before: Any, here: Any, name: str = "") -> Iterator[str]:
    """``name before, not here`` for every value in which two descriptions differ."""
    if isinstance(before, dict) and isinstance(here, dict):
        for key in sorted(before.keys() | here.keys()):
            yield from differences(before.get(key), here.get(key), key)
    elif before != here:
        yield "another corpus" if name == "corpus" else f"{name} {json.dumps(before)}, not {json.dumps(here)}"
