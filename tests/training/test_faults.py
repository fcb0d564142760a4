"""Local cells of the fault matrix that run with every change; `make faults` runs all.

Here a rank has reader processes only where the fault may meet them, and the undisturbed run has none;
`make faults` gives them to every run.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import tests.faults.local  # noqa: F401, registers the faults
from tests.faults.group import OPTIONS, Bench
from tests.faults.matrix import FAULTS, CannotError, Fault, Moment, ci_cells, run_cell

READERS = {"kill -9 of rank 0", "SIGTERM to the job", "shard unreadable in mid-epoch"}
"""Faults that readers notice, or outlive."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fault bench"), (*OPTIONS, "--data.workers=0"))


@pytest.fixture(scope="module")
def bench_with_readers(bench: Bench) -> Bench:
    """The same corpus and the same undisturbed run."""
    with_readers = replace(bench, options=OPTIONS)
    with_readers.corpus, with_readers.undisturbed = bench.corpus, bench.undisturbed
    return with_readers


@pytest.mark.parametrize(
    ("fault", "moment"),
    [pytest.param(*cell, id=f"{cell[0].name}, {cell[1].words}") for cell in ci_cells(slurm=False)],
)
def test_a_disturbed_run_ends_as_the_undisturbed_one(
    bench: Bench, bench_with_readers: Bench, fault: Fault, moment: Moment
) -> None:
    assert {fault.name for fault in FAULTS} >= READERS
    try:
        run_cell(fault, moment, bench_with_readers if fault.name in READERS else bench)
    except CannotError as error:
        pytest.skip(str(error))
