"""Worker processes for packing, caching, enhancing and scoring, on pebble's process pool.

A worker that dies or takes too long costs its own task and is replaced. Workers are spawned, because a fork
of a process with threads (torch, NCCL, progress bars) can lock up. They do not import the parent's main
module, which is torch and DeepSpeed for most commands, and callers need no ``__main__`` guard; so `function`
and the initialiser must come from a module that can be imported. Workers leave Ctrl-C and the signals of
Slurm to their parent, and end when it does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import pebble

from mvat_dist.data.workers import follow_parent, main_module_hidden, signals_blocked
from mvat_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_POLL_SECONDS = 1.0
_STALL_SECONDS = 300.0
"""A pool of which no worker takes a waiting task for so long is replaced: its workers are suspended."""
_MOST_RESTARTS = 3
"""Replacements of the whole pool without one finished task in between."""
_EXIT_ZERO = 256
"""Stands for a worker's exit code 0 towards pebble, which takes 0 for a worker that it ended itself."""


class WorkerDiedError(Exception):
    """The worker ended while it computed this task: killed, out of memory, or crashed in C code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code
        """As of `multiprocessing`: negative for a signal."""

    def __str__(self) -> str:
        cause = signal.Signals(-self.exit_code).name if self.exit_code < 0 else f"exit code {self.exit_code}"
        return f"worker died ({cause})"


class WorkerStartError(UserError):
    """The initialiser failed in the worker that took this task, most often because memory ran out."""


class TaskTimeoutError(Exception):
    """The task took longer than it may; its worker was ended."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"took more than {self.seconds:g} s"


class Map(Protocol):
    """Results of ``function(job)`` in the order of the jobs, computed `chunk` jobs at a time."""

    def __call__(
        self, function: Callable[[Job], Result], jobs: Iterable[Job], chunk: int = 1
    ) -> Iterator[Result]: ...


@contextmanager
def parallel_map(workers: int) -> Iterator[Map]:
    """Yield a map over `workers` processes (0: one per core that this process may use; 1: no other process).

    Raises:
        UserError: a worker was killed, most often because memory ran out, or workers cannot start.
    """
    workers = workers or available_cores()
    if workers == 1:
        yield lambda function, jobs, chunk=1: map(function, jobs)  # noqa: ARG005
        return
    with ProcessPool(workers) as pool:
        yield pool.map


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


class ProcessPool:
    """Run a function over many jobs in worker processes; a context manager that ends them.

    Args:
        workers: number of processes; 0 takes one per core that this process may use.
        initialiser: called in every worker before its first task. Where it fails, the result of every task
            that the worker takes is a `WorkerStartError`.
        arguments: of the initialiser.
        threads: of OpenMP, OpenBLAS and MKL in each worker, set before NumPy is imported; None keeps the
            parent's environment.
        in_flight: most tasks per worker that are handed out and not yet taken back: enough to keep all busy,
            few enough to keep memory flat.
        cleanup: called in a worker that is ended early, as by Ctrl-C or a timeout, or whose parent has gone:
            it may remove what is half written.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        initialiser: Callable[..., object] | None = None,
        arguments: tuple[Any, ...] = (),
        threads: int | None = None,
        in_flight: int = 4,
        cleanup: Callable[[], object] | None = None,
    ) -> None:
        self.workers = workers or available_cores()
        self._most_in_flight = in_flight * self.workers
        setup = (initialiser, arguments, cleanup)
        context = _Context(threads)
        self._new_pool = partial(pebble.ProcessPool, self.workers, 0, _begin, setup, context=context)
        self._pool: pebble.ProcessPool = self._new_pool()
        self._restarts = 0

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job], chunk: int = 1) -> Iterator[Result]:
        """Results in the order of the jobs, computed `chunk` jobs at a time.

        `jobs` are taken in a thread as workers get free, at most `in_flight` chunks per worker in advance.
        They should be small, as paths and plans are: they travel through a pipe.

        Raises:
            UserError: a worker was killed, most often because memory ran out, or workers cannot start.
            Exception: the first error that `function` raised.
        """
        chunks = _chunks(jobs, chunk)
        for _, outcome in self._outcomes(partial(_each, function), chunks, None, ordered=True):
            if isinstance(outcome, WorkerDiedError):
                raise UserError(
                    "a worker process was killed, most likely because memory ran out: run again with fewer "
                    "--workers"
                ) from outcome
            if isinstance(outcome, Exception):
                raise outcome
            yield from outcome

    def as_completed(
        self, function: Callable[[Job], Result], jobs: Iterable[Job], *, timeout: float | None = None
    ) -> Iterator[tuple[int, Result | Exception]]:
        """(position in `jobs`, result) of each job as soon as it is done.

        A job that fails has the error that it raised as its result, a `WorkerDiedError`, a
        `WorkerStartError` or a `TaskTimeoutError`; the others go on.

        Args:
            function: what to compute.
            jobs: taken in a thread as workers get free, so that a generator may compute the next one while
                the last ones are worked on. An error of the generator is raised here.
            timeout: seconds for one job, from the moment that a worker takes it.

        Raises:
            UserError: workers cannot start.
        """
        yield from self._outcomes(function, jobs, timeout, ordered=False)

    def _outcomes(
        self,
        function: Callable[[Job], Result],
        jobs: Iterable[Job],
        timeout: float | None,
        *,
        ordered: bool,
    ) -> Iterator[tuple[int, Result | Exception]]:
        tasks: dict[int, _Task[Job, Result]] = {}  # in flight, or done and not yet handed out
        source = enumerate(jobs)
        with ThreadPoolExecutor(1, "next-job") as feeder:
            upcoming: Future[tuple[int, Job] | None] | None = feeder.submit(next, source, None)
            while upcoming is not None or tasks:
                room = len(tasks) < self._most_in_flight
                self._wait(tasks, upcoming if room else None, first_only=ordered)
                if room and upcoming is not None and upcoming.done():
                    if (numbered := upcoming.result()) is None:
                        upcoming = None
                    else:
                        number, job = numbered
                        tasks[number] = _Task(function, job, timeout)
                        tasks[number].schedule(self._pool)
                        upcoming = feeder.submit(next, source, None)
                for number in [*tasks]:
                    if tasks[number].done:
                        self._restarts = 0
                        yield number, tasks.pop(number).outcome()
                    elif ordered:
                        break

    def _wait(
        self, tasks: dict[int, _Task[Any, Any]], upcoming: Future[Any] | None, *, first_only: bool
    ) -> None:
        """Wait until a task is done or `upcoming` is there; replace a broken or suspended pool."""
        futures = [task.future for task in islice(tasks.values(), 1 if first_only else None)]
        if upcoming is not None:
            futures.append(upcoming)
        waited = 0.0
        while True:
            done, _ = wait(futures, _POLL_SECONDS, FIRST_COMPLETED)
            in_flight = [task for task in tasks.values() if not task.done]
            if in_flight and not self._pool.active:
                self._restart(in_flight, "they end before they take a task; the cause is on standard error")
                return
            if done:
                return
            waited = 0.0 if not in_flight or any(task.future.running() for task in in_flight) else (
                waited + _POLL_SECONDS
            )  # fmt: skip
            if waited >= _STALL_SECONDS:
                self._restart(in_flight, f"none took a task in {_STALL_SECONDS:g} s")
                return

    def _restart(self, in_flight: list[_Task[Any, Any]], reason: str) -> None:
        """Replace all workers and hand the tasks out again.

        Pebble gives a pool up when a worker dies that has no task, as one killed while it was idle.
        """
        self._restarts += 1
        self.end()
        if self._restarts > _MOST_RESTARTS:
            raise UserError(f"worker processes could not start: {reason}; use fewer of them")
        self._pool = self._new_pool()
        for task in in_flight:
            task.schedule(self._pool)

    def end(self) -> None:
        """End the workers; what they work on has no result."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


class _Task(Generic[Job, Result]):
    """A job and the future of its result, which changes when a pool is replaced."""

    def __init__(self, function: Callable[[Job], Result], job: Job, timeout: float | None) -> None:
        self._function = function
        self._job = job
        self._timeout = timeout
        self.future: Future[Result]

    def schedule(self, pool: pebble.ProcessPool) -> None:
        """Hand it to a worker of `pool`."""
        try:
            self.future = pool.schedule(_run, (self._function, self._job), timeout=self._timeout)
        except RuntimeError:  # the pool broke: `_wait` replaces it
            self.future = Future()

    @property
    def done(self) -> bool:
        """Whether it has ended, other than with the whole pool."""
        return self.future.done() and not isinstance(self.future.exception(), BrokenProcessPool)

    def outcome(self) -> Result | Exception:
        """The result, or the error that took its place."""
        error = self.future.exception()
        if error is None:
            return self.future.result()
        if isinstance(error, pebble.ProcessExpired):
            return WorkerDiedError(0 if error.exitcode == _EXIT_ZERO else error.exitcode)
        if isinstance(error, TimeoutError) and error.args[:1] == ("Task timeout",):
            return TaskTimeoutError(self._timeout or 0.0)
        return error if isinstance(error, Exception) else RuntimeError(f"the task raised {error!r}")


class _Process(SpawnProcess):
    """A spawned process without the parent's main module, and with the signals of its job blocked."""

    threads: int | None = None

    def start(self) -> None:
        # Here and not around the pool, for pebble starts replacements from a thread.
        with signals_blocked(), main_module_hidden(), _threads_of_children(self.threads):
            super().start()

    @property
    def exitcode(self) -> int | None:
        """`_EXIT_ZERO` for 0: pebble would wait for ever for the task of a worker that ended with 0."""
        code = super().exitcode
        return _EXIT_ZERO if code == 0 else code


class _Context(SpawnContext):
    """Starts processes with a given number of threads."""

    def __init__(self, threads: int | None) -> None:
        super().__init__()
        self._threads = threads

    def Process(self, *arguments: Any, **options: Any) -> _Process:  # type: ignore[override]  # noqa: N802
        """A process that has not been started yet; the name is that of `multiprocessing`."""
        process = _Process(*arguments, **options)
        process.threads = self._threads
        return process


@contextmanager
def _threads_of_children(threads: int | None) -> Iterator[None]:
    """Set the number of threads in the environment that children inherit.

    A worker cannot set it itself: NumPy reads it when it is imported, and that may happen as soon as the
    worker unpickles its arguments.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    saved = {name: os.environ[name] for name in names if name in os.environ}
    if threads is not None:
        os.environ.update(dict.fromkeys(names, f"{threads}"))
    try:
        yield
    finally:
        if threads is not None:
            for name in names:
                del os.environ[name]
            os.environ.update(saved)


_start_error: WorkerStartError | None = None
"""In a worker: why its initialiser failed."""


def _begin(
    initialiser: Callable[..., object] | None,
    arguments: tuple[Any, ...],
    cleanup: Callable[[], object] | None,
) -> None:
    """What a worker does first."""
    follow_parent(cleanup)
    if initialiser is not None:
        try:
            initialiser(*arguments)
        except Exception as error:
            # Kept for `_run`: pebble would start worker after worker that fails the same way.
            global _start_error
            words = filter(None, (type(error).__name__, str(error).partition("\n")[0]))
            _start_error = WorkerStartError(f"a worker process could not start: {': '.join(words)}")


def _run(function: Callable[[Job], Result], job: Job) -> Result:
    """In a worker."""
    if _start_error is not None:
        raise _start_error
    return function(job)


def _chunks(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    remaining = iter(jobs)
    while part := list(islice(remaining, size)):
        yield part


def _each(function: Callable[[Job], Result], jobs: list[Job]) -> list[Result]:
    return [function(job) for job in jobs]
