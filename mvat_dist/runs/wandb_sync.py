"""The copy of a fleet's histories at Weights & Biases: one run per student, grouped by fleet.

A thread of its own does all that has to do with W&B, so a training never waits for it: it opens the runs,
sends what is missing there, then row after row. Every row is sent once. Where a run is resumed, what W&B
holds tells which rows are new: its server, where it is online, else what lies on disk (``wandb/*run-*``).

W&B's service is a child process that ends on SIGTERM and SIGINT even where it inherits them blocked or
ignored (measured with 0.31), and Slurm signals all processes of a job: it is started again when it is lost.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import secrets
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mvat_dist.config.schema import TrackConfig
from mvat_dist.io import TEMPORARY_SUFFIX, write_text
from mvat_dist.runs import wandb_mode
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History, Row
from mvat_dist.runs.wandb_rows import STEP, VALIDATED, Extras, Mark, copy_of, media
from mvat_dist.runs.wandb_service import (
    END_SECONDS,
    at_once,
    contents,
    end_service,
    kill_service,
    newest_values,
    restore,
    segments,
)

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 10
_FLUSH_SECONDS = 2
"""What a killed run loses at most of its copy on disk."""
_UPLOAD_SECONDS = 40
"""What a finished run gives W&B for the last uploads."""
_STOP_SECONDS = 10
"""The same for a run that Slurm stops: it has to be queued again before Slurm kills it."""
_PATIENT_SECONDS = 600
"""The same where somebody waits for it."""
_RESTARTS = 3
_MOST_WAITING = 2000
"""Tasks that wait for W&B before it is given up: some megabytes."""

_STOPPED_BY_SLURM = {128 + signal.SIGTERM, 128 + signal.SIGUSR2}


class Mirror:
    """W&B's copy of the histories of a fleet: `start`, then `log`, `artifact`, `finish`; or `send_missing`.

    No method waits for W&B but `finish`, which has a limit, and `send_missing`.
    """

    def __init__(
        self,
        run: RunDir,
        histories: Mapping[str, History],
        config: TrackConfig,
        about: Mapping[str, dict[str, Any]],
        restarts: int = 0,
    ) -> None:
        self._folder, self._fleet, self._histories = run.path, run.path.name, histories
        self._config, self._about = config, about
        self._restarts = restarts
        self._mode = wandb_mode.mode(config)
        # In the environment, it would make W&B take every run of this process for the sweep's.
        self._sweep = os.environ.pop("WANDB_SWEEP_ID", "")
        self._upload_seconds = _UPLOAD_SECONDS
        self._objective = config.objective or next(iter(histories))
        self._runs: dict[str, Any] = {}
        self._marks: dict[str, Mark] = {}
        self._reached = {name: history.size for name, history in histories.items()}
        """Bytes of each history that W&B is to have by now."""
        self._lives = 1 + _RESTARTS
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST_WAITING)
        self._lost = False
        self._thread = threading.Thread(target=self._work, name="W&B", daemon=True)

    def start(self) -> None:
        """Open the runs and send what is missing there, without anybody waiting for it."""
        if self._mode != "disabled":
            self._thread.start()

    def send_missing(self, exit_code: int) -> None:
        """In place of `start`: wait until the server has every row, and close the runs there.

        Raises:
            Exception: whatever W&B raises where it cannot be reached, refuses the key or does not take all
                in ten minutes (`TimeoutError`). The next call goes on. Where no run could be opened, nothing
                of the attempt is left on disk.
        """
        self._mode, self._upload_seconds = "online", _PATIENT_SECONDS
        own = self._folder / "wandb"
        before = contents(own)
        try:
            self._open_fleet()
            self._end_runs(exit_code)
        finally:
            end_service(kill=True)
            if not self._runs:
                restore(own, before)

    def log(self, name: str, row: Row, extras: Extras | None = None) -> None:
        """Send one row of a history."""
        self._put(partial(self._send, name, row, extras, self._histories[name].size))

    def artifact(self, name: str, file: Path, about: dict[str, Any]) -> None:
        """Send a student's best weights, as they are now, as a new version of an artifact."""
        # The next ones may be in their place before W&B's thread comes to read them.
        kept = file.with_name(f".{file.name}.step-{about['step']}{TEMPORARY_SUFFIX}")
        kept.unlink(missing_ok=True)
        try:
            kept.hardlink_to(file)
        except OSError:  # a file system without links
            shutil.copyfile(file, kept)
        self._put(partial(self._send_artifact, name, kept, file.name, about))

    def finish(self, exit_code: int) -> None:
        """Close the runs; give up after a while rather than hold an allocation.

        Runs that Slurm stopped are marked as preempted: a sweep takes them for failed otherwise.
        """
        if not self._thread.is_alive():
            return
        seconds = _STOP_SECONDS if exit_code in _STOPPED_BY_SLURM else _UPLOAD_SECONDS + END_SECONDS
        self._put(partial(self._close, exit_code))
        self._put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            if not self._lost:
                logger.warning("W&B does not answer: left after %d s. %s", seconds, self._advice())
            self._lives, self._lost = 0, True
            kill_service()
            self._thread.join(END_SECONDS)

    def _put(self, task: Callable[[], None] | None) -> None:
        if self._thread.is_alive() and not self._lost:
            try:
                self._tasks.put_nowait(task)
            except queue.Full:
                self._lost = True
                logger.warning("W&B does not keep up: no more rows for it. %s", self._advice())

    def _work(self) -> None:
        """The thread: open the runs, then do what is asked."""
        try:
            self._alive(lambda: None)
            while not self._lost and (task := self._tasks.get()):
                self._alive(task)
        except Exception as error:
            if not self._lost:
                logger.warning("no more W&B: %s. %s", wandb_mode.in_words(error), self._advice())
        finally:
            # Else the SDK does it when the interpreter exits: without limit, with a traceback after a crash.
            end_service()

    def _alive(self, task: Callable[[], None]) -> None:
        """Do `task` with open runs; open them anew where W&B's service was lost."""
        while True:
            try:
                if not self._runs:
                    self._open_all()
                task()
                return
            except Exception as error:
                self._lives -= 1
                if self._lives <= 0:
                    raise
                logger.debug("W&B is started again after %r", error)
                self._runs.clear()
                end_service(kill=True)

    def _open_all(self) -> None:
        """One run per student; all of them offline where one cannot be opened online."""
        if self._mode == "online":
            try:
                self._open_fleet()
                return
            except Exception as error:
                words = wandb_mode.in_words(error)
                logger.warning("W&B cannot be used (%s): offline; `wandb sync` sends it later", words)
                end_service(kill=True)  # without this the ids count as taken
                self._mode = "offline"
        self._open_fleet()

    def _open_fleet(self) -> None:
        self._runs = {name: self._open(name) for name in self._histories}
        for name, run in self._runs.items():
            self._catch_up(name, run)

    def _open(self, name: str) -> Any:
        import wandb

        own = self._folder / "wandb"
        for variable, value in {
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "WANDB_CACHE_DIR": str(own / "cache"),
            "WANDB_DATA_DIR": str(own / "data"),
        }.items():
            os.environ.setdefault(variable, value)
        settings = wandb.Settings(
            init_timeout=_CONNECT_SECONDS,
            finish_timeout=self._upload_seconds,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
            console="off",
            silent=True,
        )
        if self._sweep and name == self._objective:
            settings.sweep_id = self._sweep
        run = wandb.init(
            project=self._config.project,
            entity=self._config.entity or None,
            group=self._config.group or os.environ.get("WANDB_RUN_GROUP") or self._fleet,
            name=f"{self._fleet}/{name}",
            id=self._run_id(name),
            resume="allow",
            dir=str(self._folder),
            config=self._about.get(name, {}),
            reinit="create_new",
            mode="online" if self._mode == "online" else "offline",
            settings=settings,
        )
        # After a requeue W&B's own step no longer counts rows of one history; ours is the optimiser's.
        run.define_metric("*", step_metric=STEP)
        return run

    def _catch_up(self, name: str, run: Any) -> None:
        """Send the rows that W&B does not have yet."""
        before = segments(self._folder, run.id, but_for=Path(run.dir).parent)
        # What lies on disk need not have reached the server.
        known = newest_values(before, {STEP, VALIDATED}) if run.offline else dict(run.summary)
        self._marks[name] = mark = Mark(known.get(STEP, -1), known.get(VALIDATED, -1))
        if self._restarts:
            run.tags = (*dict.fromkeys((*(run.tags or ()), "requeued")),)
            run.summary["restarts"] = self._restarts
        for row in self._histories[name].rows(self._reached[name]):
            if mark.passes(row):
                run.log(copy_of(row))
        if not run.offline:
            # This run sends all that was missing: `wandb sync` is to pass over what lies there from before.
            for segment in before:
                segment.with_name(f"{segment.name}.synced").touch()

    def _send(self, name: str, row: Row, extras: Extras | None, size: int) -> None:
        self._reached[name] = size
        if not self._marks[name].passes(row):
            return
        files: dict[str, Any] = {}
        try:
            files = media(extras or Extras())
        except Exception as error:
            logger.warning(
                "W&B gets only the numbers of step %d: %s", row["step"], wandb_mode.in_words(error)
            )
        self._runs[name].log({**copy_of(row), **files})

    def _send_artifact(self, name: str, file: Path, called: str, about: dict[str, Any]) -> None:
        import wandb

        run = self._runs[name]
        try:
            artifact = wandb.Artifact(f"{run.id}-best", type="model", metadata=about)
            artifact.add_file(str(file), name=called, skip_cache=True)
            run.log_artifact(artifact, aliases=["best", f"step-{about['step']}"])
        except Exception as error:
            logger.warning("W&B does not take %s: %s", file, wandb_mode.in_words(error))
        finally:
            file.unlink(missing_ok=True)

    def _close(self, exit_code: int) -> None:
        try:
            self._end_runs(exit_code)
        except TimeoutError:
            if not self._lost:
                logger.warning("W&B has not taken all in %d s. %s", self._upload_seconds, self._advice())

    def _end_runs(self, exit_code: int) -> None:
        """Close all runs at once.

        Raises:
            Exception: the first that one of them has raised; `TimeoutError` where W&B has not taken all.
        """
        failed: list[Exception] = []

        def close(run: Any) -> None:
            try:
                if exit_code in _STOPPED_BY_SLURM:
                    run.tags = (*dict.fromkeys((*(run.tags or ()), "preempted")),)
                    run.mark_preempting()
                run.finish(exit_code=exit_code)
            except Exception as error:
                failed.append(error)

        runs = self._runs.values()
        if not at_once([partial(close, run) for run in runs], self._upload_seconds + END_SECONDS):
            raise TimeoutError("W&B's service does not answer")
        if failed:
            raise failed[0]

    def _advice(self) -> str:
        return (
            f"Nothing is lost: {self._folder}/students/*/history.jsonl is complete, and the next start sends "
            f"what is missing, or `python -m mvat_dist.sync {shlex.quote(str(self._folder))}`"
        )

    def _run_id(self, name: str) -> str:
        """The run's id for W&B: made once, kept beside the history, so that a resumed run is the same run.

        A project is shared: equal folder names of two people must not become one run. In a sweep, the run
        that the sweep looks at is the one that its agent has named.
        """
        file = self._histories[name].path.with_suffix(".wandb-id")
        if not file.exists():
            slug = re.sub(r"[^A-Za-z0-9_-]", "-", f"{self._fleet}-{name}")
            made = f"{slug[-80:]}-{secrets.token_hex(4)}"
            named = os.environ.get("WANDB_RUN_ID") if name == self._objective else None
            write_text(file, f"{named or made}\n")
        return file.read_text(encoding="utf-8").strip()
