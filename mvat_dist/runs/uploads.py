"""What a training and `python -m mvat_dist.sync` have to know of W&B: its mode, and how to hand over files.

Numbers go to W&B by the histories alone. Sounds, pictures, tables and weights wait for the uploader process
(`mvat_dist.runs.uploader`) in ``students/NAME/uploads``. Nothing here imports wandb or waits for it.
"""

from __future__ import annotations

import logging
import netrc
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE, TrackConfig
from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.io import atomic_directory, write_record
from mvat_dist.runs.history import Row

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

UPLOAD_SECONDS = 40
"""What W&B gets for the last uploads of a run that has ended."""
PATIENT_SECONDS = 600
"""The same where somebody waits for it."""
STOPPED_BY_SLURM = {128 + signal.SIGTERM, 128 + signal.SIGUSR2}
RECORD = "record.json"
"""Names what lies beside it: `Attachment` or `BestWeights`."""

_MOST_ATTACHMENTS = 50
"""Attachments of one student that may wait: more are left out, so that a hung W&B fills no disk."""
_MOST_WEIGHTS = 3
"""Best weights of one student that may wait: of more, the oldest go."""

_MODES: dict[str, Mode] = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}
"""W&B's words, old ones too."""


@dataclass
class Attachment:
    """What W&B gets with a student's row of validation besides its numbers."""

    step: int
    files: dict[str, str] = field(default_factory=dict)
    """Sounds and pictures: name at W&B -> path; in a stored record the name of the copy beside it."""
    captions: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    """Rows with equal keys, by the table's name."""


@dataclass
class BestWeights:
    """A student's weights that W&B gets as a version of an artifact."""

    step: int
    file: str
    """The name of the copy beside the record."""
    about: dict[str, Any]
    """Metadata of the artifact."""


def mode(config: TrackConfig) -> Mode:
    """What `config` asks for; for ``auto`` WANDB_MODE, else online where there are credentials, else offline.

    Raises:
        UserError: WANDB_MODE decides, and is no mode of W&B.
    """
    chosen = os.environ.get("WANDB_MODE") if config.wandb == "auto" else config.wandb
    if not chosen:
        return "online" if has_credentials() else "offline"
    if chosen not in _MODES:
        raise UserError(f"WANDB_MODE is {chosen!r}: set it to online, offline or disabled, or unset it")
    return _MODES[chosen]


def has_credentials() -> bool:
    """Whether `wandb login` or WANDB_API_KEY has left a key for the server in use."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc().authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # no such file, or a damaged one
        return False


def cost(size: Size) -> dict[str, float]:
    """What W&B shows of a student's cost: parameters in millions, and 10^9 multiply-accumulates for 4 s."""
    macs = sizes.macs(size, round(sizes.COST_SECONDS * SAMPLE_RATE))
    return {"parameters_m": sizes.parameters(size) / 1e6, "gmac_4s": macs / 1e9}


def uploader_command(run: Path) -> list[str]:
    """The command that starts the uploader process of a run."""
    return [sys.executable, "-m", "mvat_dist.runs.uploader", str(run)]


def advice(run: Path) -> str:
    """What to tell the user where W&B lacks rows."""
    return (
        f"Nothing is lost: {run}/students/*/history.jsonl is complete, and the next start sends what is "
        f"missing, or `python -m mvat_dist.sync {shlex.quote(str(run))}`"
    )


def attachment_folder(student: Path, step: int) -> Path:
    """Where the attachment of a student's row of `step` waits."""
    return student / "uploads" / f"step-{step:08d}"


def weights_folders(student: Path) -> list[Path]:
    """Where best weights of a student wait, the oldest first."""
    return sorted((student / "uploads").glob("best-*"))


def attach(student: Path, attachment: Attachment) -> None:
    """Keep an attachment, as its files are now, until its row is sent: called before the row is written."""
    target = attachment_folder(student, attachment.step)
    _make_uploads(student)
    if sum(1 for _ in target.parent.glob("step-*")) >= _MOST_ATTACHMENTS:
        _warn_left_out(student, "the sounds, pictures and tables of later validations")
        return
    with atomic_directory(target) as folder:
        copies: dict[str, str] = {}
        for number, (name, file) in enumerate(attachment.files.items()):
            copies[name] = f"{number:03d}{Path(file).suffix}"
            _keep(Path(file), folder / copies[name])
        stored = Attachment(attachment.step, copies, attachment.captions, attachment.tables)
        write_record(folder / RECORD, stored)


def attach_weights(student: Path, file: Path, step: int, about: Mapping[str, Any]) -> None:
    """Keep a student's best weights, as they are now, until they are sent or newer ones have come."""
    _make_uploads(student)
    with atomic_directory(student / "uploads" / f"best-{step:08d}") as folder:
        _keep(file, folder / file.name)
        write_record(folder / RECORD, BestWeights(step, file.name, dict(about)))
    for old in weights_folders(student)[:-_MOST_WEIGHTS]:
        _warn_left_out(student, "best weights that newer ones have replaced")
        shutil.rmtree(old, ignore_errors=True)


def _make_uploads(student: Path) -> None:
    # Without parents: a run's folder that was removed does not come back.
    (student / "uploads").mkdir(exist_ok=True)


@cache
def _warn_left_out(student: Path, what: str) -> None:
    """Warn once per student that W&B will lack something."""
    logger.warning("W&B is too slow: too many uploads wait in %s; it will lack %s", student / "uploads", what)


def _keep(file: Path, copy: Path) -> None:
    """Have `copy` hold what `file` holds now: a run's files are replaced, never changed in place."""
    try:
        copy.hardlink_to(file)
    except OSError:  # a file system without links
        shutil.copyfile(file, copy)
