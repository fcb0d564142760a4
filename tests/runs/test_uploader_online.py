"""W&B online, with its real SDK and service against a stand-in for its server: whole, or gone, or ill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mvat_dist.evaluation.spectrogram import spectrogram_png
from mvat_dist.launch import uploader
from mvat_dist.runs import uploads
from mvat_dist.runs.history import History
from mvat_dist.runs.uploads import Attachment
from tests.waiting import until
from tests.wandb_runs import NAMES, Training, hurry, rows_of, same_rows
from tests.wandb_server import Server, Variables, listening, serving


def account(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with listening() as server:
        account(monkeypatch, server)
        yield server


def log(training: Training, steps: range) -> None:
    for step in steps:
        for name in NAMES:
            training.log(name, step, **{"loss": 1 / step, "mvat/encoder/1/global": step / 8})
            if step % 5 == 0:
                training.log(name, step, **{"valid/stoi": 1 - 1 / step, "valid/pesq_wb": None})


def assert_whole(server: Server, folder: Path) -> None:
    """The server has what the record has, every row once."""
    for name in NAMES:
        rows = server.run(name).history
        truth = folder / f"{name}.without-null"
        kept = [
            {k: v for k, v in row.items() if v is not None}
            for row in History(folder / "students" / name / "history.jsonl").rows()
        ]
        truth.write_text("".join(json.dumps(row) + "\n" for row in kept))
        same_rows(rows, truth)


def opened(server: Server) -> bool:
    return len(server.runs) == len(NAMES)


def test_all_of_it_arrives(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "my fleet"
    training = Training(folder)
    sound, seen = tmp_path / "heard.flac", tmp_path / "seen.png"
    tone = np.sin(np.arange(1600) / 5).astype(np.float32)
    soundfile.write(sound, tone, 16_000)
    seen.write_bytes(spectrogram_png(tone))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(range(256)))
    log(training, range(1, 8))
    files = {"examples/00/student": str(sound), "examples/00/seen": str(seen)}
    training.attach(NAMES[0], Attachment(8, files, {}, {"students": [{"a": 1, "b": "x"}]}))
    training.log(NAMES[0], 8, **{"valid/stoi": 0.125})
    sent = {file: file.read_bytes() for file in (sound, seen, weights)}
    uploads.attach_weights(training.run.student(NAMES[0]), weights, 8, {"step": 8})
    for file in sent:
        (tmp_path / "next").write_bytes(b"of step 9")
        (tmp_path / "next").replace(file)  # before the uploader comes to read it, or after
    training.finish()
    assert_whole(server, folder)
    first, second = (server.run(name) for name in NAMES)
    assert {first.group, second.group} == {"my fleet"}
    assert (first.config["seed"]["value"], first.complete, first.exit_code) == (7, True, 0)
    last = first.history[-1]
    for key, file in {"examples/00/student": sound, "examples/00/seen": seen}.items():
        assert first.files[last[key]["path"]] == sent[file]
    table = json.loads(first.files[last["students"]["path"]])
    assert (table["columns"], table["data"]) == (["a", "b"], [[1, "x"]])
    (best,) = [one for one in server.artifacts if one.kind == "model"]
    assert best.committed
    assert best.files["model.safetensors"] == sent[weights]
    assert not list(training.run.students.glob("*/uploads/*"))
    assert {"best", "step-8"} <= set(best.aliases)
    # Nothing outside the run's folder: homes are small on clusters.
    assert not [place for place in (".cache/wandb", ".local/share/wandb") if (tmp_path / place).exists()]


_KILLED = """
import os, sys
from pathlib import Path
from tests.runs.test_uploader_online import log
from tests.wandb_runs import Training
from tests.waiting import until

training = Training(Path(sys.argv[1]))
log(training, range(1, 13))
until(lambda: Path(sys.argv[2]).exists(), 60)
os.killpg(0, 9)
"""


def test_a_killed_run_goes_on_where_the_server_is(tmp_path: Path, server: Server) -> None:
    """It may have more than the checkpoint, and less than the record; it gets every row once."""
    folder, go = tmp_path / "fleet", tmp_path / "go"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder), str(go)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: opened(server) and all(len(run.history) > 5 for run in server.runs.values()), 90)
    go.touch()
    process.wait(60)
    training = Training(folder, done=9, restarts=1)
    log(training, range(10, 16))
    training.finish(128 + signal.SIGUSR2)
    training = Training(folder, done=15, restarts=2)
    log(training, range(16, 21))
    training.finish()
    assert_whole(server, folder)
    for name in NAMES:
        run = server.run(name)
        assert (run.preempting, run.exit_code, set(run.tags)) == (True, 0, {"preempted", "requeued"})


def test_a_server_that_is_not_there_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    server.end()
    hurry(monkeypatch, connect=2)
    began = time.monotonic()
    training = Training(tmp_path / "fleet")
    log(training, range(1, 6))
    assert time.monotonic() - began < 2  # nobody waits
    training.finish()
    assert_offline(tmp_path / "fleet")
    told = capfd.readouterr().err
    assert told.count("WARNING") == len(told.splitlines()) == 1
    assert "offline" in told


def assert_offline(folder: Path) -> None:
    for name in NAMES:
        slug = name.replace(".", "-")
        (segment,) = folder.glob(f"wandb/offline-run-*-{slug}-*/*.wandb")
        kept = [row["global_step"] for row in rows_of(segment)]
        assert kept == [row["step"] for row in History(folder / "students" / name / "history.jsonl").rows()]


class _Full(Server):
    """Opens one run and refuses every other."""

    def _upsert_bucket(self, variables: Variables) -> dict[str, Any]:
        if self.runs and variables["name"] not in self.runs:
            raise ConnectionAbortedError
        return super()._upsert_bucket(variables)


def test_a_fleet_is_online_or_offline_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hurry(monkeypatch, connect=3)
    with serving(_Full()) as server:
        account(monkeypatch, server)
        training = Training(tmp_path / "fleet")
        log(training, range(1, 6))
        training.finish()
        assert not any(run.history for run in server.runs.values())
    assert_offline(tmp_path / "fleet")
    assert capfd.readouterr().err.count("W&B cannot be used") == 1


def test_a_server_that_dies_gets_the_rest_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, upload=3)
    folder = tmp_path / "fleet"
    with listening() as dying:
        account(monkeypatch, dying)
        training = Training(folder)
        log(training, range(1, 6))
        until(lambda: opened(dying) and all(run.history for run in dying.runs.values()), 60)
    began = time.monotonic()
    log(training, range(6, 400))
    assert time.monotonic() - began < 5
    began = time.monotonic()
    training.finish()
    assert time.monotonic() - began < 20
    with serving(Server()) as reborn:
        reborn.runs = dying.runs
        account(monkeypatch, reborn)
        hurry(monkeypatch, upload=40)
        training = Training(folder, done=399, restarts=1)
        log(training, range(400, 411))
        training.finish()
        assert_whole(reborn, folder)
        # `wandb sync` of what lies there from before would send rows twice: it is marked as sent.
        logs = sorted(folder.glob("wandb/run-*/*.wandb"))
        # Two of them, or more where a slow machine has had W&B's service replaced once more.
        assert len(logs) >= 4
        assert all(Path(f"{log}.synced").exists() for log in logs[:-2])
        assert not any(Path(f"{log}.synced").exists() for log in logs[-2:])


def test_errors_for_a_while_lose_nothing(tmp_path: Path, server: Server) -> None:
    training = Training(tmp_path / "fleet")
    until(lambda: opened(server), 60)
    server.status = 500
    log(training, range(1, 40))
    threading.Timer(4, setattr, (server, "status", 200)).start()
    training.finish()
    assert_whole(server, tmp_path / "fleet")


def test_a_slow_server_delays_nobody(tmp_path: Path, server: Server) -> None:
    server.delay = 0.5
    began = time.monotonic()
    training = Training(tmp_path / "fleet")
    log(training, range(1, 200))
    assert time.monotonic() - began < 3
    training.finish()
    assert_whole(server, tmp_path / "fleet")


def test_a_hanging_server_cannot_hold_a_run_that_slurm_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(tmp_path / "fleet", artifacts=True)
    until(lambda: opened(server), 60)
    server.hanging.set()
    monkeypatch.setattr(uploader, "_STOP_SECONDS", 3)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100))
    began = time.monotonic()
    uploads.attach_weights(
        training.run.student(NAMES[0]), weights, 1, {"step": 1}
    )  # W&B's own call asks the server, and waits
    log(training, range(1, 100))
    assert time.monotonic() - began < 3
    began = time.monotonic()
    training.finish(128 + signal.SIGTERM)
    assert time.monotonic() - began < 15
    assert caplog.text.count("Nothing is lost") == 1


_STOPPED = """
import sys
from pathlib import Path
from mvat_dist.training.fault_tolerance import StopRequest
from tests.runs.test_uploader_online import log
from tests.wandb_runs import Training
from tests.waiting import until

stop = StopRequest()
stop.listen()
training = Training(Path(sys.argv[1]))
log(training, range(1, 4))
until(lambda: bool(stop.signal), 60)
training.finish(128 + stop.signal)
sys.exit(128 + stop.signal)
"""


def test_a_run_that_is_stopped_in_the_browser_hears_of_it(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "fleet"
    process = subprocess.Popen([sys.executable, "-c", _STOPPED, str(folder)])
    until(lambda: opened(server), 60)
    server.stopping = set(server.runs)
    assert process.wait(90) == 128 + signal.SIGINT
    assert_whole(server, folder)
    assert {run.exit_code for run in server.runs.values()} == {130}
    assert not any(run.preempting for run in server.runs.values())


@pytest.mark.usefixtures("server")
def test_a_refused_key_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "my-secret-that-is-too-short")
    training = Training(tmp_path / "fleet")
    log(training, range(1, 3))
    training.finish()
    assert_offline(tmp_path / "fleet")
    said = capfd.readouterr().err
    assert "cannot be used" in said
    told = [said.encode(), *(one.read_bytes() for one in tmp_path.rglob("*") if one.is_file())]
    assert not any(b"my-secret" in one for one in told)


def test_the_run_that_a_sweep_looks_at_is_the_one_its_agent_has_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    training = Training(tmp_path / "fleet", objective=NAMES[1])
    log(training, range(1, 3))
    training.finish()
    assert server.runs["trial1"].display_name == f"fleet/{NAMES[1]}"
    assert server.runs["trial1"].sweep == "sweep1"
    assert server.run(NAMES[0]).name != "trial1"
    assert server.run(NAMES[0]).sweep is None
