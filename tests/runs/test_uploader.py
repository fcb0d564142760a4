"""The uploader process without a server: an offline copy with the same rows, whatever is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mvat_dist.runs.history import History
from mvat_dist.runs.lock import RunLock
from tests.waiting import until
from tests.wandb_runs import NAMES, Training, records, rows_in, rows_of, same_rows, synchronise
from tests.wandb_server import listening


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_one_offline_run_per_student_holds_the_same_rows(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    for step in (10, 20):
        for place, name in enumerate(NAMES):
            training.log(name, step, loss=step + place / 2, time={"data": 0.25})
    training.finish()
    for place, name in enumerate(NAMES):
        expected = [(step, step + place / 2) for step in (10, 20)]
        assert [(row["step"], row["loss"]) for row in training.histories[name].rows()] == expected
        (log,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-run-{name.replace('.', '-')}-*/*.wandb")
        assert [(row["global_step"], row["loss"]) for row in rows_of(log)] == expected


def test_equal_names_are_different_runs_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    for owner in ("ann", "ann", "bob"):
        Training(tmp_path / owner / "teacher-demo", names=NAMES[:1], wandb="offline").finish()
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
from mvat_dist.launch import uploader as uploader_process
from tests.waiting import until
from tests.wandb_runs import NAMES, Training

logging.basicConfig(format="%(levelname)s %(message)s")
folder, signal, everybody = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "all"
training = Training(folder, wandb="offline")
training.log(NAMES[0], 1, loss=1.0)
until(lambda: bool(list(folder.glob("wandb/*run-*-0-6gf-*/*.wandb"))), 60)
uploader = psutil.Process(training.uploader.pid)
struck = uploader.children(recursive=True)
for process in [uploader] * everybody + struck:
    with contextlib.suppress(psutil.NoSuchProcess):  # what the service itself has started may be brief
        process.send_signal(signal)
psutil.wait_procs(struck, timeout=30)
for step in (2, 3):
    for name in NAMES:
        training.log(name, step, loss=1.0 / step)
uploader_process._STOP_SECONDS = 30  # a busy machine starts the service slowly
training.finish(143)
print("saved")
"""


@pytest.mark.parametrize(
    ("number", "struck"),
    [(signal.SIGTERM, "all"), (signal.SIGUSR2, "all"), (signal.SIGINT, "all"), (signal.SIGTERM, "service"),
     (signal.SIGKILL, "service")],
)  # fmt: skip
def test_the_copy_goes_on_when_slurm_signals_everybody_or_the_service_is_killed(
    tmp_path: Path, number: int, struck: str
) -> None:
    """Slurm signals every process of a step: the uploader, and the service of W&B."""
    done = subprocess.run(
        [sys.executable, "-c", _STRUCK, tmp_path, str(int(number)), struck],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert "W&B" not in done.stderr
    for name, steps in {NAMES[0]: [1, 2, 3], NAMES[1]: [2, 3]}.items():
        assert [
            row["step"] for row in History(tmp_path / "students" / name / "history.jsonl").rows()
        ] == steps
        slug = name.replace(".", "-")
        logs = [records(log) for log in sorted(tmp_path.glob(f"wandb/offline-run-*-{slug}-*/*.wandb"))]
        assert [row["global_step"] for log in logs for row in rows_in(log)] == steps
        last = {record["type"]: record for record in logs[-1] if "type" in record}
        assert "preempting" in last
        assert (last["exit"]["exit"]["exit_code"], last["run"]["run"]["tags"]) == (143, ["preempted"])


_LIFE = """
import os, sys
from pathlib import Path
from tests.waiting import until
from tests.wandb_runs import NAMES, Training, summary_of

folder, done, last, life, end = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
logs = lambda: sorted(folder.glob("wandb/*run-*/*.wandb"))
before, name = len(logs()), NAMES[0]
training = Training(folder, done, life, names=[name])
for step in range(done + 1, last + 1):
    training.log(name, step, loss=1 / step, time={"data": 0.25})
    if step % 5 == 0:
        training.log(name, step, **{"valid/stoi": 1 - 1 / step})
if end == "killed when written":
    until(lambda: len(logs()) > before, 60)
    until(lambda: summary_of(logs()[-1])["summary"].get("valid/step") == last, 60, pause=0.5)
if end != "finished":
    os.killpg(0, 9)
training.finish()
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
        same_rows(run.history, folder / "students" / NAMES[0] / "history.jsonl")
        assert [row["_step"] for row in run.history] == list(range(len(run.history)))
        assert (run.tags, run.summary["restarts"], run.exit_code) == (["requeued"], 3, 0)


_HUNG = """
import signal, sys, time
from pathlib import Path
import psutil
from tests.waiting import until
from tests.wandb_runs import NAMES, Training

folder, hung = Path(sys.argv[1]), sys.argv[2]
training = Training(folder, names=NAMES[:1])
until(lambda: bool(list(folder.glob("wandb/*run-*/*.wandb"))), 60)
uploader = psutil.Process(training.uploader.pid)
processes = [uploader, *uploader.children()]
(processes[0] if hung == "uploader" else processes[1]).suspend()
slowest = 0.0
for step in range(1, 3001):
    began = time.monotonic()
    training.log(NAMES[0], step, **{f"loss/{n}": 1.0 for n in range(40)})
    slowest = max(slowest, time.monotonic() - began)
began = time.monotonic()
training.finish(128 + signal.SIGTERM)
seconds = time.monotonic() - began
print(slowest, seconds, len(psutil.wait_procs(processes, timeout=5)[1]))
"""


@pytest.mark.parametrize("hung", ["uploader", "service"])
def test_what_hangs_delays_nothing_and_is_ended(tmp_path: Path, hung: str) -> None:
    command = [sys.executable, "-c", _HUNG, str(tmp_path), hung]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    slowest, finish, left = map(float, done.stdout.split())
    assert slowest < 5
    assert finish < 25
    assert left == 0
    assert len(History(tmp_path / "students" / NAMES[0] / "history.jsonl").rows()) == 3000
    assert done.stderr.count("Nothing is lost") == 1


_GONE = """
import os, sys
from pathlib import Path
import psutil
from tests.waiting import until
from tests.wandb_runs import NAMES, Training

folder = Path(sys.argv[1])
training = Training(folder, names=NAMES[:1])
until(lambda: bool(list(folder.glob("wandb/*run-*/*.wandb"))), 60)
uploader = psutil.Process(training.uploader.pid)
print(uploader.pid, *[child.pid for child in uploader.children()], flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_training_leaves_no_process(tmp_path: Path) -> None:
    """Else two would send the rows of the next start."""
    command = [sys.executable, "-c", _GONE, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=90)
    processes = [int(number) for number in done.stdout.split()]
    assert len(processes) == 2
    until(lambda: not any(psutil.pid_exists(number) for number in processes), 10)


def test_a_run_that_another_training_has_taken_over_is_left_alone(tmp_path: Path) -> None:
    training = Training(tmp_path, names=NAMES[:1])
    until(lambda: bool(list(tmp_path.glob("wandb/*run-*/*.wandb"))), 60)
    other = RunLock(tmp_path, "train")
    assert other.acquire() is None
    uploader = training.uploader
    assert uploader
    until(lambda: not uploader.is_running, 10)
    other.release()


def test_a_choice_in_the_configuration_is_what_wandb_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    training = Training(tmp_path, names=NAMES[:1], wandb="offline")
    training.log(NAMES[0], 1, loss=1.0)
    training.finish()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    same_rows(rows_of(log), training.run.history(NAMES[0]))


def test_disabled_leaves_no_trace(tmp_path: Path) -> None:
    training = Training(tmp_path, names=NAMES[:1], wandb="disabled")
    training.log(NAMES[0], 1, loss=1.0)
    training.finish()
    assert not (tmp_path / "wandb").exists()
    assert training.uploader is None
    assert training.run.history(NAMES[0]).exists()
