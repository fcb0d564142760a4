"""Send W&B what it lacks of a run that has ended: ``python -m mvat_dist.sync RUN...``.

For runs whose server was lost on the way, with no start to come. It starts the uploader process that every
training has (`mvat_dist.runs.uploader`), which asks the server how far it has come. `wandb sync` sends a
log from its first row, and so twice what the server has.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvat_dist.config.cli import CommandParser
from mvat_dist.errors import BusyError, UserError, exit_code
from mvat_dist.launch.uploader import Uploader
from mvat_dist.runs import uploads
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.lock import RunLock

PROG = "python -m mvat_dist.sync"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = CommandParser(
        PROG,
        "Send Weights & Biases the rows that it lacks of runs that have ended, each row once: after a run "
        "whose W&B server was lost on the way. A run that was offline all the time is sent whole by "
        "`wandb sync --yes RUN/wandb/offline-run-*`. Exit code: 0 when W&B has every row, 2 where it cannot "
        "be reached or something is to be mended, 3 when a run is being started or trained.",
        f"{PROG} runs/students",
    )
    options.add_argument("run", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    return options


def main(argv: list[str] | None = None) -> None:
    """Send what is missing of all runs that are named, one after the other.

    Raises:
        UserError: no run, no key, no server, or a run for which `wandb sync` is the way.
        BusyError: a process trains the run.
    """
    options = parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    runs = [RunDir(folder.absolute()) for folder in options.run]
    for run in runs:
        if not run.config.exists():
            raise UserError(f"{run.path} holds no run: give the folder of one, as in {PROG} runs/students")
    for run in tqdm(runs, unit="run", disable=len(runs) == 1):
        with _at_rest(run):
            _check(run)
            _send(run)
        tqdm.write(f"W&B has every row of {run.path}")


def _check(run: RunDir) -> None:
    """Refuse a run without rows, one that was offline all the time and not sent, and to go without a key."""
    if not (run.environment.exists() and any(run.students.glob("*/history.jsonl"))):
        raise UserError(f"{run.path} holds no rows yet: there is nothing to send")
    logs = list(run.path.glob("wandb/*run-*/*.wandb"))
    offline = [log for log in logs if log.parent.name.startswith("offline-")]
    if logs == offline and not all(Path(f"{log}.synced").exists() for log in logs):
        place = shlex.quote(str(run.path / "wandb"))
        raise UserError(
            f"{run.path} was offline all the time: `wandb sync --yes {place}/offline-run-*` sends it with "
            "its sounds and pictures"
        )
    if not uploads.has_credentials():
        raise UserError("there is no key for W&B: type `wandb login`, or set WANDB_API_KEY")


@contextmanager
def _at_rest(run: RunDir) -> Iterator[None]:
    """Keep the run from being trained meanwhile.

    Raises:
        BusyError: it is being trained.
    """
    lock = RunLock(run.path, "start")
    try:
        if owner := lock.acquire():
            raise BusyError(f"{run.path} is being started or trained by {owner}: it sends its rows itself")
        yield
    finally:
        lock.release()


def _send(run: RunDir) -> None:
    """Start the uploader and wait for it.

    Raises:
        UserError: W&B has not taken all; a warning has said why.
    """
    if not Uploader(run, to_server=True).finish(_ended(run.read_status())):
        raise UserError(
            f"W&B has not taken all of {run.path}: nothing is lost, and the same command continues from what "
            "it has"
        )


def _ended(status: dict[str, Any]) -> int:
    """The exit code of the run's last start; 1 where it could not say."""
    if status.get("state") == "finished":
        return 0
    if status.get("state") == "stopped" and status.get("reason") in signal.Signals.__members__:
        return 128 + signal.Signals[status["reason"]]
    return int(status.get("exit_code", 1))


if __name__ == "__main__":
    sys.exit(exit_code(main))
