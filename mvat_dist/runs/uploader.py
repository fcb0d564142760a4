"""The uploader process: it copies a run's histories to Weights & Biases while the run is trained, and after.

    python -m mvat_dist.runs.uploader RUN [--to-server]

A training starts it, writes its own exit code to this process's standard input when it ends, and never waits
for anything else. `python -m mvat_dist.sync` starts it for a run that has ended.

Where W&B's service is lost, this process replaces itself by a fresh one, which asks W&B what it lacks, as
every start does. Slurm signals every process of a job, and the service (0.31) ends on SIGTERM even where it
is ignored.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from mvat_dist.config import parser
from mvat_dist.io import parse_record
from mvat_dist.runs import lock, uploads, wandb_sync
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.lock import Owner
from mvat_dist.runs.uploads import Mode
from mvat_dist.runs.wandb_sync import WandbRuns, in_words

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_STARTS = 4
"""How often W&B's service is started before it is given up."""
_STATE = "MVAT_WANDB_STATE"
"""Environment variable with which this process tells its replacement what it knows."""


@dataclass
class State:
    """What this process knows and its replacement has to know."""

    start: int = 1
    """How often W&B's service was started, this time included."""
    offline: bool = False
    """Whether the server could not be reached."""
    exit_code: int | None = None
    """Exit code of the training, once that has ended."""
    owner: Owner | None = None
    """Who held the run's lock when the first of these processes began."""
    stop_passed_on: bool = False
    """Whether the training knows that somebody has stopped the run in the browser."""


class Process:
    """This process: what it hears, and how it ends."""

    def __init__(self, to_server: bool) -> None:
        """Listen to the training, and to nobody else.

        `to_server` is for a run that has ended: the server alone counts.
        """
        self._environment = dict(os.environ)  # without what W&B's SDK adds, such as where its service is
        self.is_replacement = _STATE in os.environ
        self.state = parse_record(os.environ.pop(_STATE, "{}"), State, _STATE)
        self._handover = threading.Lock()
        """Held while an exit code is taken over, and while the state is: a replacement must get both."""
        self._to_server = to_server
        # In the environment, it would make W&B take every run of this process for the sweep's.
        self.sweep = os.environ.pop("WANDB_SWEEP_ID", "")
        self._has_ended = threading.Event()
        if self.state.exit_code is not None:
            self._has_ended.set()
        # Slurm signals every process of a job; this one ends when its training has ended.
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def pass_on_stop(self) -> None:
        """Have the training stop: somebody has stopped the run in the browser."""
        # A second SIGINT would end the training at once.
        if not self._to_server and not self.state.stop_passed_on:
            self.state.stop_passed_on = True
            os.kill(os.getppid(), signal.SIGINT)

    def _listen(self) -> None:
        """Read the exit code from standard input, and end this process when the parent is gone.

        What has not reached W&B by then is sent by the next start. Whatever the main thread waits for, this
        thread ends it, so that never two processes send the same rows.
        """
        while True:
            select.select([0], [], [])
            with self._handover:
                line = os.read(0, 64)
                if not line:
                    break
                self.state.exit_code = int(line)
            self._has_ended.set()
        self.leave(1)

    def training_has_ended(self) -> bool:
        """Wait a moment for the end of the training; whether it has ended."""
        return self._has_ended.wait(_POLL_SECONDS)

    def leave(self, code: int) -> NoReturn:
        """End this process and W&B's service at once, without what the SDK does when Python exits."""
        _kill_service()
        sys.stdout.flush()
        os._exit(code)

    def start_again(self) -> NoReturn:
        """Replace this process by a fresh one, which goes on from what W&B has."""
        _kill_service()
        sys.stdout.flush()
        with self._handover:
            environment = {**self._environment, _STATE: json.dumps(asdict(self.state))}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _kill_service() -> None:
    """End W&B's service: whatever it was given is in the histories too."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            child.kill()


def follow(run: RunDir, process: Process) -> None:
    """Copy the histories of a training until it ends.

    Raises:
        Exception: whatever W&B raises.
    """
    if not process.is_replacement:  # which would take the owner of another training for its own
        process.state.owner = lock.holder(run.path)
    config = parser.parse(["--config", str(run.config)])
    mode: Mode = "offline" if process.state.offline else uploads.mode(config.track)
    wandb_runs = WandbRuns(run, config, mode, process.sweep, process.pass_on_stop, uploads.UPLOAD_SECONDS)
    try:
        wandb_runs.open(int(run.read_status().get("restarts", 0)))
    except Exception as error:
        if mode == "offline":
            raise
        logger.warning("W&B cannot be used (%s): offline; `wandb sync` sends it later", in_words(error))
        process.state.offline = True
        process.start_again()
    has_ended = False
    while not has_ended:
        has_ended = process.training_has_ended()  # asked first: all its rows are there then
        if (
            lock.holder(run.path) != process.state.owner
        ):  # another training writes the histories now, or they are removed
            process.leave(1)
        wandb_runs.send_new()
    _close(wandb_runs, run, process, uploads.UPLOAD_SECONDS)


def send_missing(run: RunDir, process: Process) -> None:
    """Send the server what it lacks of a run that has ended, and close the run there.

    Where no W&B run could be opened, nothing of the attempt is left on disk.

    Raises:
        Exception: whatever W&B raises.
    """
    config = parser.parse(["--config", str(run.config)])
    wandb_runs = WandbRuns(
        run, config, "online", process.sweep, process.pass_on_stop, uploads.PATIENT_SECONDS, of_all=True
    )
    earlier = wandb_sync.contents(run.path / "wandb")
    try:
        wandb_runs.open(restarts=0)
    except Exception:
        _kill_service()
        wandb_sync.restore(run.path / "wandb", earlier)
        raise
    while not process.training_has_ended():
        pass
    wandb_runs.send_new()
    _close(wandb_runs, run, process, uploads.PATIENT_SECONDS)


def _close(wandb_runs: WandbRuns, run: RunDir, process: Process, seconds: int) -> None:
    """Close the W&B runs; end this process where W&B has not taken all in `seconds`."""
    try:
        wandb_runs.close(process.state.exit_code or 0)
    except TimeoutError:
        logger.warning("W&B has not taken all in %d s. %s", seconds, uploads.advice(run.path))
        process.leave(1)


def main() -> NoReturn:
    """Follow a training, or send what is missing. Exit code: 0 when W&B has every row, else 1."""
    options = argparse.ArgumentParser(prog="python -m mvat_dist.runs.uploader", description=__doc__)
    options.add_argument("run", type=Path, help="the run's folder")
    options.add_argument(
        "--to-server", action="store_true", help="the run has ended: the server alone counts"
    )
    given = options.parse_args()
    # Standard error is for what W&B's SDK has to say.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    run = RunDir(given.run.absolute())
    for variable, value in {
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        # Homes are small on clusters.
        "WANDB_CACHE_DIR": str(run.path / "wandb" / "cache"),
        "WANDB_DATA_DIR": str(run.path / "wandb" / "data"),
    }.items():
        os.environ.setdefault(variable, value)
    process = Process(given.to_server)
    try:
        (send_missing if given.to_server else follow)(run, process)
    except Exception as error:
        if not given.to_server and process.state.start < _STARTS:
            logger.debug("W&B is started again after %r", error)
            process.state.start += 1
            process.start_again()
        logger.warning("no more W&B: %s. %s", in_words(error), uploads.advice(run.path))
    else:
        process.leave(0)
    process.leave(1)


if __name__ == "__main__":
    main()
