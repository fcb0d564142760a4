"""An evaluation by the tasks of one ``srun``, on several nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mvat_dist import evaluate

pytestmark = pytest.mark.slurm


def test_the_tasks_of_one_srun_share_an_evaluation(tmp_path: Path, corpus: Path) -> None:
    argv = ["--data", str(corpus), "--metrics", "si_sdr,estoi", "--processes", "1", "--out"]
    evaluate.main([*argv, str(tmp_path / "alone")])
    out = tmp_path / "shared out"
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--job-name=mvat-evaluate", "--time=5"]
    done = subprocess.run(
        [*srun, sys.executable, "-m", "mvat_dist.evaluate", *argv, str(out)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows and tables") >= 1
    for name in ("rows.jsonl", "scores.csv", "scores.md"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert not list(out.glob("rows-*"))
