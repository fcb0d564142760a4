"""A sweep file as W&B defines it: its parameters, what they are drawn from, and its points.

The same file serves ``wandb sweep`` and `mvat_dist.sweep`. Here a point depends on the file, the seed
and its number alone, so that any task of an array can make its own, before and after a restart.
Source of the laws: https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import yaml
from jsonargparse import get_loader

from mvat_dist.errors import UserError, nearest

Point = dict[str, Any]
"""Value by parameter name; a nested group of parameters is a dict again."""

_KEYS = {
    "program", "command", "method", "metric", "parameters", "name", "description", "project", "entity",
    "run_cap", "early_terminate",
}  # fmt: skip
_METHODS = ("grid", "random", "bayes")
_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")

_Draw = Callable[[np.random.Generator], float]


@dataclass(frozen=True)
class Law:
    """What one parameter is drawn from."""

    draw: Callable[[np.random.Generator], Any]
    choices: Sequence[Any] | None
    """All its values, for a grid; None where they are not countable."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked."""

    method: Literal["grid", "random", "bayes"]
    metric: str
    """Name of the objective in a student's record."""
    goal: Literal["maximize", "minimize"]
    laws: dict[tuple[str, ...], Law]
    """By the path of a parameter through nested groups; a dotted name is one step of a path."""
    command: tuple[str, ...]
    program: str
    run_cap: int | None
    """Most trials."""
    early_terminate: str
    """Type of early termination; empty without."""
    identity: str
    """Eight hexadecimal digits, equal for files that have the same points and the same command."""

    def points(self, count: int | None = None) -> int:
        """How many points there are: all of a grid, else `count` or the file's `run_cap`.

        Raises:
            UserError: neither ends the sweep.
        """
        limits = [limit for limit in (count, self.run_cap) if limit is not None]
        if self.method == "grid":
            limits.append(math.prod(len(law.choices or ()) for law in self.laws.values()))
        if not limits:
            raise UserError(f"a {self.method} sweep has no end: give --count N, or run_cap in the file")
        return min(limits)

    def point(self, number: int, seed: int) -> Point:
        """The point of this number, from 0; of `bayes` too a random one, for it asks what others found."""
        made: Point = {}
        for path, law in self.laws.items():
            if self.method == "grid":
                assert law.choices is not None
                number, index = divmod(number, len(law.choices))
                value = law.choices[index]
            else:
                # A stream of its own: another parameter more or less changes nothing for the others.
                name = zlib.crc32("\0".join(path).encode())
                value = law.draw(np.random.default_rng([seed, number, name]))
            group = made
            for step in path[:-1]:
                group = group.setdefault(step, {})
            group[path[-1]] = value
        return made


def read(file: Path) -> Sweep:
    """The sweep in `file`.

    Raises:
        UserError: no such file, no YAML, an unknown key, or something without which there is no sweep.
    """
    try:
        # It reads 1e-3 as a number, which YAML 1.1 does not.
        content = get_loader("yaml")(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the sweep file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no sweep file: it needs method, metric and parameters")
    try:
        return _checked(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def in_words(point: Any, above: str = "") -> str:
    """``a=1 b.c=2`` of a point."""
    if not isinstance(point, dict):
        value = f"{point:.4g}" if isinstance(point, float) else str(point)
        return f"{above}={shlex.quote(value)}"
    return " ".join(in_words(value, f"{above}.{name}" if above else name) for name, value in point.items())


def _checked(content: dict[str, Any]) -> Sweep:
    for key in content:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}; did you mean {nearest(str(key), _KEYS)}?")
    method = content.get("method")
    if method not in _METHODS:
        raise UserError(f"method is {method!r}: give one of {', '.join(_METHODS)}")
    metric, goal = _objective(content.get("metric"))
    laws = _laws(content.get("parameters"), ())
    if method == "grid":
        for path, law in laws.items():
            if law.choices is None:
                raise UserError(f"method grid cannot count {'.'.join(path)}: give values, or method random")
    command = tuple(str(part) for part in content.get("command") or _COMMAND)
    program = str(content.get("program", ""))
    if "${program}" in command and not program:
        raise UserError("program is missing: give the script that the command starts")
    run_cap = content.get("run_cap")
    if run_cap is not None and not (_is_whole(run_cap) and run_cap > 0):
        raise UserError(f"run_cap is {run_cap!r}: give a whole number above 0")
    early = content.get("early_terminate") or {}
    if not isinstance(early, dict):
        raise UserError(f"early_terminate is {early!r}: give type, min_iter and so on below it")
    parts = [method, content["parameters"], command, program]
    return Sweep(
        method=method,
        metric=metric,
        goal=goal,
        laws=laws,
        command=command,
        program=program,
        run_cap=run_cap,
        early_terminate=str(early.get("type", "")),
        identity=hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:8],
    )


def _objective(metric: Any) -> tuple[str, Literal["maximize", "minimize"]]:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise UserError(
            "metric is missing: give its name and its goal, as in {name: valid/pesq_wb, goal: maximize}"
        )
    goal = metric.get("goal", "minimize")
    if goal not in {"maximize", "minimize"}:
        raise UserError(f"the metric's goal is {goal!r}: give maximize or minimize")
    return metric["name"], goal


def _laws(parameters: Any, above: tuple[str, ...]) -> dict[tuple[str, ...], Law]:
    where = ".".join(above) or "the file"
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(
            f"parameters of {where} are missing: give at least one, as in {{seed: {{values: [1, 2]}}}}"
        )
    found: dict[tuple[str, ...], Law] = {}
    for name, given in parameters.items():
        path = (*above, str(name))
        if not isinstance(given, dict):
            raise UserError(
                f"parameter {'.'.join(path)} is {given!r}: give value, values or a distribution below it"
            )
        if "parameters" in given:
            found |= _laws(given["parameters"], path)
            continue
        try:
            found[path] = _law(given)
        except UserError as error:
            raise UserError(f"parameter {'.'.join(path)}: {error}") from error
    return found


def _law(given: Mapping[str, Any]) -> Law:
    """The law of one parameter; W&B's rules where no distribution is named."""
    if "distribution" in given:
        kind = str(given["distribution"])
    elif "value" in given or "values" in given:
        kind = "constant" if "value" in given else "categorical"
    elif "mu" in given or "sigma" in given:
        kind = "normal"
    else:
        whole = _is_whole(given.get("min")) and _is_whole(given.get("max"))
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
    if not _is_whole(value):
        raise UserError(f"{name} is {value!r}: give a whole number")
    return int(value)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
