"""W&B's distributions against scipy's, drawn by their quantile functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mvat_dist.launch import distributions

DRAWS = 1500


def drawn(spec: dict[str, Any]) -> np.ndarray:
    """Values of uniform random numbers."""
    distribution = distributions.parse(spec)
    return np.array([distribution.quantile(u) for u in np.random.default_rng(0).random(DRAWS)])


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
def test_continuous_distributions(spec: dict[str, Any], expected: Any) -> None:
    assert stats.kstest(drawn(spec), expected.cdf).pvalue > 1e-3


# W&B has no rounded kind of the inverse ones.
ROUNDED = [case for case in CONTINUOUS if not case[0].get("distribution", "").startswith("inv_")]


@pytest.mark.parametrize(("spec", "expected"), ROUNDED, ids=_name)
def test_q_rounds_to_multiples(spec: dict[str, Any], expected: Any) -> None:
    kind = spec.get("distribution", "normal" if "mu" in spec else "uniform")
    step = 0.1
    values = drawn({**spec, "distribution": f"q_{kind}", "q": step})
    multiples = np.round(values / step)
    np.testing.assert_allclose(values, multiples * step, rtol=1e-9)
    # The share of each multiple is what the distribution gives to its cell.
    for multiple in np.unique(multiples):
        share = np.mean(multiples == multiple)
        cell = expected.cdf((multiple + 0.5) * step) - expected.cdf((multiple - 0.5) * step)
        assert abs(share - cell) < 4 * math.sqrt(cell * (1 - cell) / DRAWS) + 1 / DRAWS


def test_discrete_distributions() -> None:
    integers = drawn({"min": 2, "max": 5})
    assert set(integers.tolist()) == {2, 3, 4, 5}
    assert stats.chisquare(np.bincount(integers)[2:]).pvalue > 1e-3
    shares = [0.5, 0.3, 0.2]
    chosen = drawn({"values": ["a", "b", "c"], "probabilities": shares}).tolist()
    counts = [chosen.count(letter) for letter in "abc"]
    assert stats.chisquare(counts, [DRAWS * share for share in shares]).pvalue > 1e-3
    assert set(drawn({"value": 7}).tolist()) == {7}


@pytest.mark.parametrize("kind", ["uniform", "log_uniform_values", "inv_log_uniform_values", "q_uniform"])
def test_equal_bounds_leave_one_value(kind: str) -> None:
    assert set(drawn({"distribution": kind, "min": 2.0, "max": 2.0})) == {2.0}


@pytest.mark.parametrize(("spec", "expected"), CONTINUOUS, ids=_name)
def test_the_ends_of_the_unit_interval_have_values(spec: dict[str, Any], expected: Any) -> None:
    """Optuna may propose them; a normal distribution has none there."""
    quantile = distributions.parse(spec).quantile
    least, most = quantile(0.0), quantile(math.nextafter(1.0, 0.0))
    low, high = expected.support()
    assert low - 1e-9 <= least < most <= high * (1 + 1e-9)
    assert math.isfinite(least)
    assert math.isfinite(most)


def test_values_that_cannot_be_counted_have_no_choices() -> None:
    assert all(distributions.parse(spec).choices is None for spec, _ in CONTINUOUS)
    assert list(distributions.parse({"min": 2, "max": 4}).choices or ()) == [2, 3, 4]
    steps = distributions.parse({"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.1})
    assert list(steps.choices or ()) == [0.0, 0.1, 0.2, 0.3]
