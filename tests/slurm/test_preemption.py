"""A run that Slurm interrupts, beside the fault matrix: what stays away, and what a killed rank costs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mvat_dist.distributed.slurm import job_state
from mvat_dist.runs.folder import RunDir
from tests.faults.cluster import ranks_of
from tests.slurm.conftest import accounting, slurm, submit, until

pytestmark = pytest.mark.slurm

STEPS = 40
STUDENTS = ("tiny", "mini")
# Enough steps that the run is never through before Slurm has made up its mind.
LONG = ["--nodes=2", f"--train.steps={STEPS}", "--train.validate_every=1000", "--train.save_every=1000"]


def start(name: str, folder: Path, options: list[str], *more: str) -> tuple[RunDir, str]:
    """Submit a run with W&B offline; its folder and its job."""
    done = submit(f"--name={name}", *options, *LONG, *more, cwd=folder, wandb="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(folder / "runs" / name)
    return run, json.loads(run.job.read_text())["job_id"]


def rows(run: RunDir, student: str) -> list[str]:
    history = run.history(student)
    return history.read_text().splitlines() if history.exists() else []


def losses(run: RunDir, student: str) -> list[tuple[int, float]]:
    history = [json.loads(row) for row in rows(run, student)]
    return [(row["step"], row["loss"]) for row in history if "loss" in row]


def learnt(run: RunDir) -> None:
    """Wait until the run has made some steps."""
    until(lambda: len(rows(run, STUDENTS[-1])) > 3, 120)


def ended(run: RunDir, job: str) -> None:
    until(lambda: not job_state(job, f"mvat-{run.path.name}").active, 180)


def saved(run: RunDir) -> tuple[int, dict[str, list[str]]]:
    """Wait until the run says that it has stopped; the step of its checkpoint, and its record so far."""
    until(lambda: run.read_status().get("state") == "stopped", 30)
    step = int(run.read_status()["step"])
    assert [folder.name for folder in run.checkpoints.glob("step-*")] == [f"step-{step:08}"]
    assert 0 < step < STEPS
    return step, {student: rows(run, student) for student in STUDENTS}


def restarts(job: str) -> int:
    shown = slurm("scontrol", "show", "job", job)
    return int(shown.split("Restarts=")[1].split()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, training: list[str]) -> tuple[RunDir, str]:
    """A run that nobody interrupts, on two of the four nodes while another is interrupted on the rest."""
    return start("undisturbed", folder, training)


def test_a_cancelled_run_is_saved_and_stays_away(folder: Path, training: list[str]) -> None:
    run, job = start("cancelled", folder, training)
    learnt(run)
    slurm("scancel", job)
    step, history = saved(run)
    ended(run, job)
    assert accounting(job, "State")[0][0].startswith("CANCELLED")
    assert restarts(job) == 0
    # It is not lost: who submits it again goes on from there.
    again = submit("--name=cancelled", *training, *LONG, "--slurm=hold", cwd=folder, wandb="offline")
    assert again.returncode == 0, again.stderr
    assert run.read_status()["step"] == step
    assert {student: rows(run, student) for student in STUDENTS} == history


def test_a_run_restarts_no_more_often_than_allowed(folder: Path, training: list[str]) -> None:
    run, job = start("once", folder, training, "--max-restarts=0")
    learnt(run)
    slurm("scancel", "--signal=USR2", job)
    saved(run)
    ended(run, job)
    assert restarts(job) == 0
    log = (run.submitit / f"{job}_0_log.out").read_text()
    assert f"job {job} is not requeued: 0 restarts of 0" in log


def test_a_killed_rank_brings_the_job_back(
    folder: Path, training: list[str], undisturbed: tuple[RunDir, str]
) -> None:
    # A rank that hears nothing more from the other ends by itself; Slurm would give it three minutes.
    run, job = start("killed", folder, training, "--train.save_every=5")
    until(lambda: len(list(run.checkpoints.glob("step-*"))) > 0, 120)
    os.kill(ranks_of(job)[0], signal.SIGKILL)
    ended(run, job)
    ended(*undisturbed)
    status = run.read_status()
    assert (status["state"], status["step"], status["restarts"], restarts(job)) == ("finished", STEPS, 1, 1)
    assert status["starts"][1]["step"] >= 5
    for student in STUDENTS:
        assert losses(run, student) == losses(undisturbed[0], student)
        weights, same = (load_file(folder.weights(student, "last")) for folder in (run, undisturbed[0]))
        assert {key: value.tobytes() for key, value in weights.items()} == {
            key: value.tobytes() for key, value in same.items()
        }
    assert f"job {job} is queued again" in (run.submitit / f"{job}_0_log.out").read_text()
