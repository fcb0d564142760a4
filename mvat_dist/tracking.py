"""The record of a run: one JSONL history per student, mirrored to Weights & Biases.

The JSONL file is the truth and needs nothing. W&B is offline unless the user has an account, training
never waits for it, and nothing that goes wrong in it comes out of `Tracker`. Things do go wrong there:
Slurm signals all processes of a job, and W&B's service, a child of ours, ends on SIGTERM and SIGINT
even where it inherits them blocked or ignored (measured with 0.31).
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from mvat_dist.config import TrackConfig
from mvat_dist.files import write_text

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline"]

_CONNECT_SECONDS = 10
# At the end: what W&B gets for uploads, what we wait for all runs together, and for the service's end.
_UPLOAD_SECONDS = 40
_FINISH_SECONDS = 50
_TEARDOWN_SECONDS = 10

_STOPPED_BY_SLURM = {128 + signal.SIGTERM, 128 + signal.SIGUSR2}


class History:
    """A student's record: one JSON object a line, each with its `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row, without a last line that a crash cut short; other damage is named in a warning."""
        found = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        *lines, torn = text.split("\n")
        for number, line in enumerate(lines, start=1):
            row = _parsed(line)
            if row is None:
                logger.warning("%s, line %d is damaged and left out: %.60r", self.path, number, line)
            else:
                found.append(row)
        row = _parsed(torn)
        return found if row is None else [*found, row]

    def rewind(self, step: int) -> None:
        """Forget rows after `step`: a resumed run writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_text(self.path, "".join(_line(row) for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def _parsed(line: str) -> dict[str, Any] | None:
    """The row in one line, or None where the line holds none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not know and strict readers refuse."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tracker:
    """Writes the histories of a fleet; made on rank 0 only."""

    def __init__(self, folder: Path, histories: dict[str, Path]) -> None:
        self._histories = {name: History(path) for name, path in histories.items()}
        self._runs: dict[str, Any] = {}
        self._folder = folder
        self._service_started = False

    def rewind(self, steps: Mapping[str, int]) -> None:
        """Start or go on from each student's step: later rows are forgotten."""
        for name, history in self._histories.items():
            history.rewind(steps[name])

    def connect(self, config: TrackConfig, run_config: dict[str, Any]) -> None:
        """Open one W&B run per student, grouped by fleet; on any trouble go on without."""
        if config.wandb == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
            return
        self._service_started = True
        mode = _mode(config)
        for name in self._histories:
            try:
                self._runs[name] = run = self._open(name, mode, config, run_config)
            except Exception as error:
                self._give_up(name, error)
            else:
                mode = "offline" if run.offline else mode  # one failed attempt is enough for the fleet

    def _open(self, name: str, mode: Mode, config: TrackConfig, run_config: dict[str, Any]) -> Any:
        import wandb

        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        options: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity or None,
            "group": self._folder.name,
            "name": f"{self._folder.name}/{name}",
            "id": self._run_id(name),
            "resume": "allow",
            "dir": str(self._folder),
            "config": {**run_config, "student_name": name},
            "reinit": "create_new",
        }
        settings = wandb.Settings(
            init_timeout=_CONNECT_SECONDS,
            finish_timeout=_UPLOAD_SECONDS,
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
            _teardown()  # without this the run's id counts as taken
            run = wandb.init(**options, mode="offline", settings=settings)
        # After a requeue W&B's own step no longer counts optimiser steps; ours does.
        run.define_metric("*", step_metric="step")
        return run

    def log(self, name: str, step: int, **row: Any) -> None:
        """Append one row to a student's record."""
        row = {"step": step, **row}
        self._histories[name].append(row)
        if name in self._runs:
            self._tell(name, partial(self._runs[name].log, row))

    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B runs; give up after a minute in all rather than hold an allocation.

        Runs that Slurm stopped are marked as preempted: a sweep takes them for failed otherwise.
        """
        if not self._service_started:
            return
        closing = [
            partial(self._tell, name, partial(_close, run, exit_code)) for name, run in self._runs.items()
        ]
        _in_parallel(closing, _FINISH_SECONDS)
        # Else the SDK does it when the interpreter exits: without limit, and with a traceback after a crash.
        _in_parallel([_teardown], _TEARDOWN_SECONDS)

    def _tell(self, name: str, action: Callable[[], object]) -> None:
        """Do something with the W&B run of `name`; on any trouble go on without that run."""
        try:
            action()
        except Exception as error:
            del self._runs[name]
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        logger.warning(
            "no more W&B for %s: %r. Nothing is lost, %s is complete; what W&B has got so far can be sent "
            "by `wandb sync --yes --include-online %s/wandb/*run-*`",
            name,
            error,
            self._histories[name].path,
            self._folder,
        )

    def _run_id(self, name: str) -> str:
        """The run's id for W&B: made once, kept beside the history, so that a resumed run is the same run.

        A project is shared: equal folder names of two people must not become one run.
        """
        file = self._histories[name].path.with_suffix(".wandb-id")
        if not file.exists():
            slug = re.sub(r"[^A-Za-z0-9_-]", "-", f"{self._folder.name}-{name}")
            write_text(file, f"{slug[-80:]}-{secrets.token_hex(4)}\n")
        return file.read_text(encoding="utf-8").strip()


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
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc().authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # none, or not readable as one
        return False


def _close(run: Any, exit_code: int) -> None:
    if exit_code in _STOPPED_BY_SLURM and not run.offline:
        run.mark_preempting()  # tells the service, and does not wait
    run.finish(exit_code=exit_code)


def _teardown() -> None:
    """End W&B's service, if it still lives."""
    try:
        import wandb

        wandb.teardown()
    except (Exception, SystemExit) as error:  # it exits with the service's code where that is not 0
        logger.debug("W&B's service did not end well: %r", error)


def _in_parallel(actions: Sequence[Callable[[], None]], seconds: float) -> None:
    """Run all `actions` at once, but wait for them no longer than `seconds` together."""
    deadline = time.monotonic() + seconds
    threads = [threading.Thread(target=action, daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
