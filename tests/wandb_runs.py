"""Runs that write histories for W&B without training, and what W&B then holds of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvat_dist.config import parser
from mvat_dist.io import write_json
from mvat_dist.launch.uploader import Uploader
from mvat_dist.runs import uploads
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History
from mvat_dist.runs.uploads import Attachment
from tests.wandb_server import Server

NAMES = ("manner-s-0.9gf", "manner-s-0.6gf")

WANDB = Path(sys.executable).with_name("wandb")


def records(log: Path) -> list[dict[str, Any]]:
    """Everything in a log on disk, read with W&B's own command."""
    done = subprocess.run(
        [WANDB, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True, timeout=60
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def rows_of(log: Path) -> list[dict[str, Any]]:
    """History rows in a log on disk."""
    return rows_in(records(log))


def rows_in(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """History rows among a log's records."""
    return [record["history"]["item"] for record in log if record.get("type") == "history"]


def summary_of(log: Path) -> dict[str, Any]:
    """What W&B's command says of a log as a whole: summary, config, tags, exit code."""
    command = [WANDB, "leet", "inspect", "--summary", "--json", log]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return dict(json.loads(done.stdout))


def synchronise(folder: Path, server: Server) -> None:
    """`wandb sync` of all that is offline in a run's folder, as a user does it later."""
    logs = sorted((folder / "wandb").glob("offline-run-*"))
    done = subprocess.run([WANDB, "sync", "--yes", *logs], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not server.unknown - {"OrganizationCoreWeaveOrganizationID"}


def same_rows(copy: Iterable[dict[str, Any]], history: Path, but_for: Collection[str] = ()) -> None:
    """W&B's rows are those of the record: every one once, in its order, with every value.

    Of a run that was killed, W&B keeps what it had of the steps that were made again: `but_for` what differs.
    """
    expected = [json.loads(line) for line in history.read_text().splitlines()]
    found = list(copy)
    assert [row["global_step"] for row in found] == [row["step"] for row in expected]
    for row, truth in zip(found, expected, strict=True):
        kept = {key: value for key, value in truth.items() if key not in {"step", *but_for}}
        for key, value in _flat(kept).items():
            assert row.get(key) == value, (truth["step"], key)


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


class Training:
    """Does with a run's folder what a training does for W&B: histories, attachments, the uploader process."""

    def __init__(
        self, folder: Path, done: int = 0, restarts: int = 0, names: Sequence[str] = NAMES, **track: Any
    ) -> None:
        """A start of a run whose students have done some steps; `track` are options of ``--track``."""
        self.run = prepare(folder, names, **track)
        self.run.write_status("running", done, restarts=restarts)
        self.histories = {name: History(self.run.history(name)) for name in names}
        for history in self.histories.values():
            history.rewind(done)
        config = parser.parse(["--config", str(self.run.config)])
        is_on = uploads.mode(config.track) != "disabled"
        self.uploader = Uploader(self.run) if is_on else None

    def log(self, name: str, step: int, **row: Any) -> None:
        """One row of a student."""
        self.histories[name].append({"step": step, **row})

    def attach(self, name: str, attachment: Attachment) -> None:
        """What W&B gets with a student's next row."""
        uploads.attach(self.run.student(name), attachment)

    def finish(self, exit_code: int = 0) -> None:
        """The training ends."""
        if self.uploader:
            self.uploader.finish(exit_code)


def prepare(folder: Path, names: Sequence[str] = NAMES, **track: Any) -> RunDir:
    """The folder of a run of some students, as its first start makes it."""
    run = RunDir(folder)
    for name in names:
        run.student(name).mkdir(parents=True, exist_ok=True)
    config = parser.parse([f"--student={','.join(names)}", "--distil.method=none", "--seed=7"])
    config = replace(config, track=replace(config.track, **track))
    run.config.write_text(parser.to_yaml(config))
    write_json(run.environment, {"packages": {}})
    return run


def hurry(monkeypatch: pytest.MonkeyPatch, connect: float = 10, upload: float = 40) -> None:
    """Have uploaders give W&B so many seconds to connect, and for the last uploads."""
    code = "from mvat_dist.runs import uploader, uploads, wandb_sync; "
    code += f"wandb_sync._CONNECT_SECONDS = {connect}; "
    code += f"uploads.UPLOAD_SECONDS = uploads.PATIENT_SECONDS = {upload}; uploader.main()"
    monkeypatch.setattr(uploads, "uploader_command", lambda run: [sys.executable, "-c", code, str(run)])
    monkeypatch.setattr(uploads, "UPLOAD_SECONDS", upload)
