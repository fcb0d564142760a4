"""A run that Slurm interrupts: it saves, comes back if it should, and learns as if nothing had happened."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mvat_dist import slurmjob
from mvat_dist.rundir import RunDir
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
    found = [json.loads(row) for row in rows(run, student)]
    return [(row["step"], row["loss"]) for row in found if "loss" in row]


def learnt(run: RunDir) -> None:
    """Wait until the run has made some steps."""
    until(lambda: len(rows(run, STUDENTS[-1])) > 3, 120)


def ended(run: RunDir, job: str) -> None:
    until(lambda: not slurmjob.job_state(job, f"mvat-{run.path.name}").active, 180)


def saved(run: RunDir) -> tuple[int, dict[str, list[str]]]:
    """Wait until the run says that it has stopped; the step of its checkpoint, and its record so far."""
    until(lambda: run.read_status().get("state") == "stopped", 30)
    step = int(run.read_status()["step"])
    assert [folder.name for folder in run.checkpoints.glob("step-*")] == [f"step-{step:08}"]
    assert 0 < step < STEPS
    return step, {student: rows(run, student) for student in STUDENTS}


def restarts(job: str) -> int:
    told = slurm("scontrol", "show", "job", job)
    return int(told.split("Restarts=")[1].split()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interrupted runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, training: list[str]) -> tuple[RunDir, str]:
    """A run that nobody interrupts, on two of the four nodes while another is interrupted on the rest."""
    return start("undisturbed", folder, training)


def assert_went_on(run: RunDir, job: str, before: dict[str, list[str]], undisturbed: RunDir) -> None:
    """The job comes back once, goes on behind its saved step, and ends as the undisturbed run."""
    ended(run, job)
    assert (run.read_status()["state"], run.read_status()["step"]) == ("finished", STEPS)
    assert restarts(job) == 1
    assert accounting(job, "State")[0] == ["COMPLETED"]
    for student in STUDENTS:
        # Rows hold speeds and times, so a step that was made twice would not read the same.
        assert rows(run, student)[: len(before[student])] == before[student]
        assert [step for step, _ in losses(run, student)] == list(range(1, STEPS + 1))
        assert losses(run, student) == losses(undisturbed, student)
        weights, same = (load_file(one.weights(student, "last")) for one in (run, undisturbed))
        assert {key: value.tobytes() for key, value in weights.items()} == {
            key: value.tobytes() for key, value in same.items()
        }
    # Both starts left a W&B run of every student, under one id: `wandb sync` joins them.
    ids = [path.name.split("-", 3)[-1] for path in run.path.glob("wandb/offline-run-*")]
    assert list(Counter(ids).values()) == [2] * len(STUDENTS)


def test_a_run_out_of_time_goes_on_where_it_was(
    folder: Path, training: list[str], undisturbed: tuple[RunDir, str]
) -> None:
    run, job = start("timed", folder, training)
    learnt(run)
    slurm("scancel", "--signal=USR2", job)  # as Slurm does before the time limit
    _, before = saved(run)
    ended(*undisturbed)
    assert_went_on(run, job, before, undisturbed[0])


def test_a_preempted_run_goes_on_when_there_is_room_again(
    folder: Path, training: list[str], undisturbed: tuple[RunDir, str]
) -> None:
    ended(*undisturbed)  # the urgent job will ask for all four nodes
    run, job = start("preempted", folder, training)
    learnt(run)
    flags = ["--job-name=mvat-urgent", "--partition=urgent", "--nodes=4", "--cpus-per-task=8"]
    urgent = slurm("sbatch", "--parsable", *flags, "--output=/dev/null", "--wrap=true").strip()
    _, before = saved(run)
    assert accounting(urgent, "State")[0] == ["COMPLETED"]
    assert_went_on(run, job, before, undisturbed[0])


def test_a_cancelled_run_is_saved_and_stays_away(folder: Path, training: list[str]) -> None:
    run, job = start("cancelled", folder, training)
    learnt(run)
    slurm("scancel", job)
    step, before = saved(run)
    ended(run, job)
    assert accounting(job, "State")[0][0].startswith("CANCELLED")
    assert restarts(job) == 0
    # It is not lost: who submits it again goes on from there.
    again = submit("--name=cancelled", *training, *LONG, "--slurm=hold", cwd=folder, wandb="offline")
    assert again.returncode == 0, again.stderr
    assert run.read_status()["step"] == step
    assert {student: rows(run, student) for student in STUDENTS} == before


def test_a_run_restarts_no_more_often_than_allowed(folder: Path, training: list[str]) -> None:
    run, job = start("once", folder, training, "--max-restarts=0")
    learnt(run)
    slurm("scancel", "--signal=USR2", job)
    saved(run)
    ended(run, job)
    assert restarts(job) == 0
    log = (run.submitit / f"{job}_0_log.out").read_text()
    assert f"job {job} is not requeued: 0 restarts of 0" in log
