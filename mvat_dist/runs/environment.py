"""What a run was computed with: versions, host and ranks."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from mvat_dist.distributed.ranks import Ranks
from mvat_dist.io import write_json

_PACKAGES = ("mvat_dist", "torch", "deepspeed", "submitit", "webdataset", "wandb", "pesq", "pystoi", "numpy")
# Only names that say how a run was started; the rest of the environment may hold secrets.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_RESTART_COUNT",
)


def record(path: Path, ranks: Ranks) -> None:
    """Write the environment of this start to `path` as JSON."""
    write_json(
        path,
        {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "commit": _commit(),
            "ranks": asdict(ranks),
            "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        },
    )


def _version(package: str) -> str | None:
    """None where the package runs from its source tree without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The source tree's git commit, with ``+changes`` where it differs; None outside a checkout."""
    here = Path(__file__).parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+changes"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()
