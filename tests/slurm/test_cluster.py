"""`slurm/devcluster.sh` itself."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.slurm.conftest import accounting, slurm, until

pytestmark = pytest.mark.slurm

SCRIPT = REPOSITORY / "slurm" / "devcluster.sh"


@pytest.fixture
def state() -> Path:
    """The state folder of the running cluster."""
    folder = Path(os.environ["SLURM_CONF"]).parent
    if not (folder / "run" / "slurmctld.pid").exists():
        pytest.skip("this cluster was not started by slurm/devcluster.sh")
    return folder


def processes(state: Path) -> dict[str, int]:
    return {file.stem: int(file.read_text()) for file in (state / "run").glob("*.pid")}


def devcluster(command: str, state: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, command, state], capture_output=True, text=True)


def test_up_again_changes_nothing(state: Path) -> None:
    first = processes(state)
    again = devcluster("up", state)
    assert (again.returncode, again.stdout) == (0, f"export SLURM_CONF={state}/slurm.conf\n")
    assert processes(state) == first
    assert devcluster("status", state).stdout == again.stdout


def test_up_mends_what_was_killed(state: Path) -> None:
    first = processes(state)
    killed = {"node3", "slurmctld", "munged"}
    for name in killed:
        os.kill(first[name], signal.SIGKILL)
    assert devcluster("status", state).returncode == 2
    assert devcluster("up", state).returncode == 0
    after = processes(state)
    assert {name for name in first if after[name] != first[name]} == killed
    nodes = set(slurm("srun", "--nodes=4", "printenv", "SLURMD_NODENAME").split())
    assert nodes == {"node1", "node2", "node3", "node4"}


def test_the_urgent_partition_takes_nodes_from_the_normal_one(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    # A job that only ends in its grace time has ended for good, so it requeues itself; but once, as
    # scancel sends SIGTERM too.
    step = tmp_path / "step.sh"
    requeue = '[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || scontrol requeue "$SLURM_JOB_ID"'
    step.write_text(f"trap '{requeue}; exit' TERM\nwhile :; do sleep 0.1; done\n")
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\necho start >> '{starts}'\nsrun bash '{step}'\n")
    flags = ["--parsable", "--job-name=mvat-test", "--nodes=4", "--cpus-per-task=8", "--output=/dev/null"]
    normal = slurm("sbatch", *flags, "--requeue", str(script)).strip()
    until(starts.exists, 20)
    urgent = slurm("sbatch", *flags, "--partition=urgent", "--wrap", "true").strip()
    assert accounting(urgent, "State")[0] == ["COMPLETED"]
    until(lambda: starts.read_text().count("start") == 2, 60)
    states = slurm("sacct", "-D", "-X", "-n", "-P", f"--jobs={normal}", "--format=State").split()
    assert states[0] in {"PREEMPTED", "REQUEUED"}


@pytest.mark.parametrize("command", ["up", "status", "down"])
def test_a_folder_that_is_not_ours_alone_is_left_alone(tmp_path: Path, state: Path, command: str) -> None:
    # What lies in such a folder might be another user's slurm.conf, which root would start, or be dear to us.
    foreign, link, opened = tmp_path / "foreign", tmp_path / "link", tmp_path / "open"
    for folder in (foreign, opened):
        folder.mkdir(mode=0o700)
        (folder / "slurm.conf").write_text("mine")
    (opened / ".mvat-devcluster").touch()
    opened.chmod(0o755)
    link.symlink_to(state)
    for refused in (foreign, link, opened):
        done = devcluster(command, refused)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert str(refused) in done.stderr
    assert (foreign / "slurm.conf").read_text() == "mine"
    assert (state / "run" / "slurmctld.pid").exists()
