"""What the copy at W&B sends of a run's histories and files, with a stand-in for W&B's runs."""

from __future__ import annotations

import errno
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mvat_dist.config import parser
from mvat_dist.config.schema import TrackConfig
from mvat_dist.io import parse_record
from mvat_dist.runs import lock, uploader, uploads
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History
from mvat_dist.runs.lock import RunLock
from mvat_dist.runs.uploads import Attachment
from mvat_dist.runs.wandb_sync import STEP, VALIDATED, WandbRuns
from mvat_dist.training.recorder import Recorder
from tests.wandb_runs import NAMES, prepare


class Copy:
    """What W&B gets of every student, and what it had before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, summary: dict[str, int]) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}

        def open_run(_: WandbRuns, name: str, about: dict[str, Any]) -> Any:
            self.configs[name], self.rows[name] = about, []
            return SimpleNamespace(
                id=name, dir="wandb/run-now/files", offline=False, summary=summary, log=self.rows[name].append
            )

        monkeypatch.setattr(WandbRuns, "_open", open_run)


def opened(run: RunDir, *, of_all: bool = False) -> WandbRuns:
    config = parser.parse(["--config", str(run.config)])
    runs = WandbRuns(run, config, "online", "", lambda: None, 1, of_all=of_all)
    runs.open(0)
    return runs


def test_a_student_that_left_is_sent_where_all_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Copy(monkeypatch, {})
    run = prepare(tmp_path / "run", NAMES)
    for name in (*NAMES, "own-size"):
        run.student(name).mkdir(exist_ok=True)
        History(run.history(name)).append({"step": 1, "loss": 0.5})
    prepare(tmp_path / "run", NAMES[:1])
    opened(run).send_new()
    assert set(copy.rows) == {NAMES[0]}
    opened(run, of_all=True).send_new()
    assert set(copy.rows) == {*NAMES, "own-size"}
    assert all([row["loss"] for row in rows] == [0.5] for rows in copy.rows.values())
    assert "gmac_4s" in copy.configs[NAMES[1]]


def test_attachments_of_rows_that_wandb_has_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run makes its last steps again, with their attachments; W&B has their rows already."""
    copy = Copy(monkeypatch, {STEP: 8, VALIDATED: 8})
    run = prepare(tmp_path / "run", NAMES[:1])
    history = History(run.history(NAMES[0]))
    for step in (4, 8, 12):
        uploads.attach(run.student(NAMES[0]), Attachment(step))
        history.append({"step": step, "valid/stoi": 0.5})
    opened(run).send_new()
    assert [row[STEP] for row in copy.rows[NAMES[0]]] == [12]
    assert not list((run.student(NAMES[0]) / "uploads").iterdir())


def test_a_training_goes_on_where_the_uploader_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more_processes(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_more_processes)
    recorder = Recorder(TrackConfig(wandb="offline"), RunDir(tmp_path), [], None)
    recorder.close(0)
    assert caplog.text.count("no W&B: its process cannot be started") == 1


def test_a_replaced_uploader_does_not_adopt_another_trainings_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Copy(monkeypatch, {})
    run = prepare(tmp_path / "run", NAMES[:1], wandb="offline")
    first = RunLock(run.path, "train")
    assert first.acquire() is None
    state = uploader.State(owner=lock.holder(run.path))
    first.release()
    assert RunLock(run.path, "train").acquire() is None

    class Replacement(SimpleNamespace):
        def leave(self, code: int) -> None:
            raise SystemExit(code)

    restored = parse_record(json.dumps(asdict(state)), uploader.State, "state")
    process = Replacement(
        state=restored,
        is_replacement=True,
        sweep="",
        pass_on_stop=lambda: None,
        training_has_ended=lambda: True,
    )
    with pytest.raises(SystemExit):
        uploader.follow(run, process)  # type: ignore[arg-type]
