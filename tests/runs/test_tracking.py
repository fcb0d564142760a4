"""The record: JSONL is the truth, W&B mirrors it offline, and nothing is needed for either."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mvat_dist.config.schema import TrackConfig
from mvat_dist.errors import UserError
from mvat_dist.runs import wandb_mode
from mvat_dist.runs.history import History
from mvat_dist.runs.tracker import Tracker
from tests.wandb_runs import records, rows_in, rows_of, same_rows, synchronise
from tests.wandb_server import listening


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
        assert [{"step": row["global_step"], "loss": row["loss"]} for row in mirrored] == expected


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
import contextlib, logging, sys
from pathlib import Path
import psutil
from mvat_dist.config import TrackConfig
from mvat_dist.runs.tracker import Tracker
from tests.waiting import until

logging.basicConfig(format="%(levelname)s %(message)s")
folder, signal = Path(sys.argv[1]), int(sys.argv[2])
tracker = Tracker(folder, {name: folder / f"{name}.jsonl" for name in "ab"})
tracker.connect(TrackConfig(wandb="offline"), {})
tracker.log("a", 1, loss=1.0)
process = psutil.Process()
until(lambda: bool(list(folder.glob("wandb/*run-*-b-*/*.wandb"))), 60)
children = process.children(recursive=True)
for child in children:
    with contextlib.suppress(psutil.NoSuchProcess):  # what the service itself has started may be brief
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
    assert done.stderr == ""
    for name, steps in {"a": [1, 2, 3], "b": [2, 3]}.items():
        assert [row["step"] for row in History(tmp_path / f"{name}.jsonl").rows()] == steps
        logs = [records(log) for log in sorted(tmp_path.glob(f"wandb/offline-run-*-{name}-*/*.wandb"))]
        assert [row["global_step"] for log in logs for row in rows_in(log)] == steps
        last = {record["type"]: record for record in logs[-1] if "type" in record}
        assert "preempting" in last
        assert (last["exit"]["exit"]["exit_code"], last["run"]["run"]["tags"]) == (143, ["preempted"])


_LIFE = """
import os, sys
from pathlib import Path
from mvat_dist.config import TrackConfig
from mvat_dist.runs.tracker import Tracker
from tests.waiting import until
from tests.wandb_runs import summary_of

folder, done, last, life, end = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
logs = lambda: sorted(folder.glob("wandb/*run-*/*.wandb"))
before = len(logs())
tracker = Tracker(folder, {"a": folder / "a.jsonl"})
tracker.rewind({"a": done})
tracker.connect(TrackConfig(), {}, life)
for step in range(done + 1, last + 1):
    tracker.log("a", step, loss=1 / step, time={"data": 0.25})
    if step % 5 == 0:
        tracker.log("a", step, **{"valid/stoi": 1 - 1 / step})
if end == "killed when written":
    until(lambda: len(logs()) > before, 60)
    until(lambda: summary_of(logs()[-1])["summary"].get("valid/step") == last, 60, pause=0.5)
if end != "finished":
    os.killpg(0, 9)
tracker.finish()
"""


def live(folder: Path, done: int, last: int, life: int, end: str) -> None:
    """One start of a run that has done some steps, up to its last one."""
    command = [sys.executable, "-c", _LIFE, str(folder), str(done), str(last), str(life), end]
    process = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert process.returncode == (0 if end == "finished" else -signal.SIGKILL), process.stderr


def test_killed_and_requeued_offline_runs_become_one_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    live(folder, 0, 10, 0, "killed when written")
    live(folder, 6, 13, 1, "killed")  # what W&B had not written yet is lost there
    live(folder, 12, 15, 2, "killed when written")  # steps 13 to 15 again, once
    live(folder, 14, 18, 3, "finished")
    assert len(list(folder.glob("wandb/offline-run-*"))) >= 3
    with listening() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        synchronise(folder, server)
        (run,) = server.runs.values()
        same_rows(run.history, folder / "a.jsonl")
        assert [row["_step"] for row in run.history] == list(range(len(run.history)))
        assert (run.tags, run.summary["restarts"], run.exit_code) == (["requeued"], 3, 0)


_HUNG = """
import os, signal, sys, time
from pathlib import Path
import psutil
from mvat_dist.config import TrackConfig
from mvat_dist.runs.tracker import Tracker
from tests.waiting import until

folder = Path(sys.argv[1])
tracker = Tracker(folder, {"a": folder / "a.jsonl"})
tracker.connect(TrackConfig(), {})
process = psutil.Process()
until(lambda: bool(list(folder.glob("wandb/*run-*/*.wandb"))), 60)
process.children()[0].suspend()
slowest = 0.0
for step in range(1, 3001):
    began = time.monotonic()
    tracker.log("a", step, **{f"loss/{n}": 1.0 for n in range(40)})
    slowest = max(slowest, time.monotonic() - began)
began = time.monotonic()
tracker.finish(128 + signal.SIGTERM)
print(slowest, time.monotonic() - began)
"""


def test_a_hung_service_delays_nothing_and_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HUNG, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    slowest, finish = map(float, done.stdout.split())
    assert slowest < 5
    assert finish < 25
    assert len(History(tmp_path / "a.jsonl").rows()) == 3000
    assert done.stderr.count("Nothing is lost") == 1


@pytest.mark.parametrize(
    ("given", "variable", "key", "expected"),
    [
        ("online", "disabled", False, "online"),
        ("offline", "online", True, "offline"),
        ("disabled", "online", True, "disabled"),
        ("auto", "disabled", True, "disabled"),
        ("auto", "offline", True, "offline"),
        ("auto", None, True, "online"),
        ("auto", None, False, "offline"),
    ],
)
def test_the_users_word_counts_before_the_environment_and_that_before_credentials(
    monkeypatch: pytest.MonkeyPatch, given: Any, variable: str | None, key: bool, expected: str
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode.mode(TrackConfig(wandb=given)) == expected


def test_a_mode_that_wandb_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE is 'onlin': set it to online, offline or disabled"):
        wandb_mode.mode(TrackConfig())
    assert wandb_mode.mode(TrackConfig(wandb="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # as W&B called it once
    assert wandb_mode.mode(TrackConfig()) == "offline"


def test_a_choice_in_the_configuration_is_what_wandb_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(tmp_path, {"a": tmp_path / "a.jsonl"})
    tracker.connect(TrackConfig(wandb="offline"), {})
    tracker.log("a", 1, loss=1.0)
    tracker.finish()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    same_rows(rows_of(log), tmp_path / "a.jsonl")


def test_disabled_leaves_no_trace(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {"a": tmp_path / "a.jsonl"})
    tracker.connect(TrackConfig(wandb="disabled"), {})
    tracker.log("a", 1, loss=1.0)
    tracker.finish()
    assert not (tmp_path / "wandb").exists()
    assert (tmp_path / "a.jsonl").exists()
