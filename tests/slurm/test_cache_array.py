"""A teacher cache filled by an array of jobs: the same bytes as from one process, though a task died."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvat_dist import cache
from tests.cache_corpus import write_teacher
from tests.slurm.conftest import slurm, submit, until

pytestmark = pytest.mark.slurm


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("teacher*")}


def test_an_array_fills_the_cache(corpus: Path, tmp_path: Path) -> None:
    """Three tasks, one of them cancelled as it runs; the same command then fills what is missing."""
    teacher = write_teacher(tmp_path / "a teacher.safetensors", seed=5)
    given = [
        f"--teacher={teacher}",
        f"--data={corpus}",
        "--data.variants=20",
        "--data.segment_seconds=0.5",
        "--data.reverb_probability=0",
        "--workers=1",
    ]
    out = tmp_path / "by an array"
    done = submit("--cache=3", f"--out={out}", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    number = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("job"))

    def states() -> dict[str, str]:
        rows = slurm("squeue", "--noheader", "--array", f"--jobs={number}", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows)

    first = f"{number}_0"
    until(lambda: states().get(first) == "RUNNING", 60)
    slurm("scancel", first)
    until(lambda: not states(), 120)
    assert not (out / "teacher.json").exists()
    assert submit("--cache=3", f"--out={out}", *given, cwd=tmp_path).returncode == 0
    until(lambda: (out / "teacher.json").exists(), 120)

    alone = tmp_path / "by one process"
    cache.main([f"--out={alone}", *given])
    assert content(out) == content(alone)
    again = submit("--cache=3", f"--out={out}", *given, "--seed=1", "--cluster=local", cwd=tmp_path)
    assert again.returncode == 2
    assert "seed 0, not 1" in again.stderr
