"""Workers that enhance files: one that dies, and one that cannot load its network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import soundfile

from mvat_dist.errors import UserError
from mvat_dist.inference import many_files
from mvat_dist.inference.audio_files import Job
from mvat_dist.inference.many_files import enhance_in_parallel


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Two files of half a second."""
    sources = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for source in sources:
        soundfile.write(source, np.zeros(8000), 16_000)
    return [Job(source, source.with_suffix(".out.wav")) for source in sources]


def _load_without_memory() -> NoReturn:
    raise MemoryError("CUDA out of memory")


def _load_deadly() -> None:
    """In the worker: the first file ends it."""

    def enhance_file(*_: object) -> NoReturn:
        os._exit(9)

    many_files.enhance_file = enhance_file


def test_a_process_without_memory_for_its_network_is_a_mistake_of_the_user(jobs: list[Job]) -> None:
    with pytest.raises(UserError, match="CUDA out of memory; if memory ran out, use fewer --processes"):
        list(enhance_in_parallel(_load_without_memory, jobs, 0.0, 2, lambda _: None))


def test_progress_counts_a_file_whose_worker_died(jobs: list[Job]) -> None:
    seconds: list[float] = []
    results = dict(enhance_in_parallel(_load_deadly, jobs, 0.0, 1, seconds.append))
    assert all("worker died (exit code 9)" in str(results[job]) for job in jobs)
    assert seconds == [0.5, 0.5]
