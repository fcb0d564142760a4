"""Points of a sweep file: distributions against scipy's, a grid against itertools, and what is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from mvat_dist.errors import UserError
from mvat_dist.launch import sweep_file
from mvat_dist.launch.sweep_file import Sweep
from tests.conftest import REPOSITORY

DRAWS = 1500


def sweep(folder: Path, parameters: Any, method: str = "random", **more: Any) -> Sweep:
    file = folder / "a sweep.yaml"
    content = {"method": method, "metric": {"name": "loss"}, "program": "x", "parameters": parameters, **more}
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return sweep_file.read(file)


def drawn(folder: Path, spec: dict[str, Any]) -> np.ndarray:
    random_search = sweep(folder, {"x": spec})
    return np.array([random_search.point(number, seed=0)["x"] for number in range(DRAWS)])


CONTINUOUS = [
    ({"min": 0.5, "max": 2.5}, stats.uniform(0.5, 2.0)),
    ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}, stats.loguniform(1e-4, 1e-1)),
    ({"distribution": "log_uniform", "min": -3, "max": 2}, stats.loguniform(math.exp(-3), math.exp(2))),
    ({"distribution": "inv_log_uniform", "min": -3, "max": 2}, stats.loguniform(math.exp(-2), math.exp(3))),
    ({"distribution": "inv_log_uniform_values", "min": 0.1, "max": 9.0}, stats.loguniform(0.1, 9.0)),
    ({"mu": 2.0, "sigma": 0.5}, stats.norm(2.0, 0.5)),
    ({"distribution": "log_normal", "mu": 0.5, "sigma": 0.3}, stats.lognorm(0.3, scale=math.exp(0.5))),
    ({"distribution": "beta", "a": 2, "b": 5}, stats.beta(2, 5)),
]


def _name(value: object) -> str:
    """A name that is the same in every process."""
    return str(value) if isinstance(value, dict) else "as expected"


@pytest.mark.parametrize(("spec", "expected"), CONTINUOUS, ids=_name)
def test_continuous_distributions(tmp_path: Path, spec: dict[str, Any], expected: Any) -> None:
    assert stats.kstest(drawn(tmp_path, spec), expected.cdf).pvalue > 1e-3


# W&B has no rounded kind of the inverse ones.
ROUNDED = [case for case in CONTINUOUS if not case[0].get("distribution", "").startswith("inv_")]


@pytest.mark.parametrize(("spec", "expected"), ROUNDED, ids=_name)
def test_q_rounds_to_multiples(tmp_path: Path, spec: dict[str, Any], expected: Any) -> None:
    kind = spec.get("distribution", "normal" if "mu" in spec else "uniform")
    step = 0.1
    values = drawn(tmp_path, {**spec, "distribution": f"q_{kind}", "q": step})
    multiples = np.round(values / step)
    np.testing.assert_allclose(values, multiples * step, rtol=1e-9)
    # The share of each multiple is what the distribution gives to its cell.
    for multiple in np.unique(multiples):
        share = np.mean(multiples == multiple)
        cell = expected.cdf((multiple + 0.5) * step) - expected.cdf((multiple - 0.5) * step)
        assert abs(share - cell) < 4 * math.sqrt(cell * (1 - cell) / DRAWS) + 1 / DRAWS


def test_discrete_distributions(tmp_path: Path) -> None:
    integers = drawn(tmp_path, {"min": 2, "max": 5})
    assert set(integers.tolist()) == {2, 3, 4, 5}
    assert stats.chisquare(np.bincount(integers)[2:]).pvalue > 1e-3
    shares = [0.5, 0.3, 0.2]
    chosen = drawn(tmp_path, {"values": ["a", "b", "c"], "probabilities": shares}).tolist()
    counts = [chosen.count(letter) for letter in "abc"]
    assert stats.chisquare(counts, [DRAWS * share for share in shares]).pvalue > 1e-3
    assert set(drawn(tmp_path, {"value": 7}).tolist()) == {7}


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
