"""The copy of a run's histories at Weights & Biases: one W&B run per student, one group per run.

Every row is sent once. A start asks W&B how far its copy has come: the server where the run is online, the
logs in ``RUN/wandb`` where it is offline. Whatever lies beyond that in the histories is sent.
Only the uploader process (`mvat_dist.runs.uploader`) uses this module, and only this module imports wandb.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvat_dist.config import parser, sizes
from mvat_dist.config.schema import Config
from mvat_dist.io import read_json, read_record, write_text
from mvat_dist.runs import uploads
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History, Row, is_validation
from mvat_dist.runs.uploads import Attachment, BestWeights, Mode

logger = logging.getLogger(__name__)

STEP, VALIDATED = "global_step", "valid/step"
"""The optimiser's steps at W&B, whose own step counts rows."""

_CONNECT_SECONDS = 10
_FLUSH_SECONDS = 2
"""What a killed run loses at most of its offline copy; the next start sends it."""


@dataclass
class Copied:
    """How far W&B's copy of a history has come."""

    step: int = -1
    validated: int = -1

    def lacks(self, row: Row) -> bool:
        """Whether W&B does not have `row` yet; from then on it counts as sent."""
        if row["step"] <= (self.validated if is_validation(row) else self.step):
            return False
        if is_validation(row):
            self.validated = row["step"]
        self.step = max(self.step, row["step"])
        return True


class WandbRuns:
    """The W&B runs of a run's students, for one life of W&B's service."""

    def __init__(
        self,
        run: RunDir,
        config: Config,
        mode: Mode,
        sweep: str,
        on_stop: Callable[[], None],
        finish_seconds: int,
        *,
        of_all: bool = False,
    ) -> None:
        """Find the students' histories.

        Args:
            run: the run's folder.
            config: of the run.
            mode: ``online`` or ``offline``.
            sweep: id of the sweep to which the run of `track.objective` belongs; empty for none.
            on_stop: called where somebody stops a run in the browser.
            finish_seconds: what W&B gets for the last uploads.
            of_all: whether students that have left the run, whose histories are still there, count too.
        """
        self._run, self._config, self._mode, self._sweep = run, config, mode, sweep
        self._on_stop, self._finish_seconds = on_stop, finish_seconds
        names = list(sizes.select(config.student, config.sizes))
        self._objective = config.track.objective or names[0]
        if of_all:
            names = sorted(file.parent.name for file in run.students.glob("*/history.jsonl"))
        self._histories = {name: History(run.history(name)) for name in names if run.history(name).exists()}
        self._wandb_runs: dict[str, Any] = {}
        self._copied: dict[str, Copied] = {}
        self._read = dict.fromkeys(self._histories, 0)
        """Bytes of each history that have been looked at."""

    def open(self, restarts: int) -> None:
        """Open one W&B run per student.

        Args:
            restarts: how often the training was started before this start.

        Raises:
            Exception: whatever W&B raises where it cannot be reached or refuses the key.
        """
        for name, about in described(self._run, self._config, self._histories).items():
            self._wandb_runs[name] = self._open(name, about)
        for name, wandb_run in self._wandb_runs.items():
            self._ask_how_far(name, wandb_run)
            if restarts:
                wandb_run.tags = (*dict.fromkeys((*(wandb_run.tags or ()), "requeued")),)
                wandb_run.summary["restarts"] = restarts

    def _open(self, name: str, about: dict[str, Any]) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=_CONNECT_SECONDS,
            finish_timeout=self._finish_seconds,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
            stop_fn=self._on_stop,  # instead of a SIGINT to this process
            console="off",
            silent=True,
        )
        if self._sweep and name == self._objective:
            settings.sweep_id = self._sweep
        track = self._config.track
        wandb_run = wandb.init(
            project=track.project,
            entity=track.entity or None,
            group=track.group or os.environ.get("WANDB_RUN_GROUP") or self._run.path.name,
            name=f"{self._run.path.name}/{name}",
            id=self._run_id(name),
            resume="allow",
            dir=str(self._run.path),
            config=about,
            reinit="create_new",
            mode="online" if self._mode == "online" else "offline",
            settings=settings,
        )
        wandb_run.define_metric("*", step_metric=STEP)
        return wandb_run

    def _run_id(self, name: str) -> str:
        """The W&B run's id: made once, kept beside the history, so that a resumed run is the same run.

        A project is shared: equal folder names of two people must not become one run. In a sweep, the run
        that the sweep looks at is the one that its agent has named.
        """
        file = self._histories[name].path.with_suffix(".wandb-id")
        if not file.exists():
            slug = re.sub(r"[^A-Za-z0-9_-]", "-", f"{self._run.path.name}-{name}")
            by_agent = os.environ.get("WANDB_RUN_ID") if name == self._objective else None
            write_text(file, f"{by_agent or f'{slug[-80:]}-{secrets.token_hex(4)}'}\n")
        return file.read_text(encoding="utf-8").strip()

    def _ask_how_far(self, name: str, wandb_run: Any) -> None:
        """Find out which rows of a student W&B has."""
        logs = _logs(self._run.path, wandb_run.id, but_for=Path(wandb_run.dir).parent)
        # What lies on disk need not have reached the server.
        newest = _newest_summary(logs) if wandb_run.offline else dict(wandb_run.summary)
        self._copied[name] = Copied(newest.get(STEP, -1), newest.get(VALIDATED, -1))
        if not wandb_run.offline:
            # This run sends all that is missing: `wandb sync` must pass over the logs of earlier starts.
            for log in logs:
                log.with_name(f"{log.name}.synced").touch()

    def send_new(self) -> None:
        """Send the rows that the histories have and W&B lacks, and the weights that wait."""
        for name, history in self._histories.items():
            rows, self._read[name] = history.read_from(self._read[name])
            for row in rows:
                if self._copied[name].lacks(row):
                    self._send(name, row)
                elif is_validation(row):  # made again after a restart: W&B takes no more for its step
                    folder = uploads.attachment_folder(self._run.student(name), row["step"])
                    shutil.rmtree(folder, ignore_errors=True)
            self._send_weights(name)

    def _send(self, name: str, row: Row) -> None:
        folder = uploads.attachment_folder(self._run.student(name), row["step"])
        attached = is_validation(row) and folder.is_dir()
        media: dict[str, Any] = {}
        if attached:
            try:
                media = _media(folder)
            except Exception as error:
                logger.warning("W&B gets only the numbers of step %d: %s", row["step"], in_words(error))
        self._wandb_runs[name].log({**flat(row), **media})  # W&B copies the files
        if attached:
            shutil.rmtree(folder, ignore_errors=True)

    def _send_weights(self, name: str) -> None:
        import wandb

        for folder in uploads.weights_folders(self._run.student(name)):
            wandb_run = self._wandb_runs[name]
            try:
                best = read_record(folder / uploads.RECORD, BestWeights)
                artifact = wandb.Artifact(f"{wandb_run.id}-best", type="model", metadata=best.about)
                artifact.add_file(str(folder / best.file), name=best.file, skip_cache=True)
                wandb_run.log_artifact(artifact, aliases=["best", f"step-{best.step}"])
            except Exception as error:
                logger.warning("W&B does not take the weights in %s: %s", folder, in_words(error))
            shutil.rmtree(folder, ignore_errors=True)

    def close(self, exit_code: int) -> None:
        """Close all runs at once; those that Slurm stopped as preempted, or a sweep takes them for failed.

        Raises:
            Exception: of W&B; `TimeoutError` where it has not taken all in time.
        """
        import wandb

        def close(wandb_run: Any) -> None:
            if exit_code in uploads.STOPPED_BY_SLURM:
                wandb_run.tags = (*dict.fromkeys((*(wandb_run.tags or ()), "preempted")),)
                wandb_run.mark_preempting()
            wandb_run.finish(exit_code=exit_code)

        with ThreadPoolExecutor(max(1, len(self._wandb_runs))) as pool:
            list(pool.map(close, self._wandb_runs.values()))
        try:
            wandb.teardown()  # waits for the service, which may still have to write
        except SystemExit as error:
            raise ConnectionError(f"W&B's service ended with code {error.code}") from error


def described(run: RunDir, config: Config, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What W&B shows as the configuration of each student's run, by student."""
    shared = {**parser.as_dict(config), "environment": read_json(run.environment)}
    known = {**sizes.SIZES, **config.sizes}  # a size of the user's may have left with its student
    costs = {name: uploads.cost(known[name]) if name in known else {} for name in names}
    return {name: {**shared, "student_name": name, **cost} for name, cost in costs.items()}


def flat(row: Row) -> Row:
    """A row as W&B gets it: nested names joined by ``/``, without nulls, its step under other names."""
    flattened = {STEP: row["step"], **_joined({key: row[key] for key in row if key != "step"})}
    return {**flattened, VALIDATED: row["step"]} if is_validation(row) else flattened


def _joined(row: Row, prefix: str = "") -> Row:
    joined: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            joined |= _joined(value, f"{prefix}{key}/")
        elif value is not None:
            joined[prefix + key] = value
    return joined


def _media(folder: Path) -> dict[str, Any]:
    """The attachment in a folder as values of W&B's kinds."""
    import wandb

    attachment = read_record(folder / uploads.RECORD, Attachment)
    media: dict[str, Any] = {}
    for name, file in attachment.files.items():
        kind = wandb.Audio if file.endswith(".flac") else wandb.Image
        media[name] = kind(str(folder / file), caption=attachment.captions.get(name))
    for name, rows in attachment.tables.items():
        media[name] = wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
    return media


def _logs(run: Path, wandb_id: str, but_for: Path) -> list[Path]:
    """The logs that earlier starts of a W&B run have left on disk, the newest first."""
    logs = [log for log in run.glob(f"wandb/*run-*/run-{wandb_id}.wandb") if log.parent != but_for]
    return sorted(logs, key=lambda log: log.parent.name.partition("run-")[2], reverse=True)


def _newest_summary(logs: Sequence[Path]) -> dict[str, Any]:
    """The last values in the newest log that has rows, as W&B's own command reads them."""
    for log in logs:
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(log)]
        # Standard input is the training's, which the command could read away.
        done = subprocess.run(inspect, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        summary: dict[str, Any] = json.loads(done.stdout)["summary"] if done.returncode == 0 else {}
        if STEP in summary:
            return summary
    return {}


def in_words(error: Exception) -> str:
    """The first line of an error, without the user's key, should it quote that."""
    words = f"{type(error).__name__}: {error}".partition("\n")[0]
    key = os.environ.get("WANDB_API_KEY", "")
    return words.replace(key, "(key)") if key else words


def contents(folder: Path) -> dict[Path, Path | None]:
    """What lies in W&B's folder of a run; of links, such as ``latest-run``, where they lead."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return {entry: entry.readlink() if entry.is_symlink() else None for entry in entries}


def restore(folder: Path, earlier: Mapping[Path, Path | None]) -> None:
    """Remove what has come into W&B's folder since it had the `earlier` contents, and lead its links back."""
    for entry, target in contents(folder).items():
        if target:
            entry.unlink()
        elif entry not in earlier:
            shutil.rmtree(entry, ignore_errors=True)
    for entry, target in earlier.items():
        if target:
            entry.symlink_to(target)
    if not earlier:
        shutil.rmtree(folder, ignore_errors=True)
