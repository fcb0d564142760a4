"""Hold the processes of a training still at a chosen step, do something to them, and see how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mvat_dist.launch import processes
from mvat_dist.runs.folder import RunDir
from tests import waiting

DEADLINE = 150.0
"""Seconds within which anything waited for has to come; whatever takes longer is a hang."""


class MissedError(Exception):
    """The moment was over before the processes could be held: try again."""


def until(true: Callable[[], bool], what: str, seconds: float = DEADLINE, pause: float = 0.05) -> float:
    """Wait until something is true; how long that took."""
    return waiting.until(true, seconds, what, pause)


def rows(run: RunDir) -> int:
    """Steps that the record of the slowest student holds."""
    counts = [file.read_bytes().count(b'"loss"') for file in run.students.glob("*/history.jsonl")]
    return min(counts, default=0)


def rank_of(pid: int) -> int | None:
    """The rank of a training process, from its environment."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(one[5:]) for one in variables if one.startswith(b"RANK=")), None)


def lives(pid: int) -> bool:
    """Whether a process is there, and more than its remains."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def pending(pid: int, number: int) -> bool:
    """Whether a signal has reached a process that is held."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def send(pids: Iterator[int] | list[int], number: int) -> None:
    """A signal to processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def await_rows(run: RunDir, step: int, alive: Callable[[], bool]) -> None:
    """Wait, alert, until `step` steps are recorded.

    Raises:
        MissedError: more are.
    """
    deadline = time.monotonic() + DEADLINE
    while (found := rows(run)) < step:
        assert alive(), f"ended after {found} of {step} steps"
        assert time.monotonic() < deadline, f"{found} of {step} steps after {DEADLINE:.0f} s"
        time.sleep(0.002 if found == step - 1 else 0.02)  # looking often takes time from the ranks
    if found > step:
        raise MissedError(f"step {found} instead of {step}")


def await_save(run: RunDir, alive: Callable[[], bool]) -> None:
    """Wait, wide awake, until the temporary folder of a checkpoint is there."""
    while not half_written(run):
        assert alive(), "it ended before a save was met"


def half_written(run: RunDir) -> list[str]:
    """Temporary folders of checkpoints."""
    try:
        return [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".step-")]
    except FileNotFoundError:
        return []


class Training:
    """A launcher and its ranks on this machine."""

    def __init__(self, run: RunDir, command: list[str], variables: dict[str, str], count: int) -> None:
        self.run = run
        self._processes = count
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        # A test that is ended leaves no ranks behind, stopped for ever: they end with their parent.
        self.process = processes.start(command, variables, log=self._log).process
        self._ranks: dict[int, int] = {}

    def alive(self) -> bool:
        return self.process.poll() is None

    def ranks(self) -> dict[int, int]:
        """Process ids by rank; the launcher has started them all."""
        if len(self._ranks) < self._processes:
            until(self._started, "all ranks are started")
        return self._ranks

    def _started(self) -> bool:
        assert self.alive(), self.words()
        alone = self._processes == 1
        found = {pid: 0 if alone else rank_of(pid) for pid in children(self.process.pid)}
        self._ranks = {rank: pid for pid, rank in found.items() if rank is not None}
        return len(self._ranks) == self._processes

    def hold_after(self, step: int) -> None:
        """Stop all ranks when `step` steps are recorded and the next one is not."""
        ranks = self.ranks()
        await_rows(self.run, step, self.alive)
        send(list(ranks.values()), signal.SIGSTOP)
        self._or_missed(rows(self.run) == step, f"step {rows(self.run)} instead of {step}")

    def hold_in_save(self, after: int) -> None:
        """Stop all ranks in the first save behind step `after`."""
        ranks = self.ranks()
        await_rows(self.run, after, self.alive)
        await_save(self.run, self.alive)
        send(list(ranks.values()), signal.SIGSTOP)
        self._or_missed(bool(half_written(self.run)) and rows(self.run) == after, "the save was complete")

    def _or_missed(self, held: bool, why: str) -> None:
        if not held:
            self.kill()
            raise MissedError(why)

    def release(self) -> None:
        send(list(self.ranks().values()), signal.SIGCONT)

    def kill(self) -> None:
        """End it all at once, as a machine without power."""
        send([self.process.pid, *self._ranks.values()], signal.SIGKILL)
        self.process.wait()
        until(lambda: not any(lives(pid) for pid in self._ranks.values()), "the ranks are gone")

    def words(self) -> str:
        """What launcher and rank 0 have printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def ended(self, *codes: int) -> str:
        """Wait for the end, which has to come with one of `codes`; what was said."""
        try:
            self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still there after {DEADLINE:.0f} s:\n{self.words()[-3000:]}") from None
        said = self.words()
        assert self.process.returncode in codes, f"exit code {self.process.returncode}:\n{said[-3000:]}"
        return said
