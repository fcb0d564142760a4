"""Local processes: each knows its rank, one failure ends all, and nothing outlives the launcher."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from mvat_dist.data.pool import available_cores
from mvat_dist.distributed import ranks
from mvat_dist.errors import EXIT_PORT
from mvat_dist.launch import processes
from tests.waiting import until

REPORT = """
import json, os, sys
from dataclasses import asdict
from mvat_dist.distributed import ranks
here = ranks.read()
kept = {"threads": os.environ.get("OMP_NUM_THREADS"), "left": os.environ.get("GROUP_RANK")}
print(json.dumps({**asdict(here), **kept}))
"""

# Says that it lives, then waits to be ended. Rank 0 has a child of its own, as a trainer has readers.
STAY = """
import os, pathlib, subprocess, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
if rank == "0":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "child.pid").write_text(str(child.pid))
(folder / f"{rank}.tmp").write_text(str(os.getpid()))
os.rename(folder / f"{rank}.tmp", folder / f"{rank}.pid")
time.sleep(600)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def launcher(command: list[str], count: int, logs: Path) -> list[str]:
    """A process that launches, as `mvat_dist.submit` does."""
    code = "import json, sys; from pathlib import Path; from mvat_dist.launch import processes; "
    code += "sys.exit(processes.run_ranks(json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))"
    return python(code, json.dumps(command), str(count), str(logs))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("*.pid")]


def test_every_rank_knows_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {"RANK": "7", "WORLD_SIZE": "9", "GROUP_RANK": "3"}.items():
        monkeypatch.setenv(name, value)  # left over from torchrun
    assert processes.run_ranks(python(REPORT), 3, tmp_path) == 0
    logs = [(tmp_path / f"rank-{rank}.log").read_text().splitlines()[-1] for rank in (1, 2)]
    reports = [json.loads(line) for line in [capfd.readouterr().out, *logs]]
    assert [
        (report["rank"], report["local_rank"], report["world_size"], report["launcher"]) for report in reports
    ] == [(rank, rank, 3, "local") for rank in range(3)]
    assert len({(report["master_address"], report["master_port"]) for report in reports}) == 1
    assert {report["threads"] for report in reports} == {str(max(1, available_cores() // 3))}
    assert {report["left"] for report in reports} == {None}


def test_one_process_is_a_process_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert processes.run_ranks(python(REPORT), 1, tmp_path / "logs") == 0
    assert json.loads(capfd.readouterr().out)["launcher"] == "single"
    assert not (tmp_path / "logs").exists()


def test_the_users_own_thread_count_is_kept() -> None:
    assert processes.rank_environment(0, 4, 1, {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


def test_a_launched_environment_reads_back() -> None:
    for rank in range(4):
        read = ranks.read(processes.rank_environment(rank, 4, 1234, {}))
        assert read == ranks.Ranks(rank, 4, rank, 4, 0, 1, "127.0.0.1", 1234, "local")


def test_one_failure_ends_all_and_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    code = "import os, sys; os.environ['RANK'] == '2' and sys.exit('bad luck');" + STAY
    assert processes.run_ranks(python(code, str(tmp_path)), 4, tmp_path) == 1
    errors = capfd.readouterr().err
    assert "rank 2 failed with exit code 1" in errors
    assert "bad luck" in errors
    assert not [pid for pid in pids(tmp_path) if alive(pid)]


def test_a_killed_rank_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    code = "import os; os.environ['RANK'] == '0' and os.kill(os.getpid(), 9);" + STAY
    assert processes.run_ranks(python(code, str(tmp_path)), 2, tmp_path) == 128 + signal.SIGKILL
    assert "rank 0 was ended: Killed (out of memory?)" in capfd.readouterr().err


def test_a_mistake_that_all_ranks_found_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import os, sys; os.environ['RANK'] == '0' and print('error: no', file=sys.stderr); sys.exit(2)"
    assert processes.run_ranks(python(code), 3, tmp_path) == 2
    assert capfd.readouterr().err == "error: no\n"


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_signals_reach_every_rank(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    # Each rank saves its state on the signal, which takes a moment, and leaves as the trainer does.
    stay = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def stop(number, frame):
    (folder / f"{rank}.saved").touch()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
(folder / f"{rank}.pid").write_text(str(os.getpid()))
time.sleep(600)
"""
    process = subprocess.Popen(
        launcher(python(stay, str(tmp_path)), 2, tmp_path), stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 20)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (code, "")
    assert len(list(tmp_path.glob("*.saved"))) == 2


def test_killing_the_launcher_leaves_no_rank(tmp_path: Path) -> None:
    process = subprocess.Popen(launcher(python(STAY, str(tmp_path)), 2, tmp_path))
    until(lambda: {"0.pid", "1.pid"} <= {file.name for file in tmp_path.glob("*.pid")}, 20)
    members = [int((tmp_path / f"{rank}.pid").read_text()) for rank in (0, 1)]
    process.kill()
    process.wait()
    until(lambda: not any(alive(pid) for pid in members), 20)
    os.kill(int((tmp_path / "child.pid").read_text()), signal.SIGKILL)


def test_a_port_that_another_program_took_is_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # What every rank does first: rank 0 looks at the port, the others would wait for it.
    meet = """
import os, sys, time
from mvat_dist import errors
from mvat_dist.distributed import process_group, ranks
code = errors.exit_code(lambda _: process_group.wait_for_port(ranks.read()))
if os.environ["RANK"] == "1" and os.environ["MASTER_PORT"] == sys.argv[1]:
    time.sleep(600)
sys.exit(code)
"""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        ports = iter([taken, ranks.free_port()])
        monkeypatch.setattr(processes, "free_port", lambda: next(ports))
        assert processes.run_ranks(python(meet, str(taken)), 2, tmp_path) == 0
    assert next(ports, None) is None
    assert "starting again" in capfd.readouterr().err


def test_a_signal_while_the_port_is_taken_ends_as_that_signal(tmp_path: Path) -> None:
    rank = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
(pathlib.Path(sys.argv[1]) / "0.pid").touch()
time.sleep(600)
"""
    command = python(rank, str(tmp_path), str(EXIT_PORT))
    process = subprocess.Popen(launcher(command, 1, tmp_path), stderr=subprocess.PIPE, text=True)
    until((tmp_path / "0.pid").exists, 20)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")


def test_killing_a_child_that_has_ended_harms_no_process_that_got_its_number() -> None:
    child = processes.start(["false"])
    child.process.wait()
    other = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
    try:
        until(lambda: bool(psutil.Process(other.pid).children()), 20)
        [sleeping] = psutil.Process(other.pid).children()
        child.process.pid = other.pid
        child.kill()
        assert not psutil.wait_procs([sleeping], timeout=0.3)[0]
    finally:
        sleeping.kill()
        other.wait()


def test_a_stop_signal_waits_for_somebody_to_read_it_and_names_its_sender() -> None:
    """In a process without other threads, which might take the signals."""
    code = """
import os, signal
from mvat_dist.launch.processes import StopSignal, StopSignals
handler = signal.getsignal(signal.SIGTERM)
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR2)
    read = {signals.wait(1.0), signals.wait(1.0)}
    assert signals.wait(0.0) is None
    os.kill(os.getpid(), signal.SIGINT)  # nobody reads it: it does no harm afterwards
assert read == {StopSignal(number, os.getpid()) for number in (signal.SIGTERM, signal.SIGUSR2)}, read
assert [received.number for received in signals.received[2:]] == [signal.SIGINT]
assert signal.getsignal(signal.SIGTERM) is handler
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
"""
    assert subprocess.run(python(code), check=False, timeout=20).returncode == 0


def test_a_stop_signal_that_another_thread_takes_is_not_lost() -> None:
    """Libraries start threads that block nothing: numpy does."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with processes.StopSignals() as signals:
            signal.pthread_kill(thread.ident or 0, signal.SIGTERM)
            assert signals.wait(1.0) == processes.StopSignal(signal.SIGTERM, None)
    finally:
        done.set()
        thread.join()


def test_what_nohup_ignores_stays_ignored() -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert processes.wait_for(processes.start(["true"]), signals) == 0
        assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_signal_from_before_the_start_is_passed_on_or_handed_over() -> None:
    with processes.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert processes.wait_for(processes.start(["sleep", "60"]), signals) == 128 + signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR2)
        handed_over: list[int] = []
        child = processes.start(["sleep", "0.3"])
        code = processes.wait_for(child, signals, lambda _, received: handed_over.append(received.number))
    assert (code, handed_over) == (0, [signal.SIGUSR2])


def test_a_command_is_waited_for_with_all_that_it_leaves_behind(tmp_path: Path) -> None:
    """In a process of its own: it adopts the orphans of its descendants for good."""
    orphan = f"(sleep 0.5; touch {tmp_path / 'saved'}) &"
    code = "import os, signal, sys, threading; from mvat_dist.launch import processes; "
    code += "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start(); "
    code += "sys.exit(processes.run_with_descendants(['sh', '-c', sys.argv[1]], os.environ))"
    done = subprocess.run(python(code, f"{orphan} exit 7"), timeout=20, check=False)
    assert done.returncode == 7
    assert (tmp_path / "saved").exists()


def test_what_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in the kernel's hands outlives SIGKILL; here one that is never signalled stands for it."""
    child = processes.start(["sleep", "60"])
    monkeypatch.setattr(processes, "_KILL_SECONDS", 0.1)
    with monkeypatch.context() as deaf:
        deaf.setattr(os, "killpg", lambda *_: None)
        child.kill()
    assert child.exit_code() is None
    child.kill()
