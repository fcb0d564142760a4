"""Optuna's proposals: the same by seed, the same after a kill, better than random, failures told."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from mvat_dist.errors import UserError
from mvat_dist.launch import bayes, sweep_file
from mvat_dist.launch.sweep_file import Point, Sweep
from tests.conftest import REPOSITORY

PARAMETERS = {
    "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0},
    "weight": {"mu": 0.0, "sigma": 3.0},
    "distil": {"parameters": {"method": {"values": ["output", "mvat", None]}, "fixed": {"value": 3}}},
    "batch": {"distribution": "q_uniform", "min": 4, "max": 64, "q": 4},
    "seed": {"min": 1, "max": 3},
}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return write(tmp_path, "minimize")


def write(folder: Path, goal: str) -> Sweep:
    file = folder / "sweep.yaml"
    content = {"method": "bayes", "metric": {"name": "loss", "goal": goal}, "program": "x"}
    file.write_text(yaml.safe_dump(content | {"parameters": PARAMETERS}))
    return sweep_file.read(file)


def loss(point: Point) -> float:
    """A closed form with its minimum at lr 1e-3, weight 1, mvat, batch 32."""
    method = {"output": 1.0, "mvat": 0.0, None: 2.0}[point["distil"]["method"]]
    return (
        (math.log10(point["lr"]) + 3) ** 2
        + (point["weight"] - 1) ** 2
        + method
        + abs(point["batch"] - 32) / 16
    )


def search(sweep: Sweep, folder: Path, count: int, seed: int = 0, first: int = 0) -> dict[int, float | None]:
    """The results of trials that run one after the other; a later call goes on from the journal."""
    results: dict[int, float | None] = {}
    for number in range(first, count):
        results[number] = loss(bayes.propose(sweep, folder, seed, number, results))
    return results


def test_a_seed_gives_the_same_points_and_the_trials_improve(sweep: Sweep, tmp_path: Path) -> None:
    first = search(sweep, tmp_path / "a", 30)
    assert search(sweep, tmp_path / "b", 30) == first
    assert search(sweep, tmp_path / "c", 3, seed=1) != search(sweep, tmp_path / "d", 3)
    assert len(set(first.values())) == 30
    losses = [value for value in first.values() if value is not None]
    assert sum(losses[20:]) < sum(losses[:10])  # the first ten are random


def test_a_greater_metric_is_better_where_the_goal_is_to_maximize(tmp_path: Path) -> None:
    sweep, results = write(tmp_path, "maximize"), {}
    for number in range(30):
        results[number] = -loss(bayes.propose(sweep, tmp_path / "a", 0, number, results))
    values = list(results.values())
    assert sum(values[20:]) > sum(values[:10])


def test_values_have_their_kinds(sweep: Sweep, tmp_path: Path) -> None:
    points = [bayes.propose(sweep, tmp_path, 0, number, {}) for number in range(20)]
    for point in points:
        assert 1e-5 <= point["lr"] <= 1.0
        assert (type(point["batch"]), point["batch"] % 4, point["distil"]["fixed"]) == (int, 0, 3)
    assert {point["seed"] for point in points} == {1, 2, 3}
    assert {point["distil"]["method"] for point in points} == {"output", "mvat", None}


def test_a_killed_study_goes_on_as_if_it_had_not_been(sweep: Sweep, tmp_path: Path) -> None:
    """Killed between Optuna's choice and our note of its number, holding the lock; and in mid-line."""
    uninterrupted = search(sweep, tmp_path / "whole", 16)
    folder = tmp_path / "killed"
    results = search(sweep, folder, 12)
    program = (
        "import os, sys; from pathlib import Path; import optuna\n"
        "from mvat_dist.launch import bayes, sweep_file\n"
        "optuna.Trial.set_user_attr = lambda *_: os._exit(9)\n"
        "file, folder, results = sys.argv[1], sys.argv[2], eval(sys.argv[3])\n"
        "bayes.propose(sweep_file.read(Path(file)), Path(folder), 0, 12, results)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "sweep.yaml"), str(folder), repr(results)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 9
    with (folder / "optuna.jsonl").open("a") as file:
        file.write('{"op_code": 4, "worker_id": "')
    for number in range(12, 16):
        results[number] = loss(bayes.propose(sweep, folder, 0, number, results))
    assert results == uninterrupted


def test_asking_again_changes_nothing(sweep: Sweep, tmp_path: Path) -> None:
    """A restarted job has its own trial's point, whatever the others have found in the meantime."""
    results = search(sweep, tmp_path / "a", 11)
    point = bayes.propose(sweep, tmp_path / "a", 0, 11, results)
    later = bayes.propose(sweep, tmp_path / "a", 0, 12, results)
    assert bayes.propose(sweep, tmp_path / "a", 0, 11, results | {11: 5.0}) == point
    assert bayes.propose(sweep, tmp_path / "a", 0, 12, results | {11: 5.0}) == later


def test_tasks_of_an_array_that_start_at_once_have_different_points(sweep: Sweep, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        points = list(pool.map(lambda number: bayes.propose(sweep, tmp_path, 0, number, {}), range(8)))
    assert len({point["lr"] for point in points}) == 8
    again = [bayes.propose(sweep, tmp_path, 0, number, {}) for number in range(8)]
    assert again == points


def test_a_failed_trial_is_told_as_failed_and_counts_once_it_has_finished(
    sweep: Sweep, tmp_path: Path
) -> None:
    import optuna

    results: dict[int, float | None] = {}
    for number in range(3):
        value = loss(bayes.propose(sweep, tmp_path, 0, number, results))
        results[number] = None if number == 1 else value

    def states() -> list[tuple[int, str, float | None]]:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.jsonl"))
        [summary] = optuna.get_all_study_summaries(optuna.storages.JournalStorage(backend))
        study = optuna.load_study(
            study_name=summary.study_name, storage=optuna.storages.JournalStorage(backend)
        )
        return [(trial.user_attrs["trial"], trial.state.name, trial.value) for trial in study.trials]

    bayes.propose(sweep, tmp_path, 0, 3, results)
    complete = [(0, "COMPLETE", results[0]), (1, "FAIL", None), (2, "COMPLETE", results[2])]
    assert states() == [*complete, (3, "RUNNING", None)]
    results[1] = 0.5  # the same command has started it again
    bayes.propose(sweep, tmp_path, 0, 4, results)
    bayes.propose(sweep, tmp_path, 0, 5, results)
    waiting = [(number, "RUNNING", None) for number in (3, 4, 5)]
    assert states() == [*complete, waiting[0], (1, "COMPLETE", 0.5), *waiting[1:]]


def test_without_optuna_the_refusal_says_what_to_install(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'mvat_dist\[sweeps\]'"):
        bayes.propose(sweep, tmp_path, 0, 0, {})
    assert not (tmp_path / "optuna.jsonl").exists()
