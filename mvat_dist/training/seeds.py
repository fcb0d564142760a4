"""Independent streams of random numbers from one seed and a name."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every one of `names`, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
