"""W&B's own ``wandb sweep`` and ``wandb agent``: what trials train, how they stop and resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mvat_dist.launch import sweep_file as sweepfile
from mvat_dist.runs.folder import RunDir
from tests.conftest import REPOSITORY
from tests.sweep_place import OBJECTIVE, STUDENTS, environment, sweep_file, write_place
from tests.waiting import until
from tests.wandb_server import serving
from tests.wandb_sweeps import SWEEP, SweepServer

# Names and values in all the ways in which an agent may write them.
COMMON = {
    "optim.lr": 3e-05,  # a dotted name, in scientific notation
    "optim.betas": [0.5, 0.75],
    "engine": {"sync_batchnorm": False},  # nested groups
    "distil": {"weight": 0.25},
    "valid.best": "stoi",
}
POINTS = [
    {**COMMON, "train.steps": 5000},
    {**COMMON, "train.steps": 25, "engine": {"freeze_batchnorm": True}},
    {**COMMON, "train.steps": 1},
]
STEPS = list(range(1, 26))
STOPPED, PREEMPTED, SHORT = "tr1al0", "tr1al1", "tr1al3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(scope="module")
def server() -> Iterator[SweepServer]:
    with serving(SweepServer(POINTS)) as server:
        yield server


def account(server: SweepServer, place: Path) -> dict[str, str]:
    return environment(WANDB_BASE_URL=server.url, WANDB_API_KEY="0" * 40, HOME=str(place))


def wandb(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "wandb", *arguments]


def trial(place: Path, name: str) -> RunDir:
    return RunDir(place / "runs" / f"sweep-{SWEEP}" / name)


def steps(run: RunDir, student: str = OBJECTIVE) -> list[int]:
    file = run.history(student)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["step"] for row in rows if "loss" in row]


def has_begun(run: RunDir, agent: subprocess.Popen[bytes]) -> None:
    """Wait until a trial has made some steps."""
    log = run.path.parent.parent.parent / "agent.log"
    until(lambda: len(steps(run)) > 2 or agent.poll() is not None, 240, log.read_text)
    assert agent.poll() is None, log.read_text()


@pytest.fixture(scope="module")
def after(place: Path, server: SweepServer) -> RunDir:
    """Three trials of one agent: stopped by the sweep; preempted and resumed; one that nobody disturbs."""
    parameters = {
        **{name: {"values": [1, 2]} for name in COMMON if not isinstance(COMMON[name], dict)},
        "engine": {"parameters": {"freeze_batchnorm": {"values": [True, False]}}},
        "distil": {"parameters": {"weight": {"min": 0.0, "max": 1.0}}},
        "train.steps": {"values": [1, 2]},
    }
    known = account(server, place)
    done = subprocess.run(
        wandb("sweep", str(sweep_file(place, parameters))),
        cwd=place,
        env=known,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    path = done.stderr.split("wandb agent ")[1].split()[0]
    assert path == f"e/mvat_dist/{SWEEP}"
    log = (place / "agent.log").open("w")
    agent = subprocess.Popen(
        wandb("agent", path),
        cwd=place,
        env={**known, "MVAT_PROCESSES": "2"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        has_begun(trial(place, STOPPED), agent)
        server.ending.add(STOPPED)
        run = trial(place, PREEMPTED)
        has_begun(run, agent)
        children = psutil.Process(agent.pid).children()
        [launcher] = [child for child in children if "mvat_dist.trial" in child.cmdline()]
        launcher.send_signal(signal.SIGTERM)
        until(lambda: agent.poll() is not None, 300, lambda: (place / "agent.log").read_text())
    finally:
        for process in psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []:
            process.kill()
        agent.kill()
        agent.wait()
        log.close()
    return run


@pytest.mark.usefixtures("after")
def test_one_agent_was_told_three_trials_and_to_resume_the_preempted(server: SweepServer) -> None:
    assert len(server.agents) == 1
    assert server.given == [("run", STOPPED), ("run", PREEMPTED), ("resume", PREEMPTED), ("run", SHORT)]
    assert server.runs[SHORT].exit_code == 0


@pytest.mark.usefixtures("after")
def test_every_parameter_arrives_on_every_rank_as_it_was_sent(place: Path) -> None:
    run = trial(place, PREEMPTED)
    config = yaml.safe_load(run.config.read_text())
    assert config["optim"]["lr"] == 3e-05
    assert config["optim"]["betas"] == [0.5, 0.75]
    assert config["engine"]["freeze_batchnorm"] is True
    assert config["distil"]["weight"] == 0.25
    assert config["valid"]["best"] == "stoi"
    assert config["train"]["steps"] == 25
    assert json.loads(run.environment.read_text())["ranks"]["world_size"] == 2
    # Rank 1's log begins with its command line; rank 0 has written what it was told into job.json.
    command = (run.logs / "rank-1.log").read_text().splitlines()[0]
    for argument in json.loads(run.job.read_text())["argv"]:
        assert argument in command.replace("'", "")


@pytest.mark.usefixtures("after")
def test_the_sweeps_run_is_that_of_the_named_student(server: SweepServer) -> None:
    run = server.runs[PREEMPTED]
    assert (run.entity, run.project, run.sweep) == ("e", "mvat_dist", SWEEP)
    assert run.config["student_name"]["value"] == OBJECTIVE
    assert isinstance(run.summary["valid/si_sdr"], float)
    [other] = [each for each in server.runs.values() if each.group == run.group and each is not run]
    assert other.config["student_name"]["value"] == STUDENTS[0]
    assert other.sweep is None
    assert other.project == "mvat_dist"


@pytest.mark.usefixtures("after")
def test_a_stopped_trial_keeps_its_checkpoint_and_stays_away(place: Path, server: SweepServer) -> None:
    run = trial(place, STOPPED)
    status = run.read_status()
    assert (status["state"], status["reason"]) == ("stopped", "SIGINT")
    # Both ranks agreed: the last step is the saved one.
    assert [folder.name for folder in run.checkpoints.glob("step-*")] == [f"step-{status['step']:08}"]
    assert [steps(run, student)[-1] for student in STUDENTS] == [status["step"]] * 2
    # From the signal to the saved state: the step that ran, and the save.
    slowest = status["slowest"]
    assert status["signal"]["seconds_to_saved"] <= slowest["step"] + slowest["save"] + 1
    assert not server.runs[STOPPED].preempting
    assert (server.runs[STOPPED].complete, server.runs[STOPPED].exit_code) == (True, 128 + signal.SIGINT)


def test_a_preempted_trial_resumes_as_itself(after: RunDir, server: SweepServer) -> None:
    status = after.read_status()
    assert (status["state"], status["step"]) == ("finished", 25)
    first, second = status["starts"]
    assert first["ended"] == "SIGTERM"
    assert 2 < second["step"] < 25
    rows = [row["global_step"] for row in server.runs[PREEMPTED].history if "loss" in row]
    assert rows == steps(after) == STEPS


def test_the_shipped_file_is_taken_by_wandb_sweep(place: Path) -> None:
    with serving(SweepServer([])) as server:
        file = str(REPOSITORY / "configs" / "sweep.yaml")
        done = subprocess.run(
            wandb("sweep", file),
            cwd=place,
            env=account(server, place),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        sent: dict[str, Any] = server.config
    assert sent == yaml.safe_load((REPOSITORY / "configs" / "sweep.yaml").read_text())
    assert sweepfile.read(REPOSITORY / "configs" / "sweep.yaml").goal == "maximize"
