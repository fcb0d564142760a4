"""Enhance many files with one network: one by one, or several at once in worker processes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from mvat_dist.data.pool import ProcessPool, WorkerDiedError, WorkerStartError
from mvat_dist.errors import UserError
from mvat_dist.inference.audio_files import Enhanced, Job, Progress, duration, enhance_file
from mvat_dist.inference.enhancer import Enhancer
from mvat_dist.io import remove_temporary

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that the next file would meet too."""

Result = Enhanced | str
"""Of one file: what was written, or the reason why it could not be enhanced."""


def enhance_one_by_one(
    network: Enhancer, jobs: Sequence[Job], dry: float, progress: Progress
) -> Iterator[tuple[Job, Result]]:
    """Enhance the files of `jobs` in their order.

    Raises:
        OSError: the disk is full, or fails.
    """
    for job in jobs:
        yield job, _attempt(network, job, dry, progress)


def enhance_in_parallel(
    load: Callable[[], Enhancer], jobs: Sequence[Job], dry: float, processes: int, progress: Progress
) -> Iterator[tuple[Job, Result]]:
    """Enhance the files of `jobs` in `processes` processes; results come as the files are done.

    Every process calls `load`, which must be picklable, for a network of its own. `progress` is called once a
    file.

    Raises:
        UserError: a process cannot load its network, most often because memory ran out.
        OSError: the disk is full, or fails.
    """
    pool = ProcessPool(
        processes,
        initialiser=_Worker.begin,
        arguments=(load, dry),
        threads=max(1, torch.get_num_threads() // processes),
        cleanup=_Worker.remove_half_written,
    )
    with pool:
        for number, result in pool.as_completed(_Worker.enhance, jobs):
            job = jobs[number]
            progress(duration(job.source) or 0.0)
            if isinstance(result, WorkerDiedError):
                yield job, f"{job.source}: its {result}, perhaps for lack of memory: use fewer --processes"
            elif isinstance(result, WorkerStartError):
                raise UserError(f"{result}; if memory ran out, use fewer --processes") from result
            elif isinstance(result, Exception):
                raise result
            else:
                yield job, result


def _attempt(network: Enhancer, job: Job, dry: float, progress: Progress) -> Result:
    try:
        return enhance_file(network, job, dry, progress)
    except UserError as error:
        return str(error)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            raise
        return f"{job.source}: {error}"


class _Worker:
    """What a worker process keeps between files."""

    network: Enhancer
    dry: float
    target: Path | None = None
    """Being written at the moment."""

    @classmethod
    def begin(cls, load: Callable[[], Enhancer], dry: float) -> None:
        """Load the network."""
        cls.network, cls.dry = load(), dry

    @classmethod
    def enhance(cls, job: Job) -> Result:
        """Enhance one file."""
        cls.target = job.target
        try:
            return _attempt(cls.network, job, cls.dry, lambda seconds: None)  # noqa: ARG005
        finally:
            cls.target = None

    @classmethod
    def remove_half_written(cls) -> None:
        """Leave nothing behind where the worker is ended within a file."""
        if cls.target is not None:
            remove_temporary(cls.target)
