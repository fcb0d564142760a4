"""Records of a run that several rooms read: JSON files, each with its type."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal


def now() -> str:
    """Local time with its offset from UTC, as all records have it: ``2026-11-22T20:15:00+0100``."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@dataclass(frozen=True)
class JobRecord:
    """``job.json``: how a run was started last."""

    cluster: Literal["slurm", "local"]
    host: str
    """Machine on which it was started or submitted."""
    time: str
    """As `now` writes it."""
    nodes: int
    tasks_per_node: int
    argv: list[str] = field(default_factory=list)
    """Arguments of ``python -m mvat_dist.train``."""
    code: str = ""
    """`launch.slurm.code_fingerprint` of the package."""
    job_id: str = ""
    """On Slurm: number of the job."""
    job_name: str = ""
    """On Slurm: its name, because numbers begin again on a cluster that is set up anew."""
    pid: int = 0
    """Without Slurm: the process that started the ranks."""
    format: str = "mvat_dist.job.1"
