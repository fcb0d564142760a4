"""Students trained apart on the real cluster: groups with nodes of their own, and a job for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mvat_dist.runs.folder import RunDir
from tests.slurm.conftest import submit

pytestmark = pytest.mark.slurm


def test_split_and_jobs_give_the_same_students(tmp_path: Path, training: list[str]) -> None:
    """Split: tiny on two nodes, mini on the other two, where its own first rank is. Jobs: two nodes each."""
    options = ["--cluster=slurm", *training, "--train.steps=2", "--wait"]
    split = submit("--nodes=4", "--placement=split", "--name=split", *options, cwd=tmp_path)
    assert split.returncode == 0, split.stdout + split.stderr
    jobs = submit("--nodes=2", "--placement=jobs", "--name=jobs", *options, cwd=tmp_path)
    assert jobs.returncode == 0, jobs.stdout + jobs.stderr
    for student in ("tiny", "mini"):
        first, second = (RunDir(tmp_path / "runs" / name / "parts" / student) for name in ("split", "jobs"))
        assert first.read_status()["state"] == second.read_status()["state"] == "finished"
        place = json.loads(first.environment.read_text())["ranks"]
        assert (place["world_size"], place["nodes"], place["node_rank"]) == (2, 2, 0)
        one, other = (load_file(run.weights(student, "last")) for run in (first, second))
        assert {key: value.tobytes() for key, value in one.items()} == {
            key: value.tobytes() for key, value in other.items()
        }
    again = submit("--nodes=4", "--name=split", *options[:-1], cwd=tmp_path)
    assert "this run is finished" in again.stdout
