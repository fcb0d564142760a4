"""What W&B gets of the rows of a history, and how far it has come with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvat_dist.runs.history import Row

STEP, VALIDATED = "global_step", "valid/step"
_SOUND = ".flac"


@dataclass(frozen=True)
class Extras:
    """What W&B gets with a row besides its numbers."""

    files: dict[str, Path] = field(default_factory=dict)
    """Sounds and pictures by name."""
    captions: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    """Rows with equal keys, by the table's name."""


@dataclass
class Mark:
    """How far W&B's copy of a history has come."""

    step: int = -1
    validated: int = -1

    def passes(self, row: Row) -> bool:
        """Whether `row` is new; from then on it is not."""
        before = self.validated if _is_validation(row) else self.step
        if row["step"] <= before:
            return False
        if _is_validation(row):
            self.validated = row["step"]
        self.step = max(self.step, row["step"])
        return True


def _is_validation(row: Row) -> bool:
    return any(key.startswith("valid/") for key in row)


def copy_of(row: Row) -> Row:
    """A row as W&B gets it: flat, and with its step under a name that W&B leaves alone."""
    flat = {STEP: row["step"], **_flat({key: row[key] for key in row if key != "step"})}
    return {**flat, VALIDATED: row["step"]} if _is_validation(row) else flat


def _flat(row: Row, prefix: str = "") -> Row:
    found: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            found[prefix + key] = value
    return found


def media(extras: Extras) -> dict[str, Any]:
    """`extras` as values of W&B's kinds."""
    import wandb

    made: dict[str, Any] = {}
    for name, file in extras.files.items():
        kind = wandb.Audio if file.suffix == _SOUND else wandb.Image
        made[name] = kind(str(file), caption=extras.captions.get(name))
    for name, rows in extras.tables.items():
        made[name] = wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
    return made
