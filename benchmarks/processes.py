"""Fresh processes that measure together: what several benchmarks start."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mvat_dist.distributed.ranks import free_port
from mvat_dist.launch import processes as launch


def measured_by(command: Sequence[str], processes: int, seconds: float = 3600) -> dict[str, Any]:
    """The JSON object that rank 0 of so many processes of `command`, one thread each, prints at last.

    Raises:
        SystemExit: one of them failed, with the end of what it said, or they took longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"{rank}.log").open("w+") for rank in range(processes)]
        port, members = free_port(), []
        try:
            for rank, file in enumerate(files):
                variables = launch.environment(rank, processes, port, os.environ)
                members.append(_start(command, variables | {"OMP_NUM_THREADS": "1"}, file))
            _await(members, files, time.monotonic() + seconds)
            said = _text(files[0]).splitlines()
        finally:
            for member in members:
                member.kill()
                member.wait()
            for file in files:
                file.close()
    # Warnings of its libraries may follow.
    return dict(json.loads(next(line for line in reversed(said) if line.startswith("{"))))


def _start(command: Sequence[str], variables: dict[str, str], file: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT, text=True)


def _await(members: Sequence[subprocess.Popen[str]], files: Sequence[IO[str]], deadline: float) -> None:
    """Until all have ended; the first that fails is told of, for the others would wait for it."""
    while any(member.poll() is None for member in members):
        for rank, member in enumerate(members):
            if member.poll():
                raise SystemExit(f"rank {rank} of {len(members)} failed:\n{_text(files[rank])[-3000:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(members)} processes took too long; rank 0:\n{_text(files[0])[-3000:]}")
        time.sleep(0.1)
    if any(member.returncode for member in members):
        raise SystemExit(f"one of {len(members)} processes failed; rank 0:\n{_text(files[0])[-3000:]}")


def _text(file: IO[str]) -> str:
    file.flush()
    return Path(file.name).read_text(errors="replace")
