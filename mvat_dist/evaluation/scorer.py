"""Score pairs of audio in worker processes, so that a crash or a hang of a metric costs one score.

PESQ's C code can end its process, and a rank must outlive it. A pair whose worker died or took too long is
scored again, one metric at a time: what fails again has a reason in place of a value, and the other metrics
have their scores. So a single kill for lack of memory costs none. Time limits also count the time in which a
job is suspended, so that one suspension costs none, but another one within the second attempt can.

The workers do not import torch. They are kept for the next validation, because importing SciPy takes each of
them most of a second, and end with this process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize

import numpy as np

from mvat_dist.data.pool import ProcessPool, TaskTimeoutError, WorkerDiedError, available_cores
from mvat_dist.evaluation.metrics.registry import METRICS, Audio, Score

SECONDS_LIMIT = 300.0
"""Longest time for one pair, in seconds: far above what any takes on a busy machine."""

_pool: ProcessPool | None = None
"""Kept between calls."""


@dataclass(frozen=True)
class Pair:
    """One estimate and its clean reference, float (T,) at 16 kHz."""

    estimate: Audio
    clean: Audio
    failure: str | None = None
    """Why it cannot be scored at all, where that is known already; then the audio is not looked at."""


@dataclass(frozen=True)
class _Job:
    """Metrics of the pair at a position."""

    position: int
    pair: Pair
    metrics: tuple[str, ...]
    again: bool = False
    """Whether it is the second attempt, with a single metric."""


def score_pairs(
    pairs: Iterable[Pair],
    metrics: Sequence[str],
    *,
    processes: int = 0,
    progress: Callable[[int], object] | None = None,
    seconds_limit: float = SECONDS_LIMIT,
) -> list[dict[str, Score]]:
    """Every metric of every pair, in the order of `pairs`; the rest is as in `score_as_completed`.

    Args:
        progress: called with 1 after each finished pair.
    """
    scores: dict[int, dict[str, Score]] = {}
    completed = score_as_completed(pairs, metrics, processes=processes, seconds_limit=seconds_limit)
    for position, pair_scores in completed:
        scores[position] = pair_scores
        if progress is not None:
            progress(1)
    return [scores[position] for position in range(len(scores))]


def score_as_completed(
    pairs: Iterable[Pair],
    metrics: Sequence[str],
    *,
    processes: int = 0,
    seconds_limit: float = SECONDS_LIMIT,
) -> Iterator[tuple[int, dict[str, Score]]]:
    """(position in `pairs`, every metric) of each pair as soon as it is finished.

    Args:
        pairs: consumed in a thread as workers get free, so that a generator which runs a network computes
            the next estimate while the last ones are scored. At most two pairs per worker are held.
        metrics: names from `METRICS`.
        processes: number of workers; 0 takes one per available CPU.
        seconds_limit: time for one pair, and for one metric of a pair that took longer.

    Raises:
        UserError: workers cannot start (the interpreter's own message is on stderr).
    """
    again: deque[_Job] = deque()
    scored_again: dict[int, dict[str, Score]] = {}
    jobs = _jobs(pairs, tuple(metrics), again)
    try:
        pool = _kept_pool(processes or available_cores())
        while True:
            for job, scores in _outcomes(pool, jobs, seconds_limit):
                if scores is None:
                    again.extend(_Job(job.position, job.pair, (metric,), again=True) for metric in metrics)
                elif not job.again:
                    yield job.position, scores
                else:
                    known = scored_again.setdefault(job.position, {})
                    known.update(scores)
                    if len(known) == len(metrics):
                        yield job.position, {metric: known[metric] for metric in metrics}
            if not again:
                return
            jobs = iter([again.popleft() for _ in range(len(again))])
    except BaseException:  # also of a caller that takes no more scores: tasks are still in flight
        end_workers()
        raise


def _jobs(pairs: Iterable[Pair], metrics: tuple[str, ...], again: deque[_Job]) -> Iterator[_Job]:
    """The pairs, and between them those of `again`: few are kept waiting."""
    for position, pair in enumerate(pairs):
        estimate, clean = (np.ascontiguousarray(audio, np.float32) for audio in (pair.estimate, pair.clean))
        yield _Job(position, Pair(estimate, clean, pair.failure), metrics)
        while again:
            yield again.popleft()


def _outcomes(
    pool: ProcessPool, jobs: Iterator[_Job], seconds_limit: float
) -> Iterator[tuple[_Job, dict[str, Score] | None]]:
    """Each job with its scores, or with None where it is to be tried again."""
    in_flight: dict[int, _Job] = {}

    def noted() -> Iterator[_Job]:
        for number, job in enumerate(jobs):
            in_flight[number] = job
            yield job

    for number, outcome in pool.as_completed(_score, noted(), timeout=seconds_limit):
        job = in_flight.pop(number)
        if isinstance(outcome, dict):
            yield job, outcome
        elif not isinstance(outcome, WorkerDiedError | TaskTimeoutError):
            raise outcome
        else:
            failed = dict.fromkeys(job.metrics, Score(None, str(outcome)))
            yield job, failed if job.again else None


def _kept_pool(workers: int) -> ProcessPool:
    """The pool of this process; one of another size is replaced."""
    global _pool
    if _pool is None or _pool.workers != workers:
        end_workers()
        # One thread each: the processes themselves are the parallelism.
        _pool = ProcessPool(workers, threads=1, in_flight=2)
        # Not atexit: a process of multiprocessing skips that, and would wait for the workers for ever.
        Finalize(None, end_workers, exitpriority=1)
    return _pool


def end_workers() -> None:
    """End the workers that are kept; the next pair to score starts new ones."""
    global _pool
    if _pool is not None:
        _pool.end()
    _pool = None


def _score(job: _Job) -> dict[str, Score]:
    """In a worker."""
    if job.pair.failure is not None:
        return dict.fromkeys(job.metrics, Score(None, job.pair.failure))
    return {metric: _score_metric(metric, job.pair) for metric in job.metrics}


def _score_metric(metric: str, pair: Pair) -> Score:
    np.random.seed(0)  # pystoi adds noise of 1e-16 from the global generator
    try:
        return METRICS[metric].compute(pair.estimate, pair.clean)
    except Exception as error:  # a metric's package may raise anything; one clip must not end the run
        return Score(None, f"{type(error).__name__}: {error}")
