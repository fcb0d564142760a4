"""Fingerprints of training segments: whether two streams, or a stream and a teacher cache, are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing import reverb

_LEFT_OUT = (
    "train", "valid", "mode", "workers", "variants", "on_bad_sample", "max_bad_samples", "cache_dir",
    "cache_gb",
)  # fmt: skip
"""Options that decide no sample, or that `TrainingData.fingerprint` has in another form."""


def choices(config: DataConfig) -> dict[str, Any]:
    """The options that decide how segments are made, as plain values, equal to themselves after JSON."""
    options = {name: value for name, value in asdict(config).items() if name not in _LEFT_OUT}
    if config.synthetic_rooms:
        options["rooms_version"] = reverb.VERSION
    plain: dict[str, Any] = json.loads(json.dumps(options))
    return plain


def with_newer_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved `TrainingData.fingerprint` as this version would have written it.

    Options that did not exist yet get their defaults, which always are what was done before there was a
    choice.
    """
    if not isinstance(saved.get("choices"), dict):
        return saved
    return saved | {"choices": choices(DataConfig()) | saved["choices"]}


def differences(saved: Any, current: Any, name: str = "") -> Iterator[str]:
    """``name saved, not current`` for every value in which two fingerprints differ."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            yield from differences(saved.get(key), current.get(key), key)
    elif saved != current:
        yield (
            "another corpus" if name == "corpus" else f"{name} {json.dumps(saved)}, not {json.dumps(current)}"
        )
