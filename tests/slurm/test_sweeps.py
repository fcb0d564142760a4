"""Sweeps on the cluster: an array without a server, and an agent's trial that Slurm preempts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mvat_dist import sweep
from mvat_dist.runs.folder import RunDir
from tests.slurm.conftest import accounting, our_jobs, slurm, until
from tests.sweep_place import OBJECTIVE, environment, sweep_file, write_place
from tests.wandb_server import serving
from tests.wandb_sweeps import SWEEP, SweepServer

pytestmark = pytest.mark.slurm

STEPS = 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_place(tmp_path)
    monkeypatch.chdir(folder)
    return folder


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of ours, as a user types it on a login node."""
    known = environment(SLURM_CONF=os.environ["SLURM_CONF"], **variables)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], env=known, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def gone() -> None:
    until(lambda: not our_jobs(), 240)


def logs(place: Path) -> str:
    """What the jobs have said, for a failure."""
    files = place.glob("runs/sweep-*/slurm/*_log.*")
    return "\n".join(file.read_text(errors="replace") for file in files)


def losses(run: RunDir) -> list[int]:
    file = run.history(OBJECTIVE)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["step"] for row in rows if "loss" in row]


def starts(run: RunDir) -> Sequence[dict[str, Any]]:
    rows: list[dict[str, Any]] = run.read_status().get("starts", [])
    return rows


def test_an_array_runs_the_points_of_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep_file(
        place, {"optim.lr": {"values": [1e-3, 1e-2]}, "train.steps": {"value": 3}}, method="grid"
    )
    python("mvat_dist.sweep", str(file), "--cluster=slurm", "--nodes=2", "--time=10", WANDB_MODE="offline")
    file.write_text("changed while the jobs wait")
    gone()
    [copy] = place.glob("runs/sweep-*/slurm/sweep.yaml")
    sweep.main([str(copy), "--ranking"])
    table = capsys.readouterr().out
    assert len(re.findall(r"\| finished \|", table)) == 2, table + logs(place)
    runs = [RunDir(folder) for folder in sorted((place / "runs").glob("sweep-*/sweep-*")) if folder.is_dir()]
    for run, rate in zip(runs, (0.001, 0.01), strict=True):
        assert f"lr: {rate}" in run.config.read_text()
        assert json.loads(run.environment.read_text())["ranks"]["world_size"] == 2
        assert losses(run) == [1, 2, 3]


@contextmanager
def submitted(place: Path, steps: int) -> Iterator[tuple[SweepServer, RunDir]]:
    """A sweep with one trial, in a job on two nodes that has made some steps when the block begins."""
    with serving(SweepServer([{"train.steps": steps}])) as server:
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "HOME": str(place)}
        python("wandb", "sweep", str(sweep_file(place, {"train.steps": {"values": [1]}})), **variables)
        target = ["--sweep", f"e/mvat_dist/{SWEEP}", "--nodes=2", "--count=1", "--time=10"]
        python("mvat_dist.submit", *target, **variables)
        run = RunDir(place / "runs" / f"sweep-{SWEEP}" / "tr1al0")
        until(lambda: len(losses(run)) > 2, 180)
        yield server, run
        assert server.given == [("run", "tr1al0")], logs(place)


def test_a_trial_that_its_sweep_stops_is_over(place: Path) -> None:
    with submitted(place, steps=5000) as (server, run):
        server.ending.add("tr1al0")
        gone()
        status = run.read_status()
        assert (status["state"], status["reason"], status["restarts"]) == ("stopped", "SIGINT", 0), logs(
            place
        )
        assert [folder.name for folder in run.checkpoints.glob("step-*")] == [f"step-{status['step']:08}"]
        assert losses(run)[-1] == status["step"]
        assert accounting(starts(run)[0]["job"], "ExitCode")[0] == ["0:0"]


def test_a_preempted_trial_resumes_as_itself(place: Path) -> None:
    """Its job comes back and goes on with the same run, without another question to the server."""
    with submitted(place, STEPS) as (server, run):
        flags = ["--job-name=mvat-urgent", "--partition=urgent", "--nodes=4", "--cpus-per-task=8"]
        slurm("sbatch", *flags, "--output=/dev/null", "--wrap=true")
        gone()
        status = run.read_status()
        assert (status["state"], status["step"]) == ("finished", STEPS), logs(place)
        first, second = starts(run)
        assert first["ended"] == "SIGTERM"
        assert (first["job"], first["restart"], second["restart"]) == (second["job"], 0, 1)
        assert 2 < second["step"] < STEPS
        sent = [row["global_step"] for row in server.runs["tr1al0"].history if "loss" in row]
        assert sent == losses(run) == list(range(1, STEPS + 1))
        assert server.runs["tr1al0"].sweep == SWEEP
