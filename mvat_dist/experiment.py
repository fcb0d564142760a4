"""The paper's grid: students x methods x seeds on one teacher, through training and scoring to a report.

    python -m mvat_dist.experiment configs/experiment.yaml --out experiments/paper --nodes 4

All students of one method and one seed are one run, so that they share its teacher. Every stage is the
command that a user would type. The same command again continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from mvat_dist import evaluate, report, submit
from mvat_dist.config import locations, sizes
from mvat_dist.config import parser as configfile
from mvat_dist.config.cli import CommandParser
from mvat_dist.config.schema import Config
from mvat_dist.data.test_sets import held_out
from mvat_dist.errors import EXIT_BUSY, UserError, exit_code
from mvat_dist.evaluation.metrics import registry
from mvat_dist.evaluation.systems import CLASSICAL, TEACHER, load_systems, split_name
from mvat_dist.launch.preflight import check_teacher_file
from mvat_dist.runs.folder import RunDir, run_folder

_SIGNALLED = 128
"""Exit codes above it say which signal ended a process."""


@dataclass
class Grid:
    """The content of an experiment's file."""

    teacher: str
    """A run folder, a student's folder in one, or a checkpoint of the authors."""
    methods: dict[str, dict[str, Any]]
    """The trainer's options of each method, by a name of your own: ``{distil.method: mvat,
    distil.beta_global: 0}``."""
    config: str = "configs/distil.yaml"
    """Configuration that all runs share."""
    students: str = "all"
    """The trainer's ``--student``."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each method is trained with each of these seeds."""
    test: str = ""
    """Packed folder with the test sets to score; empty for the configuration's `data.train`."""
    metrics: str = evaluate.DEFAULT_METRICS
    """The ``--metrics`` of `mvat_dist.evaluate`."""
    baselines: list[str] = field(default_factory=list)
    """Systems to score beside the students and their teacher: model files or runs, NAME=PATH to name one,
    or ``log-mmse``, a classical filter."""


@dataclass(frozen=True)
class Cell:
    """One run of all students, with one method and one seed."""

    argv: list[str]
    """Options of the trainer."""
    config: Config

    @property
    def run(self) -> RunDir:
        return RunDir(run_folder(self.config))

    @property
    def finished(self) -> bool:
        return self.run.finished(self.config)


def read(file: Path) -> Grid:
    """Read the grid from a YAML file.

    Raises:
        UserError: not readable, an unknown key or a wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Grid)
    try:
        grid = Grid(**parser.parse_path(file).clone(with_meta=False).as_dict())
    except Exception as error:
        known = ", ".join(Grid.__dataclass_fields__)
        raise UserError(f"{file}: {' '.join(str(error).split())} (the keys: {known})") from error
    if not grid.methods or not grid.seeds:
        raise UserError(f"{file}: name at least one method and one seed")
    return grid


def cells(grid: Grid, runs: Path, overrides: list[str]) -> list[Cell]:
    """All runs of the grid, checked, in order of their seeds.

    A grid that is stopped early then holds complete comparisons.

    Raises:
        UserError: the configuration of a run is refused, or `overrides` make two runs one.
    """
    grid_cells = []
    for seed in grid.seeds:
        for method, options in grid.methods.items():
            argv = ["--config", grid.config, "--student", grid.students, "--teacher", grid.teacher]
            argv += [f"--{key}={value}" for key, value in options.items()]
            argv += [f"--seed={seed}", f"--runs={runs}", f"--name={method}-seed{seed}"]
            grid_cells.append(Cell(argv, configfile.parse([*argv, *overrides])))
    if len({cell.run.path for cell in grid_cells}) < len(grid_cells):
        raise UserError("two runs of the grid have the same name: seeds must differ, and --name be left out")
    return grid_cells


def main(argv: list[str] | None = None) -> None:
    """Train and score the runs that are not finished, and write the report.

    Raises:
        UserError: anything the user can mend.
        SystemExit: the exit code of a training that was stopped; 1 where runs failed; `EXIT_BUSY` where
            another process trains one of them.
    """
    arguments, options = _parser().parse_known_args(argv)
    grid = read(arguments.grid)
    out: Path = arguments.out.absolute()
    submission, overrides = submit.parser().parse_known_args(options)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    runs = cells(grid, out / "runs", overrides)
    _check(grid, runs)
    _print_states(runs, out)
    unfinished = [cell for cell in runs if not cell.finished]
    if submission.dry_run:
        submit.main([*(unfinished or runs)[0].argv, *options])
        return
    failed = [cell for cell in unfinished if not _train(cell, options)]
    if arguments.wait:
        queued = [cell for cell in unfinished if cell not in failed]
        failed += [cell for cell in queued if not _train(cell, [*options, "--wait"])]
    finished = [cell for cell in runs if cell.finished]
    if len(finished) + len(failed) == len(runs):
        _score_and_report(finished, grid, out / "report")
    else:
        print("in the queue; when all are finished, the same command scores them and writes the report")
    if failed:
        print(f"failed: {_names(failed)}; python -m mvat_dist.status --runs {out / 'runs'} says why")
        raise SystemExit(1)


def _check(grid: Grid, runs: list[Cell]) -> None:
    """Refuse now what would otherwise be refused after hours of training.

    Raises:
        UserError: no such teacher, metric, baseline or test set, or a baseline whose name is taken.
    """
    registry.select(grid.metrics)
    names = {split_name(baseline)[0] for baseline in grid.baselines}
    networks = {TEACHER, *(name for cell in runs for name in sizes.select(grid.students, cell.config.sizes))}
    if taken := sorted(names & networks):
        raise UserError(f"baselines: {', '.join(taken)} is a network of the grid: choose another NAME")
    for config in (cell.config for cell in runs):
        if config.distil.method != "none" and config.teacher.source == "live":
            check_teacher_file(config.teacher.file)
    try:
        load_systems([_named(baseline) for baseline in grid.baselines], "best")
        for data in dict.fromkeys(_test_data(grid, cell) for cell in runs):
            held_out(data, 1, 0.0)
    except UserError as error:
        raise UserError(f"what is to be scored in the end: {error}") from error


def _test_data(grid: Grid, cell: Cell) -> str:
    """The packed folder of the clips that a run is scored on."""
    return grid.test or cell.config.data.train


def _score_and_report(finished: list[Cell], grid: Grid, out: Path) -> None:
    """Score the finished runs and write their report to `out`."""
    if not finished:
        return
    for cell in finished:
        data, run = _test_data(grid, cell), cell.run.path
        argv = [str(run), *map(_named, grid.baselines), "--data", data, "--metrics", grid.metrics]
        label = evaluate.label_of(locations.name(data), "best")
        evaluate.main([*argv, "--out", str(run / "evaluate" / label)])
    report.main([*(str(cell.run.path) for cell in finished), "--out", str(out)])


def _named(baseline: str) -> str:
    """`baseline` as a MODEL of evaluate, with a name that no student has."""
    name, path = split_name(baseline)
    return baseline if name or baseline == CLASSICAL else f"baseline-{path.stem}={baseline}"


def _train(cell: Cell, options: list[str]) -> bool:
    """Submit one run, or train it where there is no cluster; False where it failed and the others go on.

    Raises:
        SystemExit: a signal stopped it, which stops the experiment too; or another process trains it, and
            the next run would compete with that one for the same cores.
    """
    print(f"\n== {cell.run.path.name}", flush=True)
    try:
        submit.main([*cell.argv, *options])
    except SystemExit as stopped:
        if stopped.code == EXIT_BUSY:
            print(f"{cell.run.path.name} is being trained: the same command continues when that has ended")
            raise
        if isinstance(stopped.code, int) and stopped.code > _SIGNALLED:
            raise
        return False
    return True


def _print_states(runs: list[Cell], out: Path) -> None:
    finished = sum(cell.finished for cell in runs)
    print(f"{len(runs)} runs below {out / 'runs'}, {finished} of them finished")
    for cell in runs:
        state = "finished" if cell.finished else cell.run.read_status().get("state", "not started")
        print(f"  {cell.run.path.name:<32} {state}")


def _names(runs: list[Cell]) -> str:
    return ", ".join(cell.run.path.name for cell in runs)


def _parser() -> argparse.ArgumentParser:
    options = CommandParser(
        "python -m mvat_dist.experiment",
        "Train students with several methods and seeds on one teacher, score them, and write the report. "
        "Every option that is not listed belongs to python -m mvat_dist.submit or to the trainer, for all "
        "runs. The same command again continues where this one stopped.",
        "python -m mvat_dist.experiment configs/experiment.yaml --out experiments/paper --nodes 4",
    )
    options.add_argument("grid", type=Path, help=f"YAML file: {', '.join(Grid.__dataclass_fields__)}")
    options.add_argument("--out", type=Path, required=True, help="folder for runs/ and report/")
    options.add_argument("--wait", action="store_true", help="on Slurm: wait for the jobs, then score them")
    return options


if __name__ == "__main__":
    sys.exit(exit_code(main))
