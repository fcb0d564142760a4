"""What ranks know after a step reaches all of them, and none of it hides another."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvat_dist.distributed.ranks import RANK_VARIABLES
from mvat_dist.runs.folder import RunDir
from mvat_dist.training import checkpoint
from mvat_dist.training.hooks import Agreement, StepEnd
from mvat_dist.training.schedule import Hyperparameters
from tests.commands.test_train import command, corpus, environment, succeed  # noqa: F401 (corpus: a fixture)
from tests.ranks_harness import on_ranks

TERM, USR2 = int(signal.SIGTERM), int(signal.SIGUSR2)
CASES = {
    "nothing": ((0, False, False, 0), (0, False, False, 0)),
    "one was asked to stop": ((0, False, False, 0), (TERM, False, False, 0)),
    "two signals": ((USR2, False, False, 0), (TERM, False, False, 0)),
    "a stop and a failure to read": ((TERM, False, False, 0), (0, True, False, 3)),
    "a lost folder and bad samples": ((0, False, True, 1), (USR2, True, False, 1)),
}
"""What ranks 0 and 1 report."""
AGREED = {
    "nothing": (0, False, False, 0),
    "one was asked to stop": (TERM, False, False, 0),
    "two signals": (TERM, False, False, 0),
    "a stop and a failure to read": (TERM, True, False, 3),
    "a lost folder and bad samples": (USR2, True, True, 2),
}


def agree_on_all(rank: int) -> dict[str, tuple[int, bool, bool, int]]:
    cpu = torch.device("cpu")
    return {name: tuple(Agreement(*reports[rank]).all_reduced(cpu)) for name, reports in CASES.items()}


def test_every_report_reaches_all_ranks(tmp_path: Path) -> None:
    assert on_ranks(2, agree_on_all, tmp_path) == [AGREED, AGREED]


def test_a_single_rank_asks_no_device() -> None:
    report = Agreement(TERM, True, False, 3)
    assert report.all_reduced(torch.device("meta")) == report  # which no value can be read from


@pytest.mark.parametrize(
    ("step", "last", "due"), [(4, False, True), (5, False, False), (5, True, True), (8, True, True)]
)
def test_what_is_done_every_few_steps_is_done_after_the_last_one_too(
    step: int, last: bool, due: bool
) -> None:
    hparams = Hyperparameters(lr=0.0, beta1=0.9, kd_weight=1.0, pesq=False)
    assert StepEnd(step, hparams, last=last, stopping=False).every(4) == due


# A rank of a Slurm job. While step 2 ends, rank 0 is preempted and rank 1 cannot read the batches of step 3.
RANK = """
import os, signal, sys
from mvat_dist import train
from mvat_dist.errors import UserError, exit_code
from mvat_dist.training.prefetch import Prefetcher

fetch_next, calls = Prefetcher.fetch_next, []

def unreadable():
    raise UserError("the shard cannot be read")
    yield

def fetch(self):
    calls.append(self)
    if len(calls) == 3:
        if os.environ["SLURM_PROCID"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._steps = unreadable()
    fetch_next(self)

Prefetcher.fetch_next = fetch
sys.exit(exit_code(train.main))
"""

SCONTROL = """#!/bin/sh
case "$1 $2" in
"show job") echo "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00" ;;
"show hostnames") echo localhost ;;
*) echo "$@" >> "$SCONTROL_CALLS" ;;
esac
"""


def slurm_step(rank: int) -> dict[str, str]:
    """Environment of one of two tasks of a job on this machine."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
    }


def test_a_preemption_is_not_hidden_by_a_read_failure_in_the_same_step(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The run is saved, the job is queued again, and the next start finishes it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(SCONTROL)
    (programs / "scontrol").chmod(0o755)
    calls = tmp_path / "calls"
    plain = {key: value for key, value in environment().items() if key not in RANK_VARIABLES}
    plain |= {"PATH": f"{programs}:{os.environ['PATH']}", "SCONTROL_CALLS": str(calls)}
    # A unique number of the restart is a port of its own.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        plain["SLURM_RESTART_COUNT"] = str(probe.getsockname()[1] % 900)
    options = ["--student=tiny", "--distil.method=none", "--train.save_every=6"]
    arguments = command(corpus, tmp_path / "runs", "run", options)[3:]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments],
            env=plain | slurm_step(rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [128 + TERM] * 2, errors
    run = RunDir(tmp_path / "runs" / "run")
    status = json.loads(run.status.read_text())
    assert (status["state"], status["reason"], status["step"]) == ("stopped", "SIGTERM", 2)
    saved = checkpoint.newest(run.checkpoints)
    assert saved is not None
    assert checkpoint.step_of(saved) == 2
    assert calls.read_text() == "requeue 7\n"
    succeed([sys.executable, "-m", "mvat_dist.train", *arguments])
    assert json.loads(run.status.read_text())["state"] == "finished"
