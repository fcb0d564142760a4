"""Jobs on the real cluster: by submitit and by sbatch, refused, repeated, failing and requeued."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mvat_dist.distributed import ranks
from mvat_dist.distributed.slurm import job_state
from mvat_dist.launch.slurm import Executor, Resources
from mvat_dist.runs.folder import RunDir
from tests.conftest import REPOSITORY
from tests.slurm.conftest import accounting, slurm, submit, until
from tests.slurm.rank_report import RankReport

pytestmark = pytest.mark.slurm

# In the place of the trainer: reports its rank and its arguments, then does what they say.
STAND_IN = """
import json, os, sys, time
from dataclasses import asdict
from pathlib import Path
from mvat_dist.distributed import ranks
here = ranks.read()
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
report = {"argv": sys.argv[1:], "python": sys.prefix, "node": os.environ["SLURMD_NODENAME"]}
report |= {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK", "VIRTUAL_ENV")}
file = Path(f"start-{restart}-rank-{here.rank}.json")
file.with_suffix(".tmp").write_text(json.dumps({**asdict(here), **report}))
file.with_suffix(".tmp").rename(file)
if "--mistake" in sys.argv:
    time.sleep(here.rank / 2)  # ranks do not find it at the same moment
    sys.exit(print("error: no such thing", file=sys.stderr) or 2)
if "--fail" in sys.argv and here.rank == 1:
    sys.exit("no luck")
if "--stay" in sys.argv and restart == "0":
    time.sleep(600)
"""

Sbatch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project, in a path with spaces, with a virtual environment and a stand-in trainer."""
    folder = tmp_path / "my project"
    shutil.copytree(
        REPOSITORY / "mvat_dist", folder / "mvat_dist", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "mvat_dist" / "train.py").write_text(STAND_IN)
    (folder / "slurm").mkdir()
    for script in ("distill.sh", "environment.sh"):
        shutil.copy(REPOSITORY / "slurm" / script, folder / "slurm")
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'export VIRTUAL_ENV=used PATH="{Path(sys.executable).parent}:$PATH"\n')
    return folder


def reports(folder: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*rank-*.json"))]


def places(reported: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [
        (report["rank"], report["node"], report["node_rank"], report["local_rank"]) for report in reported
    ]


def test_four_nodes_meet_through_submitit(tmp_path: Path) -> None:
    # Whatever a folder is called, it is a name and not a command.
    folder = tmp_path / 'it\'s a "run" $(touch pwned) `touch pwned` #1 ü'
    folder.mkdir()
    resources = Resources(4, 1, 2, 10, 1, setup=(f'export PYTHONPATH="{REPOSITORY}"',))
    [job] = Executor(folder / "submitit", "mvat-report", resources).submit(RankReport(folder))
    until(lambda: not job_state(job, "mvat-report").active, 300)
    reported = reports(folder)
    assert places(reported) == [(rank, f"node{rank + 1}", rank, 0) for rank in range(4)]
    assert {(report["total"], report["OMP_NUM_THREADS"]) for report in reported} == {(1 + 2 + 3 + 4, "1")}
    rows = accounting(job, "JobName", "State", "NNodes", "AllocCPUS")
    assert rows[0] == ["mvat-report", "COMPLETED", "4", "8"]
    # The ranks got their two CPUs each, although srun does not take them over from sbatch.
    assert rows[-1][1:] == ["COMPLETED", "4", "8"]
    assert not list(tmp_path.rglob("pwned"))


def losses(run: RunDir, student: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in run.history(student).read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_submit_and_sbatch_train_the_same_fleet_on_four_nodes(tmp_path: Path, training: list[str]) -> None:
    done = submit("--cluster=slurm", "--nodes=4", "--wait", "--name=fleet", *training, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run, other = RunDir(tmp_path / "runs" / "fleet"), RunDir(tmp_path / "runs" / "other")
    first = json.loads(run.job.read_text())["job_id"]
    again = submit("--nodes=4", "--name=fleet", *training, cwd=tmp_path)
    assert "finished (4 steps): nothing to do" in again.stdout

    script = str(REPOSITORY / "slurm" / "distill.sh")
    second = subprocess.run(
        ["sbatch", "--parsable", script, *training, "--name=other"],
        cwd=tmp_path,
        env={**os.environ, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    until(lambda: not job_state(second, "mvat-distill").active, 600)
    for job in (first, second):
        assert accounting(job, "State", "NNodes", "ExitCode")[0] == ["COMPLETED", "4", "0:0"]
    for student in ("tiny", "mini"):
        assert [step for step, _ in losses(run, student)] == [1, 2, 3, 4]
        assert losses(run, student) == losses(other, student)
        weights, same = (load_file(folder.weights(student, "last")) for folder in (run, other))
        assert {key: value.tobytes() for key, value in weights.items()} == {
            key: value.tobytes() for key, value in same.items()
        }
    assert run.read_status()["state"] == other.read_status()["state"] == "finished"


def test_a_mistake_found_in_the_job_comes_back_through_wait(tmp_path: Path, training: list[str]) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"not a model")
    teacher = ["--distil.method=output", "--teacher=holiday.jpg"]
    done = submit("--wait", *training, *teacher, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "holiday.jpg" in done.stderr
    assert "Traceback" not in done.stderr
    job = next((tmp_path / "runs").glob("*/job.json"))
    assert accounting(json.loads(job.read_text())["job_id"], "State", "ExitCode")[0] == ["FAILED", "2:0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition=nope"], "invalid partition specified: nope"),
        (["--gpus-per-node=8"], "Slurm refused the job"),
        (["--nodes=1", "--slurm=nonsense=1"], "nonsense"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_leaves_nothing(
    tmp_path: Path, training: list[str], arguments: list[str], words: str
) -> None:
    done = submit(*training, "--train.batch=8", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_is_queued_once(tmp_path: Path, training: list[str]) -> None:
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "mvat_dist.submit", "--name=once", "--slurm=hold", *training]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("nothing new was submitted" in output for output in outputs) == [False, True]
    queued = slurm("squeue", "--noheader", "--name=mvat-once", "--format=%i").split()
    assert len(queued) == 1
    slurm("scancel", queued[0])
    until(lambda: not job_state(queued[0], "mvat-once").active, 20)
    # A cancelled run may start again.
    submit("--name=once", "--slurm=hold", *training, cwd=tmp_path)
    again = slurm("squeue", "--noheader", "--name=mvat-once", "--format=%i").split()
    assert len(again) == 1
    assert again != queued


def test_sbatch_starts_every_rank_with_its_arguments(project: Path) -> None:
    given = ["--student", "a b", "--name=it's $(touch pwned)", "*", ""]
    flags = ["--wait", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=4", "--parsable"]
    job = subprocess.run(
        ["sbatch", *flags, "slurm/distill.sh", *given],
        cwd=project,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1"},  # left over in the user's shell
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    reported = reports(project)
    assert places(reported) == [(rank, f"node{rank // 2 + 1}", rank // 2, rank % 2) for rank in range(4)]
    assert [report["argv"] for report in reported] == [given] * 4
    seen = {
        (report["VIRTUAL_ENV"], report["SRUN_CPUS_PER_TASK"], report["OMP_NUM_THREADS"])
        for report in reported
    }
    assert seen == {("used", "4", "2")}
    assert accounting(job, "State", "NNodes")[0] == ["COMPLETED", "2"]
    assert "follow: tail -F" in (project / f"mvat-distill-{job}.log").read_text()
    assert len(list((project / "runs" / "slurm").glob(f"{job}-*.log"))) == 4
    assert not list(project.rglob("pwned"))


def test_sbatch_takes_four_nodes_unless_told_otherwise_and_works_from_anywhere(
    project: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    command = ["sbatch", "--wait", "--parsable", str(project / "slurm" / "distill.sh")]
    job = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True).stdout.strip()
    assert places(reports(elsewhere)) == [(rank, f"node{rank + 1}", rank, 0) for rank in range(4)]
    assert accounting(job, "State", "NNodes")[0] == ["COMPLETED", "4"]


def test_one_failed_rank_ends_the_job(project: Path) -> None:
    command = ["sbatch", "--wait", "--parsable", "--nodes=2", "slurm/distill.sh", "--fail", "--stay"]
    environment = {**os.environ, "SLURM_WAIT": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    job = done.stdout.strip()
    assert accounting(job, "State")[0] == ["FAILED"]
    assert "no luck" in (project / "runs" / "slurm" / f"{job}-1.log").read_text()


def test_a_mistake_of_the_user_is_the_exit_code_of_the_job(project: Path) -> None:
    command = ["sbatch", "--wait", "--parsable", "slurm/distill.sh", "--mistake"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 2
    log = (project / f"mvat-distill-{done.stdout.strip()}.log").read_text()
    assert "error: no such thing" in log
    assert "Traceback" not in log


def test_a_requeued_job_meets_again_elsewhere(project: Path) -> None:
    flags = ["--parsable", "--nodes=2"]
    command = ["sbatch", *flags, "slurm/distill.sh", "--stay"]
    job = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout.strip()
    until(lambda: len(reports(project)) == 2, 60)
    slurm("scontrol", "requeue", job)
    until(lambda: len(reports(project)) == 4, 90)
    first, _, second, _ = reports(project)
    assert (first["master_port"], second["master_port"]) == (
        ranks.job_port(job, "0", "0"),
        ranks.job_port(job, "0", "1"),
    )
    assert [report["rank"] for report in reports(project)] == [0, 1, 0, 1]
    log = project / f"mvat-distill-{job}.log"
    until(lambda: "start 2:" in log.read_text(), 10)
    assert "start 1:" in log.read_text()


def test_interactive_shells_of_slurm_wait_for_nobody() -> None:
    code = "from mvat_dist.distributed import ranks; print(ranks.read().world_size)"
    assert slurm("salloc", "--quiet", "--nodes=2", sys.executable, "-c", code).strip() == "1"
    inside = f"srun --nodes=2 {shlex.quote(sys.executable)} -c '{code}'"
    assert slurm("salloc", "--quiet", "--nodes=2", "bash", "-c", inside).split() == ["2", "2"]
