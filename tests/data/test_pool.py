"""The map over processes: ordered, bounded, and with an end whatever happens."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvat_dist.data.prepare.pool import processes
from mvat_dist.errors import UserError
from tests.conftest import REPOSITORY


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

    with processes(count) as run:
        results = run(_square, jobs(), chunk)
        for number, result in enumerate(results):
            assert result == number * number
            assert taken <= number + chunk * (4 * count + 1)
    assert taken == 500


def test_a_killed_worker_ends_the_map() -> None:
    with pytest.raises(UserError, match="a worker process was killed"), processes(2) as run:
        list(run(_die, range(20)))


SIGNALS = ("USR1", "USR2", "TERM", "INT")


def _signalled(number: int) -> int:
    """The number, once another process has sent this one every signal of Slurm."""
    for name in SIGNALS if number % 5 == 0 else ():
        subprocess.run(["sh", "-c", f"kill -{name} {os.getpid()}"], check=True)
    return number


def test_the_signals_of_slurm_are_the_parent_s() -> None:
    """Slurm sends them to all processes of a job before its time is up."""
    with processes(2) as run:
        assert list(run(_signalled, range(40), 3)) == list(range(40))


WORK = """
import os, time
from mvat_dist.data.pack.pool import processes

if __name__ == "__main__":
    with processes(2) as run:
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
