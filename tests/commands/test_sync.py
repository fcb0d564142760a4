"""``python -m mvat_dist.sync`` against a stand-in for W&B's server: what it lacks, once; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvat_dist import sync
from mvat_dist.errors import BusyError, UserError
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.lock import RunLock
from tests.runs.test_uploader_online import account
from tests.waiting import until
from tests.wandb_runs import NAMES, Training, hurry, prepare, same_rows
from tests.wandb_server import Server, listening, serving


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account and no wish."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """What a training has left, in a folder with a space."""
    run = prepare(tmp_path / "my students")
    for name in NAMES:
        run.history(name).write_text('{"step": 1, "loss": 0.5}\n')
    run.write_status("finished", 20)
    return run


def test_what_a_lost_server_lacks_is_sent_once(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    hurry(monkeypatch, connect=3, upload=3)
    command = [str(run.path)]
    with listening() as dying:
        account(monkeypatch, dying)
        training = Training(run.path, done=1)
        until(lambda: len(dying.runs) == 2 and all(copy.history for copy in dying.runs.values()), 60)
    for step in range(2, 21):
        for name in NAMES:
            training.log(name, step, **{"loss": 1 / step, "time": {"data": 0.5}})
    training.finish()
    run.write_status("finished", 20)
    assert (caplog.text + capfd.readouterr().err).count("mvat_dist.sync") == 1
    with pytest.raises(UserError, match=r"has not taken all of .*same command"):
        sync.main(command)
    hurry(monkeypatch)
    with serving(Server()) as reborn:
        reborn.runs = dying.runs
        account(monkeypatch, reborn)
        monkeypatch.setenv("WANDB_MODE", "offline")  # of the nodes; who types this wants it online
        for _ in range(2):
            sync.main(command)
            for name in NAMES:
                copy = reborn.run(name)
                same_rows(copy.history, run.history(name))
                assert (copy.complete, copy.exit_code) == (True, 0)
        assert {copy.group for copy in reborn.runs.values()} == {"my students"}
        assert {copy.display_name for copy in reborn.runs.values()} == {f"my students/{n}" for n in NAMES}
        assert reborn.run(NAMES[0]).config["student_name"]["value"] == NAMES[0]


@pytest.mark.parametrize("status", [401, 404])
def test_a_refused_attempt_leaves_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    def left() -> dict[Path, Path]:
        places = [*run.path.glob("wandb"), *run.path.glob("wandb/*")]
        return {path: path.resolve(strict=True) for path in places}

    with serving(Server()) as server:
        account(monkeypatch, server)
        for _ in range(2):
            server.status = status
            before = left()
            with pytest.raises(UserError, match=r"has not taken all of .*same command"):
                sync.main([str(run.path)])
            assert left() == before
            server.status = 200
            sync.main([str(run.path)])
            assert any("run-" in path.name for path in left())
        for name in NAMES:
            same_rows(server.run(name).history, run.history(name))


def test_what_cannot_be_sent_is_refused(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [str(run.path)]
    with pytest.raises(UserError, match=r"holds no run: .*runs/students"):
        sync.main([str(run.path / "students")])
    training = RunLock(run.path, "train")
    assert training.acquire() is None
    with pytest.raises(BusyError, match="trained by process"):  # whatever else is the matter
        sync.main(command)
    assert training.held()
    training.release()
    with pytest.raises(UserError, match="no key for W&B: type `wandb login`"):
        sync.main(command)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    Training(run.path, done=1, wandb="offline").finish()
    with pytest.raises(UserError, match=r"offline all the time: `wandb sync --yes '.*my students"):
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
