"""``python -m mvat_dist.sync`` against a stand-in for W&B's server: what it lacks, once; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvat_dist import sync
from mvat_dist.config import parser
from mvat_dist.config.schema import TrackConfig
from mvat_dist.errors import BusyError, UserError
from mvat_dist.io import write_json
from mvat_dist.runs import wandb_sync
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.lock import RunLock
from mvat_dist.runs.tracker import Tracker, described
from tests.runs.test_tracking_online import account
from tests.waiting import until
from tests.wandb_runs import same_rows
from tests.wandb_server import Server, listening, serving

NAMES = ("manner-s-0.9gf", "manner-s-0.6gf")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account and no wish."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.fixture
def part(tmp_path: Path) -> RunDir:
    """What a training has left in a folder with a space."""
    run = RunDir(tmp_path / "my fleet")
    for name in NAMES:
        run.student(name).mkdir(parents=True)
        run.history(name).write_text('{"step": 1, "loss": 0.5}\n')
    config = parser.parse([f"--student={','.join(NAMES)}", "--distil.method=none"])
    run.config.write_text(parser.to_yaml(config))
    write_json(run.environment, {"packages": {}})
    run.write_status("finished", 20)
    return run


def start(part: RunDir, **config: Any) -> Tracker:
    tracker = Tracker(part.path, {name: part.history(name) for name in NAMES})
    read = parser.parse(["--config", str(part.config)])
    tracker.connect(TrackConfig(**config), described(part, read))
    return tracker


def test_what_a_lost_server_lacks_is_sent_once(
    tmp_path: Path, part: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_sync, "_CONNECT_SECONDS", 2)
    monkeypatch.setattr(wandb_sync, "_UPLOAD_SECONDS", 2)
    command = [str(tmp_path / "my fleet")]
    with listening() as dying:
        account(monkeypatch, dying)
        tracker = start(part)
        until(lambda: len(dying.runs) == 2 and all(run.history for run in dying.runs.values()), 60)
    for step in range(2, 21):
        for name in NAMES:
            tracker.log(name, step, **{"loss": 1 / step, "time": {"data": 0.5}})
    tracker.finish()
    assert caplog.text.count("mvat_dist.sync") == 1
    with pytest.raises(UserError, match=r"has not taken all of .*same command"):
        sync.main(command)
    with serving(Server()) as reborn:
        reborn.runs = dying.runs
        account(monkeypatch, reborn)
        monkeypatch.setenv("WANDB_MODE", "offline")  # of the nodes; who types this wants it online
        for _ in range(2):
            sync.main(command)
            for name in NAMES:
                run = reborn.run(name)
                same_rows(run.history, part.history(name))
                assert (run.complete, run.exit_code) == (True, 0)
        # A part's students are the fleet's.
        assert {run.group for run in reborn.runs.values()} == {"my fleet"}
        assert {run.display_name for run in reborn.runs.values()} == {f"my fleet/{name}" for name in NAMES}
        assert reborn.run(NAMES[0]).config["student_name"]["value"] == NAMES[0]


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_attempt_leaves_nothing(part: RunDir, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    def left() -> dict[Path, Path]:
        places = [*part.path.glob("wandb"), *part.path.glob("wandb/*")]
        return {path: path.resolve(strict=True) for path in places}

    with serving(Server()) as server:
        account(monkeypatch, server)
        for _ in range(2):
            server.status = status
            before = left()
            with pytest.raises(UserError, match=r"has not taken all of .*same command"):
                sync.main([str(part.path)])
            assert left() == before
            server.status = 200
            sync.main([str(part.path)])
            assert any("run-" in path.name for path in left())
        for name in NAMES:
            same_rows(server.run(name).history, part.history(name))


def test_what_cannot_be_sent_is_refused(part: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [str(part.path)]
    with pytest.raises(UserError, match=r"holds no run: .*runs/fleet"):
        sync.main([str(part.path / "students")])
    training = RunLock(part.path, "train")
    assert training.acquire() is None
    with pytest.raises(BusyError, match="trained by process"):  # whatever else is the matter
        sync.main(command)
    assert training.held()
    training.release()
    with pytest.raises(UserError, match="no key for W&B: type `wandb login`"):
        sync.main(command)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start(part, wandb="offline").finish()
    with pytest.raises(UserError, match=r"offline all the time: `wandb sync --yes '.*my fleet"):
        sync.main(command)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"state": "finished"}, 0),
        ({"state": "stopped", "reason": "SIGTERM"}, 143),
        ({"state": "failed", "exit_code": 2, "reason": "the disk is full"}, 2),
        ({"state": "running"}, 1),
        ({}, 1),
    ],
)
def test_a_run_ends_at_wandb_as_it_has_ended(status: dict[str, Any], code: int) -> None:
    assert sync._ended(status) == code
