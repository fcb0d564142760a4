"""Points of a sweep file: random ones, a grid against itertools, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from mvat_dist.errors import UserError
from mvat_dist.launch import sweep_file
from mvat_dist.launch.sweep_file import Sweep
from tests.conftest import REPOSITORY


def sweep(folder: Path, parameters: Any, method: str = "random", **more: Any) -> Sweep:
    file = folder / "a sweep.yaml"
    content = {"method": method, "metric": {"name": "loss"}, "program": "x", "parameters": parameters, **more}
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return sweep_file.read(file)


def test_points_of_a_random_search_are_spread_as_the_distribution_says(tmp_path: Path) -> None:
    search = sweep(tmp_path, {"x": {"min": 0.5, "max": 2.5}, "y": {"mu": 2.0, "sigma": 0.5}})
    points = [search.point(number, seed=0) for number in range(1500)]
    assert stats.kstest([point["x"] for point in points], stats.uniform(0.5, 2.0).cdf).pvalue > 1e-3
    assert stats.kstest([point["y"] for point in points], stats.norm(2.0, 0.5).cdf).pvalue > 1e-3


def test_very_many_values_cost_nothing(tmp_path: Path) -> None:
    """As in W&B's own examples, where a seed is any of two thousand million."""
    steps = {"distribution": "q_uniform", "min": 0, "max": 1e9, "q": 0.5}
    grid = sweep(tmp_path, {"seed": {"min": 0, "max": 2**31 - 1}, "lr": steps}, method="grid")
    assert grid.size() == 2**31 * (2 * 10**9 + 1)
    assert grid.point(5 * (2 * 10**9 + 1) + 7, 0) == {"seed": 5, "lr": 3.5}


def test_kinds_of_values_survive(tmp_path: Path) -> None:
    """A batch has to be a whole number, a switch true or false."""
    batch = sweep(tmp_path, {"x": {"distribution": "q_uniform", "min": 4, "max": 64, "q": 4}})
    assert all(type(batch.point(number, 0)["x"]) is int for number in range(20))
    switch = sweep(tmp_path, {"x": {"values": [True, False]}})
    assert {switch.point(number, 0)["x"] for number in range(20)} == {True, False}
    (tmp_path / "e.yaml").write_text(
        "{method: grid, program: x, metric: {name: l}, parameters: {lr: {values: [1e-3]}}}"
    )
    assert sweep_file.read(tmp_path / "e.yaml").point(0, 0)["lr"] == 0.001  # text, in YAML 1.1


def test_a_point_depends_on_its_number_and_the_seed_alone(tmp_path: Path) -> None:
    lr = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}
    first = sweep(tmp_path, {"lr": lr, "width": {"min": 0.0, "max": 1.0}})
    points = [first.point(number, 3) for number in range(50)]
    again = sweep(tmp_path, {"lr": lr, "width": {"min": 0.0, "max": 1.0}})
    assert [again.point(number, 3) for number in reversed(range(50))] == points[::-1]
    assert len({point["lr"] for point in points}) == 50
    assert not {point["lr"] for point in points} & {first.point(number, 4)["lr"] for number in range(50)}
    # Another parameter changes nothing for the first; two parameters of one distribution differ.
    more = sweep(tmp_path, {"another": lr, "lr": lr})
    assert [more.point(number, 3)["lr"] for number in range(50)] == [point["lr"] for point in points]
    assert more.point(0, 3)["another"] != more.point(0, 3)["lr"]
    assert first.fingerprint == again.fingerprint != more.fingerprint


def test_random_points_change_only_with_the_fingerprint(tmp_path: Path) -> None:
    """Where these values have to change, so does `sweep_file._DRAWS`: a folder keeps its trials' points."""
    search = sweep(tmp_path, {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}})
    assert [search.point(number, 3)["lr"] for number in (0, 1)] == pytest.approx(
        [0.010571364240117329, 0.013985244525397915]
    )
    assert search.fingerprint == "8ed37a36"


def test_another_goal_is_another_search_only_where_points_depend_on_scores(tmp_path: Path) -> None:
    parameters = {"x": {"values": [1, 2]}}
    for method, differ in (("bayes", True), ("random", False), ("grid", False)):
        goals = [
            sweep(tmp_path, parameters, method, metric={"name": "loss", "goal": goal}).fingerprint
            for goal in ("maximize", "minimize")
        ]
        assert (goals[0] != goals[1]) is differ


def test_a_grid_is_the_product_of_its_values(tmp_path: Path) -> None:
    grid = sweep(
        tmp_path,
        {
            "a": {"values": [1, 2]},
            "group": {"parameters": {"b": {"min": 3, "max": 5}, "c": {"parameters": {"d": {"value": True}}}}},
            "e.f": {"distribution": "q_uniform", "min": 0, "max": 0.2, "q": 0.1},
        },
        method="grid",
    )
    points = [grid.point(number, 0) for number in range(grid.size())]
    expected = [
        {"a": a, "group": {"b": b, "c": {"d": True}}, "e.f": f}
        for a, b, f in itertools.product([1, 2], [3, 4, 5], [0, 0.1, 0.2])
    ]
    assert len(points) == len(expected)
    assert all(point in points for point in expected)
    assert grid.size(4) == 4


def test_how_many_points(tmp_path: Path) -> None:
    parameters = {"x": {"min": 0.0, "max": 1.0}}
    assert sweep(tmp_path, parameters, run_cap=7).size() == 7
    assert sweep(tmp_path, parameters, run_cap=7).size(3) == 3
    with pytest.raises(UserError, match="no end: give --count"):
        sweep(tmp_path, parameters).size()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "gird"}, "method is 'gird': give one of grid"),
        ({"metric": None}, "metric is missing: give its name and its goal"),
        ({"metric": {"name": "l", "goal": "up"}}, "'up': give maximize or minimize"),
        ({"paramters": {}}, "unknown key 'paramters'; did you mean 'parameters'"),
        ({"parameters": {}}, "parameters of the file are missing"),
        ({"parameters": {"x": 3}}, "parameter x is 3"),
        (
            {"parameters": {"x": {"distribution": "log_uniformm"}}},
            "parameter x: unknown distribution.*'log_uniform'",
        ),
        ({"parameters": {"x": {"min": 1.0}}}, "parameter x: max is None"),
        ({"parameters": {"x": {"min": 2, "max": 1}}}, "min 2 lies above max 1"),
        ({"parameters": {"g": {"parameters": {"x": {"values": []}}}}}, r"parameter g.x: values is \[\]"),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [1]}}}, "one for each of the 2 values"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0}}, "method": "grid"}, "grid cannot count x"),
        (
            {"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}},
            "min is 0.*above 0",
        ),
        ({"parameters": {"x": {"distribution": "log_uniform", "max": 1e4}}}, "log_uniform_values takes"),
        (
            {"parameters": {"x": {"distribution": "inv_log_uniform", "max": 1e4}}},
            "inv_log_uniform_values takes",
        ),
        (
            {"parameters": {"x": {"distribution": "log_normal", "mu": 800}}},
            r"exp\(800\) is no number: mu is the mean of the value's logarithm",
        ),
        ({"program": None}, "program is missing"),
        ({"run_cap": 0}, "run_cap is 0"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    content: dict[str, Any] = {"method": "random", "parameters": {"x": {"value": 1}}}
    with pytest.raises(UserError, match=words) as refusal:
        sweep(tmp_path, **{**content, **changes})
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00"])
def test_what_is_no_sweep_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=r"s\.yaml"):
        sweep_file.read(tmp_path / "s.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        sweep_file.read(tmp_path / "none.yaml")


def test_the_shipped_file_names_its_objective() -> None:
    shipped = sweep_file.read(REPOSITORY / "configs" / "sweep.yaml")
    assert (shipped.metric, shipped.goal) == ("valid/pesq_wb", "maximize")
    assert any(part.startswith("--track.objective=") for part in shipped.command)
    names = {".".join(path) for path in shipped.parameters}
    assert {"optim.lr", "distil.weight", "distil.method", "train.batch"} <= names
    assert {f"distil.beta_{view}" for view in ("channel", "global", "local")} <= names
