"""Slurm's cells of the fault matrix that run with every change; `make faults` runs all."""

from __future__ import annotations

import pytest

import tests.faults.cluster  # noqa: F401, registers the faults
from tests.faults.group import Bench
from tests.faults.matrix import Fault, Moment, ci_cells, run_cell

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fault bench"))


@pytest.mark.parametrize(
    ("fault", "moment"),
    [pytest.param(*cell, id=f"{cell[0].name}, {cell[1].words}") for cell in ci_cells(slurm=True)],
)
def test_a_job_that_slurm_disturbs_ends_as_the_undisturbed_run(
    bench: Bench, fault: Fault, moment: Moment
) -> None:
    run_cell(fault, moment, bench)
