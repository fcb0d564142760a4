"""What runs in a job before the trainer does: its shell script, its pickle, its environment."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from mvat_dist.launch import slurm
from tests.submit_place import Program, programs_in


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    return programs_in(tmp_path / "bin", monkeypatch)


def test_what_a_job_pickles_is_its_command_line() -> None:
    job = slurm.Command("mvat_dist.train", ["--seed", "1"])
    text = pickle.dumps(job.checkpoint())
    assert len(text) < 400
    again = pickle.loads(text).function  # noqa: S301, our own
    assert vars(again) == {"module": "mvat_dist.train", "argv": ["--seed", "1"]}
    assert type(again) is slurm.Command


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"7_submitted.pkl": "old"}, {"7_submitted.pkl": "old"}),
        ({"7_submitted.pkl": "old", "7_submitted.pkl.save_tmp": "torn"}, {"7_submitted.pkl": "old"}),
        ({"7_submitted.pkl.save_tmp": "new"}, {"7_submitted.pkl": "new"}),
        ({"7_1_result.pkl.save_tmp": "x", "8_1_result.pkl.save_tmp": "y"}, {"8_1_result.pkl.save_tmp": "y"}),
        ({}, {}),
    ],
)
def test_a_restart_clears_what_a_killed_submitit_left(
    tmp_path: Path, files: dict[str, str], left: dict[str, str]
) -> None:
    folder = tmp_path / "a 'folder'"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    lines = slurm._setup(folder, slurm.Resources(1, 1, 6, 10, 2, max_restarts=3))
    script = "\n".join([*lines, 'echo "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS $MVAT_MAX_RESTARTS"'])
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "6"}
    done = subprocess.run(
        ["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True
    )
    assert {file.name: file.read_text() for file in folder.iterdir()} == left
    assert done.stdout == "6 4 3\n"  # two of six CPUs are the readers'


@pytest.mark.parametrize(
    ("tasks", "gpus", "said"),
    [
        ("1(x4)", "8", "error: 8 GPUs on a node for 1 task(s) of one GPU each: add --ntasks-per-node 8"),
        ("8(x4)", "8", "1000"),
        ("1(x4)", None, "1000"),
    ],
)
def test_sbatch_with_idle_gpus_is_refused_before_the_ranks_start(
    program: Program, tasks: str, gpus: str | None, said: str
) -> None:
    for name in ("bash", "sed", "dirname", "date", "mkdir", "tail"):
        program(name, f'exec {shutil.which(name, path=os.defpath)} "$@"')
    program("srun", 'echo "$MVAT_MAX_RESTARTS"')
    script = Path(__file__).parent.parent.parent / "slurm" / "distill.sh"
    variables = {"PATH": os.environ["PATH"], "SLURM_TASKS_PER_NODE": tasks}
    variables |= {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    done = subprocess.run(["bash", str(script)], env=variables, capture_output=True, text=True)
    assert done.returncode == (2 if said.startswith("error") else 0)
    assert (done.stdout + done.stderr).splitlines()[-1].startswith(said)
    assert Path("runs").exists() is (done.returncode == 0)


@pytest.mark.parametrize(("asked", "seconds"), [("7", "7"), (None, "180")])
def test_sbatch_gives_the_other_ranks_time_to_end(program: Program, asked: str | None, seconds: str) -> None:
    for name in ("bash", "sed", "dirname", "date", "mkdir", "tail"):
        program(name, f'exec {shutil.which(name, path=os.defpath)} "$@"')
    program("srun", 'echo "$SLURM_WAIT"')
    script = Path(__file__).parent.parent.parent / "slurm" / "distill.sh"
    variables = {"PATH": os.environ["PATH"], "SLURM_TASKS_PER_NODE": "2"}
    variables |= {"SLURM_WAIT": asked} if asked else {}
    done = subprocess.run(["bash", str(script)], env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, seconds), done.stderr


def test_a_job_submitted_from_within_a_job_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_NTASKS",
        "SLURM_CONF",
        "RANK",
        "TORCHELASTIC_RUN_ID",
        "SBATCH_ACCOUNT",
    ):
        monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    with slurm.outside_of_jobs():
        assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        assert {"SLURM_CONF", "SBATCH_ACCOUNT"} <= os.environ.keys()
    assert dict(os.environ) == before
