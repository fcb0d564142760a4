"""Fresh processes that measure together: what several benchmarks start."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from mvat_dist.cluster import launch
from mvat_dist.ranks import free_port


def told(command: Sequence[str], processes: int, seconds: float = 600) -> dict[str, Any]:
    """What rank 0 of so many processes of `command`, one thread each, prints as its last line, in JSON.

    Raises:
        SystemExit: one of them failed.
    """
    port = free_port()
    members = [
        subprocess.Popen(
            command,
            env=launch.environment(rank, processes, port, os.environ) | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]
    said, _ = members[0].communicate(timeout=seconds)
    if any(member.wait() for member in members):
        raise SystemExit(f"one of {processes} processes failed: run {' '.join(command)} to see why")
    return dict(json.loads(said.splitlines()[-1]))
