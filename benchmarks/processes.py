"""Fresh processes that measure together: what several benchmarks start."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvat_dist.distributed.ranks import free_port
from mvat_dist.launch.processes import Child, rank_environment, start


def measured_by(command: Sequence[str], count: int, seconds: float = 3600) -> dict[str, Any]:
    """The JSON object that rank 0 of `count` processes of `command`, one thread each, prints last.

    Raises:
        SystemExit: one of them failed, with the end of its output, or they took longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        port, ranks = free_port(), []
        try:
            for rank in range(count):
                variables = rank_environment(rank, count, port, os.environ) | {"OMP_NUM_THREADS": "1"}
                ranks.append(start(command, variables, log=Path(folder) / f"{rank}.log"))
            _wait(ranks, time.monotonic() + seconds)
            lines = _output(ranks[0]).splitlines()
        finally:
            for child in ranks:
                child.kill()
    # Warnings of its libraries may follow.
    return dict(json.loads(next(line for line in reversed(lines) if line.startswith("{"))))


def _wait(ranks: Sequence[Child], deadline: float) -> None:
    """Wait until all have ended; a failure ends the waiting, because the others wait for that rank."""
    while None in (codes := [child.exit_code() for child in ranks]):
        _refuse_failure(ranks, codes)
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(ranks)} processes took too long; rank 0:\n{_output(ranks[0])[-3000:]}")
        time.sleep(0.1)
    _refuse_failure(ranks, codes)


def _refuse_failure(ranks: Sequence[Child], codes: Sequence[int | None]) -> None:
    for rank, code in enumerate(codes):
        if code:
            raise SystemExit(f"rank {rank} of {len(ranks)} failed:\n{_output(ranks[rank])[-3000:]}")


def _output(child: Child) -> str:
    return child.log.read_text(errors="replace") if child.log else ""
