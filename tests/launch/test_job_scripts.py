"""What runs in a job before its command does: the shell script, the pickle, the environment."""

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
    ("tasks", "gpus", "output"),
    [
        ("1(x4)", "8", "error: 8 GPUs on a node for 1 task(s) of one GPU each: add --ntasks-per-node 8"),
        ("8(x4)", "8", "1000"),
        ("1(x4)", None, "1000"),
    ],
)
def test_sbatch_with_idle_gpus_is_refused_before_the_ranks_start(
    program: Program, tasks: str, gpus: str | None, output: str
) -> None:
    for name in ("bash", "sed", "dirname", "date", "mkdir", "tail"):
        program(name, f'exec {shutil.which(name, path=os.defpath)} "$@"')
    program("srun", 'echo "$MVAT_MAX_RESTARTS"')
    script = Path(__file__).parent.parent.parent / "slurm" / "distill.sh"
    variables = {"PATH": os.environ["PATH"], "SLURM_TASKS_PER_NODE": tasks}
    variables |= {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    done = subprocess.run(["bash", str(script)], env=variables, capture_output=True, text=True)
    assert done.returncode == (2 if output.startswith("error") else 0)
    assert (done.stdout + done.stderr).splitlines()[-1].startswith(output)
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
    environment = dict(os.environ)
    with slurm.outside_of_jobs():
        assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        assert {"SLURM_CONF", "SBATCH_ACCOUNT"} <= os.environ.keys()
    assert dict(os.environ) == environment


def test_a_command_runs_its_module_and_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SUBMITIT_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    slurm.Command("mvat_dist.launch.requeue", ["0"])("--seed=1")  # the ranks ended well: nothing to do
    slurm.Command("mvat_dist.launch.requeue", [])("--help")
    assert "usage: python -m mvat_dist.launch.requeue" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        slurm.Command("mvat_dist.launch.requeue", [])()
    assert ended.value.code == 2
    assert "give the exit code of the ranks first" in capsys.readouterr().err


@pytest.mark.parametrize(("record", "rank"), [("{", None), (None, "0")])
def test_a_mistake_found_before_the_command_runs_has_the_exit_code_of_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record: str | None,
    rank: str | None,
) -> None:
    """A damaged job.json, and a rank in a world of unknown size."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SUBMITIT_FOLDER", str(tmp_path / "submitit"))
    if record:
        (tmp_path / "job.json").write_text(record)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        slurm.Command("mvat_dist.launch.requeue", ["0"])()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_task_that_calls_srun_itself_runs_in_the_shell_of_each_job_of_an_array(tmp_path: Path) -> None:
    resources = slurm.Resources(2, 4, 3, 60, 2, srun_args=("--mpi=none",))
    executor = slurm.Executor(tmp_path, "mvat-sweep", resources, in_shell=True, requeues_itself=True)
    script = executor.script(["a"] * 300).splitlines()
    assert "#SBATCH --array=0-299%300" in script  # all may run at once
    assert not [line for line in script if line.startswith("srun")]
    assert "#SBATCH --array" not in executor.script()
    assert resources.processes == 8


@pytest.mark.parametrize(("itself", "restarts"), [(True, 1_000_000), (False, 3)])
def test_restarts_are_counted_once(tmp_path: Path, itself: bool, restarts: int) -> None:
    """By submitit, or by what runs in the job."""
    resources = slurm.Resources(1, 1, 1, 60, 0, max_restarts=3)
    executor = slurm.Executor(tmp_path, "mvat-one", resources, requeues_itself=itself)
    assert executor._submitit.max_num_timeout == restarts
