"""The record: JSONL is the truth, W&B mirrors it offline, and nothing is needed for either."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mvat_dist.config import TrackConfig
from mvat_dist.tracking import History, Tracker


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
        file = next((tmp_path / "run" / "wandb").glob(f"offline-run-*-run-{name.replace('.', '-')}/*.wandb"))
        mirrored = rows_of(file)
        assert [{"step": row["step"], "loss": row["loss"]} for row in mirrored] == expected


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
