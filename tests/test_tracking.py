"""The record: JSONL is the truth, W&B mirrors it offline, and nothing is needed for either."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvat_dist import tracking
from mvat_dist.config import TrackConfig
from mvat_dist.tracking import History, Tracker
from tests.wandb_server import Server, listening


def rows_of(file: Path) -> list[dict[str, Any]]:
    """History rows of an offline run, read with W&B's own command."""
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [wandb, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True, timeout=60
    )
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [record["history"]["item"] for record in records if record.get("type") == "history"]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_rewind_forgets_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    for step in range(1, 6):
        history.append({"step": step, "loss": 1.0 / step})
    with history.path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    history.rewind(3)
    history.append({"step": 4, "loss": 9.0})
    assert [row["step"] for row in history.rows()] == [1, 2, 3, 4]
    assert history.rows()[-1]["loss"] == 9.0


def test_one_offline_run_per_student_holds_the_same_rows(tmp_path: Path) -> None:
    names = ("manner-s-0.9gf", "manner-s-0.6gf")
    tracker = Tracker(tmp_path / "run", {name: tmp_path / "run" / f"{name}.jsonl" for name in names})
    (tmp_path / "run").mkdir()
    tracker.connect(TrackConfig(), {"seed": 0})
    for step in (10, 20):
        for place, name in enumerate(names):
            tracker.log(name, step, loss=step + place / 2, time={"data": 0.25})
    tracker.finish()
    for place, name in enumerate(names):
        expected = [{"step": step, "loss": step + place / 2} for step in (10, 20)]
        lines = [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()]
        assert [{"step": row["step"], "loss": row["loss"]} for row in lines] == expected
        file = next(
            (tmp_path / "run" / "wandb").glob(f"offline-run-*-run-{name.replace('.', '-')}-*/*.wandb")
        )
        mirrored = rows_of(file)
        assert [{"step": row["step"], "loss": row["loss"]} for row in mirrored] == expected


def test_damage_in_the_middle_costs_the_damaged_lines_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = History(tmp_path / "history.jsonl")
    whole = [json.dumps({"step": step}) for step in range(1, 6)]
    # What file systems leave after a power cut: a half row, zeros, a scalar; and a torn last line.
    lines = [whole[0], '{"step": 9, "lo', whole[1], "\0" * 20, "17", "\udcff", *whole[2:]]
    history.path.write_text("\n".join(lines) + '\n{"step": 6', errors="surrogateescape")
    history.rewind(4)
    assert [row["step"] for row in history.rows()] == [1, 2, 3, 4]
    assert [record.args[1] for record in caplog.records if isinstance(record.args, tuple)] == [2, 4, 5, 6]
    assert str(history.path) in caplog.text


def test_a_strict_reader_takes_a_record_with_nan(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    history = History(tmp_path / "history.jsonl")
    history.path.write_text('{"step": 1, "loss": NaN}\n')  # as older versions wrote it
    history.append({"step": 2, "loss": math.inf, "time": {"data": -math.inf, "step": 0.5}})
    history.rewind(2)
    rows = [json.loads(line, parse_constant=refuse) for line in history.path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "time": {"data": None, "step": 0.5}},
    ]


def test_equal_names_are_different_runs_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    for owner in ("ann", "ann", "bob"):
        folder = tmp_path / owner / "teacher-demo"
        folder.mkdir(parents=True, exist_ok=True)
        tracker = Tracker(folder, {"teacher": folder / "history.jsonl"})
        tracker.connect(TrackConfig(wandb="offline"), {})
        tracker.finish()
    ids = {
        owner: {file.stem for file in (tmp_path / owner).glob("teacher-demo/wandb/offline-run-*/*.wandb")}
        for owner in ("ann", "bob")
    }
    assert len(list((tmp_path / "ann").glob("teacher-demo/wandb/offline-run-*"))) == 2
    assert len(ids["ann"]) == len(ids["bob"]) == 1
    assert ids["ann"] != ids["bob"]


_STRUCK = """
import logging, sys
from pathlib import Path
import psutil
from mvat_dist.config import TrackConfig
from mvat_dist.tracking import Tracker

logging.basicConfig(format="%(levelname)s %(message)s")
folder, signal = Path(sys.argv[1]), int(sys.argv[2])
tracker = Tracker(folder, {name: folder / f"{name}.jsonl" for name in "ab"})
tracker.connect(TrackConfig(wandb="offline"), {})
tracker.log("a", 1, loss=1.0)
children = psutil.Process().children(recursive=True)
assert "wandb-core" in [child.name() for child in children]
for child in children:
    child.send_signal(signal)
psutil.wait_procs(children, timeout=30)
for step in (2, 3):
    for name in "ab":
        tracker.log(name, step, loss=1.0 / step)
tracker.finish(143)
print("saved")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_record_goes_on_when_the_service_is_struck(tmp_path: Path, number: int) -> None:
    """Slurm signals every process of a step, and the service of W&B is one."""
    done = subprocess.run(
        [sys.executable, "-c", _STRUCK, tmp_path, str(int(number))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("WARNING") == 2  # one for each run
    assert [row["step"] for row in History(tmp_path / "a.jsonl").rows()] == [1, 2, 3]
    assert [row["step"] for row in History(tmp_path / "b.jsonl").rows()] == [2, 3]


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with listening() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


def test_runs_share_one_deadline_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb_server: Server
) -> None:
    wandb_server.silence = threading.Event()
    monkeypatch.setattr(tracking, "_UPLOAD_SECONDS", 3)
    names = ("a", "b", "c")
    tracker = Tracker(tmp_path, {name: tmp_path / f"{name}.jsonl" for name in names})
    tracker.connect(TrackConfig(), {})
    for name in names:
        tracker.log(name, 1, loss=1.0)
    assert len(list((tmp_path / "wandb").glob("run-*"))) == len(names)  # online, all of them
    begin = time.monotonic()
    tracker.finish()
    assert 2 < time.monotonic() - begin < 8


@pytest.mark.parametrize(
    ("exit_code", "preempted"), [(128 + signal.SIGTERM, True), (128 + signal.SIGUSR2, True), (1, False)]
)
def test_a_run_that_slurm_stops_counts_as_preempted(
    tmp_path: Path, wandb_server: Server, exit_code: int, preempted: bool
) -> None:
    """Else a sweep takes it for failed, and nobody goes on with it."""
    tracker = Tracker(tmp_path, {"a": tmp_path / "a.jsonl"})
    tracker.connect(TrackConfig(), {})
    tracker.log("a", 1, loss=1.0)
    tracker.finish(exit_code)
    assert any(sent.get("complete") for sent in wandb_server.taken)
    assert any(sent.get("preempting") for sent in wandb_server.taken) is preempted


def test_disabled_leaves_no_trace(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {"a": tmp_path / "a.jsonl"})
    tracker.connect(TrackConfig(wandb="disabled"), {})
    tracker.log("a", 1, loss=1.0)
    tracker.finish()
    assert not (tmp_path / "wandb").exists()
    assert (tmp_path / "a.jsonl").exists()


def test_an_unreachable_server_costs_seconds_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once
    tracker = Tracker(tmp_path, {"a": tmp_path / "a.jsonl"})
    tracker.connect(TrackConfig(), {})
    tracker.log("a", 1, loss=1.0)
    tracker.finish()
    assert "offline" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))
