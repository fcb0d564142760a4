"""The cluster of ``slurm/devcluster.sh``, and how the tests talk to it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import waiting
from tests.conftest import REPOSITORY
from tests.tiny_corpus import write_pairs, write_sources

RATE = 16_000


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    """The development cluster that SLURM_CONF names, else the one that devcluster.sh knows of; no other."""
    os.environ.pop("OMP_NUM_THREADS", None)  # set for tests in this process; jobs choose by themselves
    if "SLURM_CONF" not in os.environ:
        script = REPOSITORY / "slurm" / "devcluster.sh"
        answer = subprocess.run([script, "status"], capture_output=True, text=True)
        if answer.returncode:
            pytest.skip("no cluster: start one with slurm/devcluster.sh up")
        os.environ["SLURM_CONF"] = answer.stdout.strip().removeprefix("export SLURM_CONF=")
    # On a site's login node SLURM_CONF may name the real cluster.
    name = re.search(r"^ClusterName\s*=\s*(\S+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    if name is None or name.group(1) != "mvat-devcluster":
        pytest.skip(f"{os.environ['SLURM_CONF']} is not the cluster of slurm/devcluster.sh")


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    """A failed test's jobs must not stand in the way of the next; each is called mvat-something."""
    yield
    if jobs := our_jobs():
        slurm("scancel", "--quiet", *jobs)
    until(lambda: not our_jobs(), 30)


def our_jobs() -> list[str]:
    """Numbers of the tests' jobs in the queue."""
    rows = slurm("squeue", "--noheader", "--me", "--format=%i %j").splitlines()
    return [row.split()[0] for row in rows if row.split()[1].startswith("mvat-")]


def slurm(*command: str) -> str:
    """What a command prints; it has to succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def accounting(job: str, *columns: str) -> list[list[str]]:
    """Rows of sacct for a job and its steps, once accounting has seen it end."""

    def rows() -> list[list[str]]:
        answer = slurm(
            "sacct", "--noheader", "--parsable2", f"--jobs={job}", f"--format=End,{','.join(columns)}"
        )
        return [line.split("|") for line in answer.splitlines()]

    until(lambda: bool(rows()) and all(row[0] != "Unknown" for row in rows()), 20)
    return [row[1:] for row in rows()]


def until(true: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition; what Slurm says is in the failure."""
    waiting.until(true, seconds, lambda: slurm("squeue") + slurm("sinfo", "-R"), pause=0.2)


def submit(*arguments: str, cwd: Path, wandb: str = "disabled") -> subprocess.CompletedProcess[str]:
    """``python -m mvat_dist.submit`` as a user types it."""
    environment = {**os.environ, "WANDB_MODE": wandb}
    command = [sys.executable, "-m", "mvat_dist.submit", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of tones and noise per utterance, in shards enough for eight readers."""
    folder = tmp_path_factory.mktemp("tiny corpus")
    generator = np.random.default_rng(0)
    time_axis = np.arange(RATE) / RATE

    def voice() -> np.ndarray:
        return 0.2 * np.sin(2 * np.pi * generator.uniform(100, 300) * time_axis)

    write_sources(folder, "train_clean", {f"c{i}": voice() for i in range(8)}, shards=8)
    write_sources(folder, "train_noise", {"n0": 0.1 * generator.standard_normal(2 * RATE)})
    clean = {f"v{i}": voice() for i in range(2)}
    noisy = {key: signal + 0.03 * generator.standard_normal(signal.size) for key, signal in clean.items()}
    write_pairs(folder, "valid", {key: (noisy[key], clean[key]) for key in clean})
    return folder


@pytest.fixture(scope="session")
def training(corpus: Path) -> list[str]:
    """Options of a run of a few seconds: two students without a teacher."""
    return [
        "--sizes={tiny: {kind: small, hidden: 4, depth: 2}, mini: {kind: base, hidden: 6, depth: 2}}",
        "--student=tiny,mini",
        "--distil.method=none",
        f"--data.train={corpus}",
        "--data.reverb_probability=0",
        "--data.segment_seconds=0.25",
        "--data.workers=1",
        "--train.batch=4",
        "--train.steps=4",
        "--valid.clips=1",
        "--valid.best=si_sdr",
        "--track.every=1",
    ]
