"""`make gpu` on a machine without a GPU: it says so, and its path holds on a CPU with tiny networks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import flops, kind_of, snr
from tests.conftest import REPOSITORY


def run(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert [line for line in done.stderr.splitlines() if "no GPU" in line]
    assert not list(tmp_path.iterdir())


def test_its_path_on_a_cpu(tmp_path: Path) -> None:
    """Networks are right in float32 and compiled; the group's FLOPs are its parts'; nothing is written."""
    done = run("--device", "cpu", "--tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line
    ]
    right = {row[0]: row[1:] for row in cells if row[0] in {"one", "two", "teacher"} and len(row) == 7}
    assert len(right) == 3
    for fp32, gradient, _, _, compiled, its_gradient in right.values():
        assert min(float(one) for one in (fp32, compiled) if one) > 100
        # A value at the kink of a ReLU may be on its other side in float64: one such costs 70 dB.
        assert min(float(one) for one in (gradient, its_gradient) if one) > 40
    assert all(right["one"])
    work = {row[0]: float(row[3]) for row in cells if len(row) == 6 and re.match(r"[\d.]", row[3])}
    assert work["group"] == pytest.approx(work["teacher's forward"] + work["one"] + work["two"], rel=0.02)
    assert not list(tmp_path.iterdir())


def test_what_it_counts() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert snr(torch.tensor([1.0, 1.1]), torch.tensor([1.0, 1.0])) == pytest.approx(23.0, abs=0.1)
    kinds = {"aten::addmm": "matrix product", "aten::conv1d": "convolution", "aten::mul": "elementwise"}
    kinds |= {"flash_fwd_kernel": "attention", "aten::_foreach_mul_": "optimiser"}
    assert {name: kind_of(name) for name in kinds} == kinds
