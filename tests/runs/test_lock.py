"""One writer per run folder: who gets the lock, who does not, and when a lock is dead."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError
from mvat_dist.runs import heartbeat, lock
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.heartbeat import Beat
from mvat_dist.runs.lock import RunLock
from mvat_dist.training.fault_tolerance import FaultTolerance

HOLD = """
import sys
from pathlib import Path
from mvat_dist.runs.lock import RunLock
taken = RunLock(Path(sys.argv[1]), sys.argv[2])
assert taken.acquire() is None
print(flush=True)
sys.stdin.read()
taken.release()
"""

# Tries as soon as it is told to; says whether it got the lock, and keeps it until told to end.
RACE = """
import sys
from pathlib import Path
from mvat_dist.runs.lock import RunLock
taken = RunLock(Path(sys.argv[1]), "train")
sys.stdin.readline()
print("lost" if taken.acquire() else "won", flush=True)
sys.stdin.readline()
"""


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def held(run: Path, purpose: str = "train") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `run`."""
    with process(HOLD, run, purpose) as other:
        assert other.stdout
        assert other.stdout.readline() == "\n"
        yield other


def forge(run: Path, **changes: object) -> None:
    """Make the lock's owner look as if it were elsewhere."""
    (file,) = (run / lock.FOLDER).glob("0*")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_living_owner_keeps_others_out_and_is_named(tmp_path: Path) -> None:
    with held(tmp_path) as other:
        owner = RunLock(tmp_path, "train").acquire()
        assert owner is not None
        assert f"process {other.pid} on " in str(owner)
        assert RunLock(tmp_path, "start").acquire(patience=10) == owner  # training is not waited for


def test_a_dead_owner_keeps_nobody_out(tmp_path: Path) -> None:
    with held(tmp_path) as other:
        other.kill()
        other.wait()
    taken = RunLock(tmp_path, "train")
    assert taken.acquire() is None
    assert taken.held()
    taken.release()
    assert lock.holder(tmp_path) is None


def test_a_process_that_has_the_dead_ones_number_is_not_taken_for_it(tmp_path: Path) -> None:
    taken = RunLock(tmp_path, "train")
    assert taken.acquire() is None
    forge(tmp_path, born="1", token="other")
    assert RunLock(tmp_path, "train").acquire() is None


def test_a_submission_is_waited_for(tmp_path: Path) -> None:
    with held(tmp_path, "start") as other:
        found: list[object] = []
        waiting = RunLock(tmp_path, "train")
        thread = threading.Thread(target=lambda: found.append(waiting.acquire(patience=60)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert other.stdin
        other.stdin.close()
        thread.join(60)
        assert found == [None]


@pytest.mark.parametrize("content", ["", "{}", "\0" * 64, '{"token": "a'])
def test_an_empty_or_torn_file_means_that_the_lock_is_free(tmp_path: Path, content: str) -> None:
    assert RunLock(tmp_path, "train").acquire() is None
    (file,) = (tmp_path / lock.FOLDER).glob("0*")
    file.write_text(content)
    assert RunLock(tmp_path, "train").acquire() is None


@pytest.mark.parametrize("changes", [{"born": None}, {"pid": "12"}, {"purpose": "score"}])
def test_a_lock_whose_owner_cannot_be_read_is_not_taken(tmp_path: Path, changes: dict[str, object]) -> None:
    with held(tmp_path):
        forge(tmp_path, **changes)
        with pytest.raises(UserError, match="lock/00000001 is damaged"):
            RunLock(tmp_path, "train").acquire()
        assert [file.name for file in (tmp_path / lock.FOLDER).iterdir()] == ["00000001"]


@pytest.mark.parametrize("before", ["nothing", "free", "dead"])
def test_of_many_that_start_at_once_one_trains(tmp_path: Path, before: str) -> None:
    if before != "nothing":
        with held(tmp_path) as other:
            if before == "dead":
                other.kill()
            other.communicate()
    rounds = []
    starters = [process(RACE, tmp_path) for _ in range(6)]
    entered = [one.__enter__() for one in starters]
    for one in entered:
        assert one.stdin
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in entered:
        assert one.stdout
        rounds.append(one.stdout.readline().strip())
    for one in starters:
        one.__exit__(None, None, None)
    assert sorted(rounds) == ["lost"] * 5 + ["won"]


def test_a_launcher_hands_its_lock_to_its_training_and_frees_it_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = RunLock(tmp_path, "train")
    assert launcher.acquire() is None
    monkeypatch.setenv(lock.INHERITED, launcher.token)
    with held(tmp_path) as training:
        owner = lock.holder(tmp_path)
        assert owner is not None
        assert owner.pid == training.pid
        assert not launcher.held()
    launcher.release()
    assert lock.holder(tmp_path) is None


def test_another_rank_that_leaves_first_frees_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks of a launcher have its token; rank 0 would take itself for one who has lost the folder."""
    monkeypatch.setenv(lock.INHERITED, "token")
    run, place = RunDir(tmp_path), Ranks(0, 2, 0, 2, 0, 1, "127.0.0.1", 1, "local")
    zero = RunLock(run.path, "train")
    assert zero.acquire() is None
    FaultTolerance(run, dataclasses.replace(place, rank=1, local_rank=1), 60.0).close()
    assert zero.held()
    FaultTolerance(run, place, 60.0).close()
    assert not zero.held()


def test_who_lost_the_lock_notices_and_does_not_free_anothers(tmp_path: Path) -> None:
    first = RunLock(tmp_path, "train")
    assert first.acquire() is None
    forge(tmp_path, born="1", token="other")
    with held(tmp_path) as other:
        assert not first.held()
        first.release()
        owner = lock.holder(tmp_path)
        assert owner is not None
        assert owner.pid == other.pid


def test_a_folder_made_for_nothing_goes(tmp_path: Path) -> None:
    taken = RunLock(tmp_path / "runs" / "one", "train")
    assert taken.acquire() is None
    taken.release()
    assert list(tmp_path.iterdir()) == []
    assert taken.acquire() is None
    (tmp_path / "runs" / "one" / "STATUS").touch()
    taken.release()
    assert lock.holder(tmp_path / "runs" / "one") is None


def elsewhere(run: Path, **changes: object) -> None:
    """A lock whose owner is on a machine that cannot be asked."""
    assert RunLock(run, "train").acquire() is None
    forge(run, boot="another machine", host="far", token="other", **changes)


def test_a_run_with_a_heartbeat_on_another_machine_is_alive(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    beats = heartbeat.Heartbeat(tmp_path, "other", lambda: (1, "training", 0.0, 10.0))
    heartbeat.write(tmp_path, Beat("other", 0, 0.0, 1, "training", 0.0, 10.0))
    os.utime(tmp_path / heartbeat.NAME, (0, 0))  # file times say nothing
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(RunLock(tmp_path, "train").acquire(silence=60)))
    thread.start()
    beats.start()
    thread.join(60)
    beats.stop()
    assert "on far" in str(found[0])


def test_on_another_machine_silence_is_death(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    now = time.time()
    heartbeat.write(tmp_path, Beat("other", 7, now, 1, "training", 0.0, 10.0))  # as fresh as can be
    assert RunLock(tmp_path, "train").acquire(silence=1) is None


def test_a_restarted_job_takes_over_from_its_former_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path, job="77", restart=1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    began = time.monotonic()
    assert RunLock(tmp_path, "train").acquire(silence=600) is None
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        (r"printf 'PENDING\tNone\tx\n'", True),
        (r"printf 'TIMEOUT\tNone\tx\n'", True),
        (r"printf 'RUNNING\tNone\tx\n'", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_slurm_knows_whether_an_owners_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, gone: bool
) -> None:
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    elsewhere(tmp_path / "run", job="77")
    owner = lock.holder(tmp_path / "run")
    assert owner is not None
    assert (lock.why_gone(owner) is not None) is gone
