"""The process pool: ordered and bounded, and a task that fails, dies or hangs costs only itself."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mvat_dist.data import pool as pool_module
from mvat_dist.data.pool import (
    ProcessPool,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerStartError,
    parallel_map,
)
from mvat_dist.data.workers import main_module_hidden
from mvat_dist.errors import UserError
from tests.conftest import REPOSITORY
from tests.waiting import until


def _square(number: int) -> int:
    return number * number


def _die(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 4])
def test_results_come_in_order_and_jobs_are_taken_as_needed(count: int, chunk: int) -> None:
    """Hundreds of thousands of jobs must not wait in memory, nor their results."""
    taken = 0

    def jobs() -> Iterator[int]:
        nonlocal taken
        for number in range(500):
            taken += 1
            yield number

    with parallel_map(count) as run:
        results = run(_square, jobs(), chunk)
        for number, result in enumerate(results):
            assert result == number * number
            assert taken <= number + chunk * (4 * count + 1)
    assert taken == 500


def test_a_killed_worker_ends_the_map() -> None:
    with pytest.raises(UserError, match="a worker process was killed"), parallel_map(2) as run:
        list(run(_die, range(20)))


SIGNALS = ("USR1", "USR2", "TERM", "INT")


def _signalled(number: int) -> int:
    """The number, once another process has sent this one every signal of Slurm."""
    for name in SIGNALS if number % 5 == 0 else ():
        subprocess.run(["sh", "-c", f"kill -{name} {os.getpid()}"], check=True)
    return number


def test_the_signals_of_slurm_are_the_parent_s() -> None:
    """Slurm sends them to all processes of a job before its time is up."""
    with parallel_map(2) as run:
        assert list(run(_signalled, range(40), 3)) == list(range(40))


def _hard(number: int) -> int:
    """Dies at 3, hangs at 5, fails at 7."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 5:
        time.sleep(600)
    if number == 7:
        raise LookupError("seven")
    return number


def test_a_crash_a_hang_and_an_error_cost_one_task_each() -> None:
    with ProcessPool(2) as pool:
        outcomes = dict(pool.as_completed(_hard, range(12), timeout=2.0))
    assert [*sorted(outcomes)] == [*range(12)]
    assert {number: one for number, one in outcomes.items() if number not in (3, 5, 7)} == {
        number: number for number in range(12) if number not in (3, 5, 7)
    }
    assert isinstance(outcomes[3], WorkerDiedError)
    assert str(outcomes[3]) == "worker died (SIGSEGV)"
    assert isinstance(outcomes[5], TaskTimeoutError)
    assert str(outcomes[5]) == "took more than 2 s"
    assert isinstance(outcomes[7], LookupError)
    assert outcomes[7].args == ("seven",)


def _exit_zero(number: int) -> int:
    if number == 3:
        os._exit(0)
    return number


def test_a_worker_that_ends_with_exit_code_0_within_a_task_costs_that_task() -> None:
    with ProcessPool(2) as pool:
        outcomes = dict(pool.as_completed(_exit_zero, range(8)))
    died = outcomes.pop(3)
    assert isinstance(died, WorkerDiedError)
    assert str(died) == "worker died (exit code 0)"
    assert outcomes == {number: number for number in range(8) if number != 3}


def _worker(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_is_suspended_idle_costs_nothing(
    sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_STALL_SECONDS", 5.0)
    handed_out = threading.Event()

    def jobs() -> Iterator[int]:
        yield 0
        assert handed_out.wait(60)
        yield from range(1, 5)

    with ProcessPool(1) as pool:
        results = pool.as_completed(_worker, jobs())
        _, first = next(results)
        assert isinstance(first, int)
        os.kill(first, sent)
        handed_out.set()
        others = dict(results)
    assert sorted(others) == [1, 2, 3, 4]
    assert all(isinstance(one, int) and one != first for one in others.values())


def test_results_come_while_the_next_job_is_computed() -> None:
    handed_out = threading.Event()

    def jobs() -> Iterator[int]:
        yield 0
        assert handed_out.wait(60), "the first result was held back"
        yield 1

    with ProcessPool(1) as pool:
        results = pool.as_completed(_square, jobs())
        assert next(results) == (0, 0)
        handed_out.set()
        assert list(results) == [(1, 1)]


def test_an_error_of_the_jobs_is_raised_and_ends_the_workers() -> None:
    def jobs() -> Iterator[int]:
        yield 0
        raise LookupError("the clip is gone")

    with pytest.raises(LookupError, match="the clip is gone"), ProcessPool(2) as pool:
        list(pool.as_completed(_square, jobs()))
    # A worker that was being started when the pool ended needs a moment to notice.
    until(lambda: not multiprocessing.active_children(), 60, "a worker lives on")


_number = 0


def _set_number(number: int) -> None:
    global _number
    _number = number


def _environment(name: str) -> tuple[str | None, int]:
    return os.environ.get(name), _number


def test_workers_begin_with_the_initialiser_and_their_threads() -> None:
    with ProcessPool(1, initialiser=_set_number, arguments=(3,), threads=1) as pool:
        assert list(pool.map(_environment, ["OMP_NUM_THREADS"])) == [("1", 3)]


def test_workers_that_cannot_start_are_an_error() -> None:
    with (
        pytest.raises(UserError, match=r"could not start.*use fewer"),
        ProcessPool(1, initialiser=os._exit, arguments=(1,)) as pool,
    ):
        list(pool.as_completed(_square, [1]))


def _fail_second(first: Path) -> None:
    """Only the first worker gets the memory that it needs."""
    try:
        first.touch(exist_ok=False)
    except FileExistsError:
        raise MemoryError("no memory\nfor two") from None


def _meet(path: Path) -> str:
    """Ends once the other worker has failed its task, so that both take one."""
    while not path.exists():
        time.sleep(0.01)
    return "met"


def test_an_initialiser_that_fails_costs_the_tasks_of_its_worker(tmp_path: Path) -> None:
    """The other worker is busy meanwhile: pebble would start one failing worker after the other."""
    failed = tmp_path / "failed"
    with ProcessPool(2, initialiser=_fail_second, arguments=(tmp_path / "first",)) as pool:
        results = pool.as_completed(_meet, [failed, failed])
        _, error = next(results)
        assert isinstance(error, WorkerStartError)
        assert str(error) == "a worker process could not start: MemoryError: no memory"
        failed.touch()
        assert [outcome for _, outcome in results] == ["met"]


def test_an_initialiser_that_fails_ends_a_map(tmp_path: Path) -> None:
    (tmp_path / "first").touch()
    with (
        pytest.raises(UserError, match="could not start: MemoryError"),
        ProcessPool(1, initialiser=_fail_second, arguments=(tmp_path / "first",)) as pool,
    ):
        list(pool.map(_square, [1, 2]))


def test_the_main_module_is_back_after_two_threads_hid_it() -> None:
    """A pool replaces a worker from its own thread, perhaps while a loader starts its readers."""
    main = sys.modules["__main__"]
    here_ended = threading.Event()

    def hide() -> None:
        with main_module_hidden():
            here_ended.wait(20)

    other = threading.Thread(target=hide)
    with main_module_hidden():
        other.start()
        other.join(0.2)
    here_ended.set()
    other.join()
    assert sys.modules["__main__"] is main


def _write_then_hang(path: Path) -> None:
    path.write_text("half")
    time.sleep(600)


def test_cleanup_runs_in_a_worker_that_is_ended(tmp_path: Path) -> None:
    half = tmp_path / "half"
    with ProcessPool(1, cleanup=partial(Path.unlink, half)) as pool:
        ((_, outcome),) = pool.as_completed(_write_then_hang, [half], timeout=1.0)
    assert isinstance(outcome, TaskTimeoutError)
    assert not half.exists()


# Without a guard for __main__: workers do not import it.
WORK = """
import os, time
from mvat_dist.data.pool import parallel_map

with parallel_map(2) as run:
    numbers = set()
    while len(numbers) < 2:
        numbers |= set(run(os.path.realpath, ["/proc/self"] * 8))
    print(*(number.rpartition("/")[2] for number in numbers), flush=True)
    list(run(time.sleep, [600, 600]))
"""


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(WORK)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, str(script)], text=True, env=environment, **pipes) as parent:
        assert parent.stdout is not None
        ends = [os.pidfd_open(int(number)) for number in parent.stdout.readline().split()]
        assert len(ends) == 2
        parent.kill()
        for end in ends:
            assert select.select([end], [], [], 20)[0], "a worker outlived its parent"
            os.close(end)
