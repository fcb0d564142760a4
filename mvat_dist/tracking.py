"""The record of a run: one JSONL history per student, mirrored to Weights & Biases.

The JSONL file is the truth and needs nothing. W&B is offline unless the user has an account, and
training never waits for it.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from mvat_dist.config import TrackConfig
from mvat_dist.files import write_text

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline"]

_CONNECT_SECONDS = 10
_FINISH_SECONDS = 60


class History:
    """A student's record: one JSON object a line, each with its `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row; a last line that a crash cut short is left out."""
        found = []
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def rewind(self, step: int) -> None:
        """Forget rows after `step`: a resumed run writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Tracker:
    """Writes the histories of a fleet; made on rank 0 only."""

    def __init__(self, folder: Path, histories: dict[str, Path]) -> None:
        self._histories = {name: History(path) for name, path in histories.items()}
        self._runs: dict[str, Any] = {}
        self._folder = folder

    def rewind(self, step: int) -> None:
        """Start or go on from `step`: later rows are forgotten."""
        for history in self._histories.values():
            history.rewind(step)

    def connect(self, config: TrackConfig, run_config: dict[str, Any]) -> None:
        """Open one W&B run per student, grouped by fleet; on any trouble go on without."""
        if config.wandb == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
            return
        try:
            mode = _mode(config)
            for name in self._histories:
                self._runs[name] = self._open(name, mode, config, run_config)
                if self._runs[name].offline:
                    mode = "offline"  # one failed attempt is enough for the fleet
        except Exception as error:
            logger.warning("no W&B: %s (the record in %s is complete without it)", error, self._folder)

    def _open(self, name: str, mode: Mode, config: TrackConfig, run_config: dict[str, Any]) -> Any:
        import wandb

        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        options: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity or None,
            "group": self._folder.name,
            "name": f"{self._folder.name}/{name}",
            "id": re.sub(r"[^A-Za-z0-9_-]", "-", f"{self._folder.name}-{name}"),
            "resume": "allow",
            "dir": str(self._folder),
            "config": {**run_config, "student_name": name},
            "reinit": "create_new",
        }
        settings = wandb.Settings(
            init_timeout=_CONNECT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            x_transaction_log_flush_interval=2,
            console="off",
            silent=True,
        )
        try:
            run = wandb.init(**options, mode=mode, settings=settings)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            logger.warning("W&B cannot be reached (%s): offline; `wandb sync` sends it later", error)
            wandb.teardown()  # without this the run's id counts as taken
            run = wandb.init(**options, mode="offline", settings=settings)
        # After a requeue W&B's own step no longer counts optimiser steps; ours does.
        run.define_metric("*", step_metric="step")
        return run

    def log(self, name: str, step: int, **row: Any) -> None:
        """Append one row to a student's record."""
        row = {"step": step, **row}
        self._histories[name].append(row)
        if name in self._runs:
            self._runs[name].log(row)

    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B runs; give up after a minute rather than hold an allocation."""
        for run in self._runs.values():
            _with_deadline(partial(run.finish, exit_code=exit_code), _FINISH_SECONDS)


def _mode(config: TrackConfig) -> Mode:
    """The user's word, then WANDB_MODE, then online where there are credentials, else offline."""
    if config.wandb in get_args(Mode):
        return cast(Mode, config.wandb)
    if (chosen := os.environ.get("WANDB_MODE")) in get_args(Mode):
        return cast(Mode, chosen)
    return "online" if _has_credentials() else "offline"


def _has_credentials() -> bool:
    """Whether `wandb login` or WANDB_API_KEY has left a key for the server in use."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _with_deadline(action: Callable[[], None], seconds: float) -> None:
    """Run `action`, but wait for it no longer than `seconds`."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
