"""W&B's distributions of a sweep's parameters, as quantile functions of scipy.stats.

Definitions: https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from mvat_dist.errors import UserError, nearest

Quantile = Callable[[float], float]

_UNIFORM = {"uniform", "log_uniform", "log_uniform_values"}
_INVERSE = {"inv_log_uniform", "inv_log_uniform_values"}
_ROUNDED = {*_UNIFORM, "normal", "log_normal", "beta"}
"""Distributions that also exist with the prefix `q_`, rounded to multiples of `q`."""
_KNOWN = {
    *_ROUNDED, *_INVERSE, *(f"q_{kind}" for kind in _ROUNDED),
    "int_uniform", "constant", "categorical", "categorical_w_probabilities",
}  # fmt: skip


@dataclass(frozen=True)
class Distribution:
    """The values that one parameter can have, and how probable they are."""

    quantile: Callable[[float], Any]
    """The value at a cumulative probability in [0, 1): of a uniform random number, a random value."""
    choices: Sequence[Any] | None = None
    """All values, for a grid; None where they cannot be counted."""
    ordered: bool = True
    """Whether neighbouring values are alike: false for a list of values."""


def parse(spec: Mapping[str, Any]) -> Distribution:
    """The distribution of one parameter; W&B's rules where none is named.

    Raises:
        UserError: an unknown distribution, or numbers that it cannot have.
    """
    kind = _kind(spec)
    if kind not in _KNOWN:
        raise UserError(f"unknown distribution {kind!r}; did you mean {nearest(kind, _KNOWN)}?")
    if kind == "constant":
        if "value" not in spec:
            raise UserError("value is missing")
        return Distribution(lambda _: spec["value"], (spec["value"],), ordered=False)
    if kind.startswith("categorical"):
        return _categorical(spec, needs_probabilities=kind != "categorical")
    if kind == "int_uniform":
        low, high = _int(spec, "min"), _int(spec, "max")
        if low > high:
            raise UserError(f"min {low} lies above max {high}")
        return _equally_likely(range(low, high + 1))
    if kind.startswith("q_"):
        return _rounded(kind.removeprefix("q_"), spec)
    return Distribution(_quantile(kind, spec))


def _kind(spec: Mapping[str, Any]) -> str:
    if "distribution" in spec:
        return str(spec["distribution"])
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    if "mu" in spec or "sigma" in spec:
        return "normal"
    return "int_uniform" if is_int(spec.get("min")) and is_int(spec.get("max")) else "uniform"


def _equally_likely(values: Sequence[Any], *, ordered: bool = True) -> Distribution:
    return Distribution(lambda u: values[int(u * len(values))], values, ordered)


def _categorical(spec: Mapping[str, Any], *, needs_probabilities: bool) -> Distribution:
    values, weights = spec.get("values"), spec.get("probabilities")
    if not isinstance(values, list) or not values:
        raise UserError(f"values is {values!r}: give a list such as [1, 2]")
    if weights is None:
        if needs_probabilities:
            raise UserError("probabilities are missing")
        return _equally_likely(tuple(values), ordered=False)
    valid = isinstance(weights, list) and len(weights) == len(values)
    if not valid or any(not _is_number(weight) or weight < 0 for weight in weights) or not sum(weights) > 0:
        raise UserError(
            f"probabilities is {weights!r}: give one for each of the {len(values)} values, none below 0"
        )
    *bounds, total = itertools.accumulate(weights)
    return Distribution(
        lambda u: values[bisect.bisect_right(bounds, u * total)], tuple(values), ordered=False
    )


def _rounded(kind: str, spec: Mapping[str, Any]) -> Distribution:
    """A distribution rounded to multiples of `q`; a grid can count those of a uniform one."""
    step = _number(spec, "q", 1)
    if step <= 0:
        raise UserError(f"q is {step}: it must be above 0")
    quantile = _quantile(kind, spec)
    choices = None
    if kind == "uniform":
        low, high = (round(bound / step) for bound in _bounds(spec))
        choices = _Multiples(range(low, high + 1), step)
    return Distribution(lambda u: _multiple(round(quantile(u) / step), step), choices)


def _multiple(factor: int, step: float) -> float:
    # 3 * 0.1 is 0.30000000000000004; a whole step keeps whole numbers, as a batch size has to be.
    return factor * step if isinstance(step, int) else float(f"{factor * step:.12g}")


@dataclass(frozen=True)
class _Multiples(Sequence[float]):
    """Multiples of a step, computed when they are read: a seed may be one of two thousand million."""

    factors: range
    step: float

    def __len__(self) -> int:
        return len(self.factors)

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            return _Multiples(self.factors[index], self.step)
        return _multiple(self.factors[index], self.step)


def _quantile(kind: str, spec: Mapping[str, Any]) -> Quantile:
    """The quantile function of a continuous distribution."""
    from scipy import stats  # late: it takes half a second, which --help need not wait for

    if kind in {"normal", "log_normal"}:
        mean, deviation = _number(spec, "mu", 0), _number(spec, "sigma", 1)
        if deviation <= 0:
            raise UserError(f"sigma is {deviation}: it must be above 0")
        if kind == "normal":
            law = stats.norm(mean, deviation)
        else:
            law = stats.lognorm(deviation, 0, _exp(mean, "mu is the mean of the value's logarithm"))
    elif kind == "beta":
        a, b = _number(spec, "a", 1), _number(spec, "b", 1)
        if a <= 0 or b <= 0:
            raise UserError(f"a and b are {a} and {b}: both must be above 0")
        law = stats.beta(a, b)
    else:
        low, high = _value_bounds(kind, spec)
        if low == high:
            return lambda _: low
        law = stats.uniform(low, high - low) if kind == "uniform" else stats.loguniform(low, high)
    least, most = law.support()
    # Rounding may leave the support; at 0 the quantile of a normal distribution is infinite.
    return lambda u: float(min(max(law.ppf(max(u, 2.0**-53)), least), most))


def _value_bounds(kind: str, spec: Mapping[str, Any]) -> tuple[float, float]:
    """The least and the greatest value of a uniform or log-uniform distribution."""
    if kind in {"log_uniform", "inv_log_uniform"}:  # given as exponents
        low, high = _bounds(spec, 0, 1)
        if kind == "inv_log_uniform":
            low, high = -high, -low
        advice = f"{kind}_values takes the values themselves"
        return _exp(low, advice), _exp(high, advice)
    low, high = _bounds(spec)
    if kind != "uniform" and low <= 0:
        raise UserError(f"min is {low}: it must be above 0")
    return low, high


def _bounds(
    spec: Mapping[str, Any], default_min: float | None = None, default_max: float | None = None
) -> tuple[float, float]:
    low, high = _number(spec, "min", default_min), _number(spec, "max", default_max)
    if low > high:
        raise UserError(f"min {low} lies above max {high}")
    return low, high


def _exp(exponent: float, advice: str) -> float:
    if not abs(exponent) < 700:
        raise UserError(f"exp({exponent}) is no number: {advice}")
    return math.exp(exponent)


def _number(spec: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = spec.get(name, default)
    if not _is_number(value):
        raise UserError(f"{name} is {value!r}: give a number")
    assert isinstance(value, (int, float))
    return value


def _int(spec: Mapping[str, Any], name: str) -> int:
    value = spec.get(name)
    if not is_int(value):
        raise UserError(f"{name} is {value!r}: give a whole number")
    return int(value)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_int(value: Any) -> bool:
    """Whether a value is a whole number and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
