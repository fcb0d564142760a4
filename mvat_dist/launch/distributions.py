"""What a sweep draws a parameter from: W&B's distributions, and all their values where a grid can count them.

Source of the laws: https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from mvat_dist.errors import UserError, nearest

_Draw = Callable[[np.random.Generator], float]


@dataclass(frozen=True)
class Law:
    """What one parameter is drawn from."""

    draw: Callable[[np.random.Generator], Any]
    choices: Sequence[Any] | None
    """All its values, for a grid; None where they are not countable."""


def law_of(given: Mapping[str, Any]) -> Law:
    """The law of one parameter; W&B's rules where no distribution is named.

    Raises:
        UserError: an unknown distribution, or numbers that it cannot have.
    """
    if "distribution" in given:
        kind = str(given["distribution"])
    elif "value" in given or "values" in given:
        kind = "constant" if "value" in given else "categorical"
    elif "mu" in given or "sigma" in given:
        kind = "normal"
    else:
        whole = is_whole(given.get("min")) and is_whole(given.get("max"))
        kind = "int_uniform" if whole else "uniform"
    if kind in {"constant", "categorical", "categorical_w_probabilities"}:
        return _listed(kind, given)
    if kind == "int_uniform":
        least, most = (_whole(given, name) for name in ("min", "max"))
        if least > most:
            raise UserError(f"min {least} lies above max {most}")
        return Law(lambda random: int(random.integers(least, most, endpoint=True)), range(least, most + 1))
    quantized = kind.startswith("q_")
    name = kind.removeprefix("q_")
    if name not in _CONTINUOUS or kind == "q_inv_log_uniform":
        known = [*_CONTINUOUS, *(f"q_{one}" for one in _CONTINUOUS), "int_uniform", "constant", "categorical"]
        raise UserError(f"unknown distribution {kind!r}; did you mean {nearest(kind, known)}?")
    draw = _CONTINUOUS[name](given)
    if not quantized:
        return Law(draw, None)
    return _quantized(draw, _number(given, "q", 1), given if name == "uniform" else None)


def _listed(kind: str, given: Mapping[str, Any]) -> Law:
    if kind == "constant":
        if "value" not in given:
            raise UserError("value is missing")
        return Law(lambda _: given["value"], (given["value"],))
    values = given.get("values")
    if not isinstance(values, list) or not values:
        raise UserError(f"values is {values!r}: give a list such as [1, 2]")
    shares = given.get("probabilities")
    if kind == "categorical_w_probabilities" and shares is None:
        raise UserError("probabilities are missing")
    if shares is not None:
        fitting = isinstance(shares, list) and len(shares) == len(values)
        if not fitting or any(not _is_number(share) or share < 0 for share in shares) or not sum(shares) > 0:
            raise UserError(
                f"probabilities is {shares!r}: give one for each of the {len(values)} values, none below 0"
            )
        shares = [share / sum(shares) for share in shares]
    return Law(lambda random: values[int(random.choice(len(values), p=shares))], tuple(values))


def _quantized(draw: _Draw, step: float, uniform: Mapping[str, Any] | None) -> Law:
    """The law rounded to multiples of `step`; a grid can count them where it is a uniform one."""
    if step <= 0:
        raise UserError(f"q is {step}: it must be above 0")
    choices = None
    if uniform:
        least, most = (round(_number(uniform, name) / step) for name in ("min", "max"))
        choices = _Multiples(range(least, most + 1), step)
    return Law(lambda random: _multiple(round(draw(random) / step), step), choices)


def _multiple(times: int, step: float) -> float:
    # 3 * 0.1 is 0.30000000000000004; whole steps stay whole numbers, as a batch size has to be.
    return times * step if isinstance(step, int) else float(f"{times * step:.12g}")


@dataclass(frozen=True)
class _Multiples(Sequence[float]):
    """Multiples of a step, made when they are asked for: a seed may be one of two thousand million."""

    times: range
    step: float

    def __len__(self) -> int:
        return len(self.times)

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        if isinstance(index, slice):
            return _Multiples(self.times[index], self.step)
        return _multiple(self.times[index], self.step)


def _bounds(given: Mapping[str, Any], least: float | None = None) -> tuple[float, float]:
    low, high = _number(given, "min", least), _number(given, "max", None if least is None else 1)
    if low > high:
        raise UserError(f"min {low} lies above max {high}")
    return low, high


def _uniform(given: Mapping[str, Any]) -> _Draw:
    low, high = _bounds(given)
    return lambda random: float(random.uniform(low, high))


def _log_uniform(given: Mapping[str, Any], sign: int = 1) -> _Draw:
    """exp(u), or exp(-u) for `inv_log_uniform`: W&B's bounds are those of u."""
    low, high = _bounds(given, 0)
    return lambda random: math.exp(sign * random.uniform(low, high))


def _log_uniform_values(given: Mapping[str, Any]) -> _Draw:
    low, high = _bounds(given)
    if low <= 0:
        raise UserError(f"min is {low}: it must be above 0")
    return lambda random: min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)


def _normal(given: Mapping[str, Any]) -> _Draw:
    mean, deviation = _number(given, "mu", 0), _number(given, "sigma", 1)
    if deviation <= 0:
        raise UserError(f"sigma is {deviation}: it must be above 0")
    return lambda random: float(random.normal(mean, deviation))


def _log_normal(given: Mapping[str, Any]) -> _Draw:
    draw = _normal(given)
    return lambda random: math.exp(draw(random))


def _beta(given: Mapping[str, Any]) -> _Draw:
    a, b = _number(given, "a", 1), _number(given, "b", 1)
    if a <= 0 or b <= 0:
        raise UserError(f"a and b are {a} and {b}: both must be above 0")
    return lambda random: float(random.beta(a, b))


_CONTINUOUS: dict[str, Callable[[Mapping[str, Any]], _Draw]] = {
    "uniform": _uniform,
    "log_uniform": _log_uniform,
    "log_uniform_values": _log_uniform_values,
    "inv_log_uniform": lambda given: _log_uniform(given, -1),
    "inv_log_uniform_values": _log_uniform_values,
    "normal": _normal,
    "log_normal": _log_normal,
    "beta": _beta,
}
"""By W&B's names; each of them with `q_` before it is rounded to multiples of `q`."""


def _number(given: Mapping[str, Any], name: str, otherwise: float | None = None) -> float:
    value = given.get(name, otherwise)
    if not _is_number(value):
        raise UserError(f"{name} is {value!r}: give a number")
    assert isinstance(value, (int, float))
    return value


def _whole(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    if not is_whole(value):
        raise UserError(f"{name} is {value!r}: give a whole number")
    return int(value)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
