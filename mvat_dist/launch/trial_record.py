"""What an agent says of a trial, and what the trial writes down: its parameters, its folder, its end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mvat_dist.errors import UserError
from mvat_dist.io import make_folder, read_json, write_json, write_text

RECORD = "MVAT_TRIAL_RECORD"
"""Environment variable: the file into which a trial writes itself; none where it is not set."""

VARIABLES = (
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_RUN_GROUP",
    "WANDB_ENTITY",
    "WANDB_PROJECT",
    "WANDB_DIR",
)
"""By these an agent tells a trial who it is."""


@dataclass(frozen=True)
class TrialRecord:
    """Enough to find a trial's scores, and to start it again without asking an agent."""

    run: str
    """Folder of its run."""
    student: str
    """Whose scores count."""
    argv: list[str]
    """Arguments of `mvat_dist.trial`."""
    environment: dict[str, str]
    """`VARIABLES`."""
    exit_code: int | None = None
    """None while it runs, and where it was killed."""


def write(record: TrialRecord) -> None:
    """Write the record to where `RECORD` says."""
    if file := os.environ.get(RECORD):
        make_folder(Path(file).parent)
        write_json(Path(file), asdict(record))


def read(file: Path) -> TrialRecord | None:
    """The record in `file`, or None where there is none yet."""
    return TrialRecord(**read_json(file)) if file.exists() else None


def read_parameters(file: Path) -> dict[str, Any]:
    """Values by name, from the file that W&B's agent writes for a trial.

    Raises:
        UserError: it is missing or not of that form.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {name: one["value"] for name, one in content.items() if name != "wandb_version"}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"the parameters of this trial cannot be read from {file}: {error!r}") from error


def write_parameters(file: Path, parameters: Mapping[str, Any]) -> None:
    """The same file as W&B's agent writes."""
    content = {"wandb_version": 1, **{name: {"value": value} for name, value in parameters.items()}}
    make_folder(file.parent)
    write_text(file, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
