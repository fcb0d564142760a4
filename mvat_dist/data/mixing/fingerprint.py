"""What decides the segments of a stream or of a teacher cache, and whether two of them are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing import reverb

_NO_CHOICE = (
    "train", "valid", "mode", "workers", "variants", "on_damage", "max_damaged", "cache_dir", "cache_gb"
)  # fmt: skip
"""Fields of the configuration that `TrainingData.identity` leaves out or has in another form."""


def choices(config: DataConfig) -> dict[str, Any]:
    """What `config` says of making segments, as plain values, equal to themselves after JSON."""
    said = {name: value for name, value in asdict(config).items() if name not in _NO_CHOICE}
    if config.made_up_rooms:
        said["rooms_version"] = reverb.VERSION
    plain: dict[str, Any] = json.loads(json.dumps(said))
    return plain


def with_newer_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved `TrainingData.identity` as this version would have written it.

    Fields of the configuration that did not exist yet get their defaults, which always are what was done
    before there was a choice.
    """
    if not isinstance(saved.get("choices"), dict):
        return saved
    return saved | {"choices": choices(DataConfig()) | saved["choices"]}


def differences(before: Any, here: Any, name: str = "") -> Iterator[str]:
    """``name before, not here`` for every value in which two descriptions differ."""
    if isinstance(before, dict) and isinstance(here, dict):
        for key in sorted(before.keys() | here.keys()):
            yield from differences(before.get(key), here.get(key), key)
    elif before != here:
        yield "another corpus" if name == "corpus" else f"{name} {json.dumps(before)}, not {json.dumps(here)}"
