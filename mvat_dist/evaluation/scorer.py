"""Score many pairs in child processes, and survive the clips that end one.

PESQ's C code can end its process, and a rank must outlive it. So every score is computed in a child,
which reports each metric as it is done: when a child dies, the metric it was computing becomes a
failed score with the reason, and a new child goes on with the rest.

The children are plain interpreters, not `multiprocessing` ones: those import the parent's main module
again, and with it torch and DeepSpeed (seconds, and half a gigabyte each). They need no guard in the
caller's script and inherit nothing of a process group. A child ignores the signals that Slurm and a
terminal send to all processes of a job, and ends when its parent does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from mvat_dist.evaluation.metrics.registry import METRICS, Audio, Score

SECONDS_LIMIT = 300.0
"""Longest time for one metric of one clip, in seconds: far above what any takes on a busy machine."""

_PUNCTUAL_SECONDS = 1.0
"""A wait that ends so much later than asked for was interrupted."""

_READY = b"ready"
_SERVE = "from mvat_dist.evaluation.scorer import serve; serve({})"
_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Pair:
    """One estimate and its clean reference, float (T,) at 16 kHz."""

    estimate: Audio
    clean: Audio
    failure: str | None = None
    """Why it cannot be scored at all, where that is known already; then the audio is not looked at."""


@dataclass
class _Task:
    """A pair and how far its scores have come."""

    number: int
    pair: Pair
    left: list[str]
    scores: dict[str, Score] = field(default_factory=dict)
    killed: bool = False
    """Whether a child was killed over the metric that is next, as for lack of memory."""

    def done(self, score: Score) -> None:
        """Record the score of the metric that was being computed."""
        self.scores[self.left.pop(0)] = score
        self.killed = False


class _Child:
    """One scoring process and the task it works on."""

    def __init__(self, seconds: float) -> None:
        self.connection, theirs = Pipe()
        self._seconds = seconds
        # A clip is more than a pipe holds: sending one would wait for a suspended child for ever.
        with socket.socket(fileno=os.dup(self.connection.fileno())) as same:
            timeout = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        # A blocked mask outlives exec, so there is no moment at which a job's signal ends the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE.format(theirs.fileno())],
                env=_child_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # The child's end must be open in the child alone, or its death would go unnoticed.
            theirs.close()
        self.ready = False
        self.task: _Task | None = None
        self.begun = False
        """Whether the child has said that it has its task; the start of a child counts for its first task."""
        self.deadline = 0.0

    def assign(self, task: _Task) -> None:
        """Send `task`; a child that has died in the meantime is found by `receive`, one that takes nothing by
        its deadline."""
        self.task = task
        self.begun = not self.ready
        self.grant()
        try:
            self.connection.send_bytes(json.dumps(task.left).encode())
            for audio in (task.pair.estimate, task.pair.clean):
                self.connection.send_bytes(np.ascontiguousarray(audio, np.float32).tobytes())
        except OSError:
            pass

    def receive(self) -> bool:
        """Take one report of the child; False when it has died."""
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            return False
        if message == _READY:
            self.ready = self.begun = True
        elif self.task is not None:
            self.task.done(Score(*json.loads(message)))
        self.grant()
        return True

    def grant(self) -> None:
        """Give it all the time that a metric may take, from now on."""
        self.deadline = time.monotonic() + self._seconds

    def end(self) -> int:
        """Kill the child if it still runs; its exit code, negative for a signal."""
        self.process.kill()
        self.connection.close()
        return self.process.wait()


def _child_environment() -> dict[str, str]:
    # One thread each: the children themselves are the parallelism.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return {**os.environ, **threads, "PYTHONPATH": path}


def available_processes() -> int:
    """How many children the CPUs of this process can feed."""
    return len(os.sched_getaffinity(0))


def score_pairs(
    pairs: Iterable[Pair],
    metrics: Sequence[str],
    *,
    processes: int = 0,
    progress: Callable[[int], object] | None = None,
    seconds_limit: float = SECONDS_LIMIT,
) -> list[dict[str, Score]]:
    """Every metric of every pair, in the order of `pairs`; the rest is as in `score_as_done`.

    Args:
        progress: called with 1 after each finished pair.
    """
    scores: dict[int, dict[str, Score]] = {}
    for number, scored in score_as_done(pairs, metrics, processes=processes, seconds_limit=seconds_limit):
        scores[number] = scored
        if progress is not None:
            progress(1)
    return [scores[number] for number in range(len(scores))]


def score_as_done(
    pairs: Iterable[Pair],
    metrics: Sequence[str],
    *,
    processes: int = 0,
    seconds_limit: float = SECONDS_LIMIT,
) -> Iterator[tuple[int, dict[str, Score]]]:
    """(position in `pairs`, every metric) of each pair as soon as it is finished.

    Args:
        pairs: consumed in a thread as the children get free, so that a generator which runs a network
            computes the next estimate while the last ones are scored. At most two pairs per child are held.
        metrics: names from `METRICS`.
        processes: number of children; 0 takes one per available CPU.
        seconds_limit: time for one metric of one pair; a child that takes longer is ended.

    Raises:
        RuntimeError: children cannot start (the interpreter's own message is on stderr).
    """
    pool = _Pool(processes or available_processes(), seconds_limit)
    tasks = (_Task(number, pair, list(metrics)) for number, pair in enumerate(pairs))
    try:
        for task in pool.run(tasks):
            yield task.number, task.scores
    finally:
        pool.end()


class _Source:
    """Tasks that a thread computes one ahead, so that no child waits while a network is at work."""

    def __init__(self, tasks: Iterator[_Task]) -> None:
        self.exhausted = False
        self.awaited: list[Connection] = []
        """What becomes readable when the requested task is there; empty when none is requested."""
        self._tasks = tasks
        self._thread = ThreadPoolExecutor(1, "next-pair")
        self._arrival, self._bell = Pipe(duplex=False)
        self._coming: Future[_Task | None]

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._arrival.close()
        self._bell.close()

    def request(self) -> None:
        """Begin the next task, unless one is under way or all have been taken."""
        if not self.exhausted and not self.awaited:
            self.awaited = [self._arrival]
            self._coming = self._thread.submit(self._next)

    def _next(self) -> _Task | None:
        try:
            return next(self._tasks, None)
        finally:
            self._bell.send_bytes(_READY)

    def take(self) -> _Task | None:
        """The task that has arrived, or the error of computing it; None after the last one."""
        self.awaited = []
        self._arrival.recv_bytes()
        task = self._coming.result()
        self.exhausted = task is None
        return task


class _Pool:
    """Children that are started when there is work for them and replaced when they die."""

    def __init__(self, size: int, seconds_limit: float) -> None:
        self.size = size
        self.seconds_limit = seconds_limit
        self.children: list[_Child] = []
        self.waiting: deque[_Task] = deque()

    def run(self, tasks: Iterator[_Task]) -> Iterator[_Task]:
        """Yield tasks as they are finished."""
        with _Source(tasks) as source:
            while not source.exhausted or self.waiting or any(child.task for child in self.children):
                if len(self.waiting) < self.size:
                    source.request()
                self._assign()
                yield from self._collect(source)

    def _assign(self) -> None:
        while self.waiting:
            idle = next((child for child in self.children if child.task is None), None)
            if idle is None:
                if len(self.children) >= self.size:
                    return
                idle = _Child(self.seconds_limit)
                self.children.append(idle)
            idle.assign(self.waiting.popleft())

    def _collect(self, source: _Source) -> Iterator[_Task]:
        """Wait for a report, a new task or a deadline, and take what has come."""
        busy = {child.connection: child for child in self.children if child.task}
        deadline = min((child.deadline for child in busy.values()), default=None)
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        asked = time.monotonic()
        reported = wait([*busy, *source.awaited], patience)
        if patience is not None and time.monotonic() - asked > patience + _PUNCTUAL_SECONDS:
            # The job was suspended: the children had no more of that time than this process.
            for child in busy.values():
                child.grant()
        if source.awaited and source.awaited[0] in reported and (new := source.take()) is not None:
            if new.pair.failure is None:
                self.waiting.append(new)
            else:
                new.scores = dict.fromkeys(new.left, Score(None, new.pair.failure))
                yield new
        for connection, child in busy.items():
            alive = child.receive() if connection in reported else True
            if not alive or time.monotonic() > child.deadline:
                self._bury(child, timed_out=alive)
            task = child.task
            if task is not None and not task.left:
                child.task = None
                yield task

    def _bury(self, child: _Child, *, timed_out: bool) -> None:
        """Give the metric that ended `child` a failed score, and put the rest of its task first in line.

        Of a child that has died, or was stopped, while it was idle, the whole task is put there.
        """
        self.children.remove(child)
        code = child.end()
        # A Python error before the first clip would come back for every clip; a signal may hit anyone.
        if not child.ready and code > 0:
            raise RuntimeError(f"a scoring process could not start (exit code {code}); its message is above")
        task = child.task
        assert task is not None
        if code == -signal.SIGKILL and not timed_out and not task.killed:
            task.killed = True  # perhaps for lack of memory, which there may be the next time
        elif child.begun:
            late = f"took more than {self.seconds_limit:g} s"
            task.done(Score(None, late if timed_out else f"scorer died ({_cause(code)})"))
        if task.left:
            child.task = None
            self.waiting.appendleft(task)

    def end(self) -> None:
        for child in self.children:
            child.end()


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(descriptor: int) -> None:
    """A child's whole life: score what comes through the inherited pipe until the parent closes it.

    It says when it is there, when it has a clip, and each score.
    """
    connection = Connection(descriptor)
    connection.send_bytes(_READY)
    while True:
        try:
            names = json.loads(connection.recv_bytes())
            estimate, clean = (np.frombuffer(connection.recv_bytes(), np.float32) for _ in range(2))
            connection.send_bytes(_READY)
            for name in names:
                score = _score(name, estimate, clean)
                connection.send_bytes(json.dumps([score.value, score.failure]).encode())
        except (EOFError, OSError):
            return  # the parent is done, or gone


def _score(name: str, estimate: Audio, clean: Audio) -> Score:
    np.random.seed(0)  # pystoi adds noise of 1e-16 from the global generator
    try:
        return METRICS[name].compute(estimate, clean)
    except Exception as error:  # a metric's package may raise anything; one clip must not end the run
        return Score(None, f"{type(error).__name__}: {error}")
