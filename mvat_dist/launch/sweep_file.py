"""Read a sweep file as W&B defines it, and compute its points.

The same file serves ``wandb sweep`` and `mvat_dist.sweep`. Without a server, a point of a grid or a random
search depends only on the file, the seed and the point's number, so every task of an array computes its
own, before and after a restart. The points of ``method: bayes`` come from `mvat_dist.launch.bayes`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from jsonargparse import get_loader

from mvat_dist.errors import UserError, nearest
from mvat_dist.launch.distributions import Distribution, is_int, parse

Point = dict[str, Any]
"""Value by parameter name; a nested group of parameters is a dict again."""
Name = tuple[str, ...]
"""Path of a parameter through nested groups; a dotted name is one step of a path."""
Method = Literal["grid", "random", "bayes"]
Goal = Literal["maximize", "minimize"]

_KEYS = {
    "program", "command", "method", "metric", "parameters", "name", "description", "project", "entity",
    "run_cap", "early_terminate",
}  # fmt: skip
_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")

_DRAWS = "draws 2"
"""Version of the random points, a part of the fingerprint: a new one wherever their values change."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked."""

    method: Method
    metric: str
    """Name of the objective in a student's history."""
    goal: Goal
    parameters: dict[Name, Distribution]
    command: tuple[str, ...]
    """What starts a trial, with W&B's macros such as ``${args}``."""
    program: str
    run_cap: int | None
    """Most trials."""
    early_terminate: str
    """Type of early termination; empty without."""
    fingerprint: str
    """Eight hexadecimal digits, equal for files that have the same points and the same command."""

    def size(self, count: int | None = None) -> int:
        """Number of trials: all points of a grid, else `count` or the file's `run_cap`.

        Raises:
            UserError: nothing limits the sweep.
        """
        limits = [limit for limit in (count, self.run_cap) if limit is not None]
        if self.method == "grid":
            limits.append(math.prod(len(parameter.choices or ()) for parameter in self.parameters.values()))
        if not limits:
            raise UserError(f"a {self.method} sweep has no end: give --count N, or run_cap in the file")
        return min(limits)

    def point(self, number: int, seed: int) -> Point:
        """The point with this number, from 0, of a grid or a random search.

        For `bayes` it is a random one, with which the command can be checked before any trial has ended.
        """
        if self.method != "grid":
            return self.point_of(lambda name, parameter: parameter.quantile(_uniform(seed, number, name)))
        values: dict[Name, Any] = {}
        for name, parameter in self.parameters.items():
            assert parameter.choices is not None
            number, index = divmod(number, len(parameter.choices))
            values[name] = parameter.choices[index]
        return self.point_of(lambda name, _: values[name])

    def point_of(self, value: Callable[[Name, Distribution], Any]) -> Point:
        """The point whose parameters have the values that `value` returns."""
        point: Point = {}
        for name, parameter in self.parameters.items():
            group = point
            for step in name[:-1]:
                group = group.setdefault(step, {})
            group[name[-1]] = value(name, parameter)
        return point


def read(file: Path) -> Sweep:
    """Read and check a sweep file.

    Raises:
        UserError: no such file, no YAML, an unknown key, or a required key is missing.
    """
    try:
        # This loader reads 1e-3 as a number, which YAML 1.1 does not.
        content = get_loader("yaml")(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the sweep file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no sweep file: it needs method, metric and parameters")
    try:
        return _parse(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def describe(point: Any, prefix: str = "") -> str:
    """A point as text: ``a=1 b.c=2``."""
    if not isinstance(point, dict):
        value = f"{point:.4g}" if isinstance(point, float) else str(point)
        return f"{prefix}={shlex.quote(value)}"
    return " ".join(describe(value, f"{prefix}.{name}" if prefix else name) for name, value in point.items())


def _uniform(seed: int, number: int, name: Name) -> float:
    """A random number in [0, 1) for one parameter of one point.

    Each parameter has a random stream of its own: adding one to the file changes no value of the others.
    """
    stream = zlib.crc32("\0".join(name).encode())
    return float(np.random.default_rng([seed, number, stream]).random())


def _parse(content: dict[str, Any]) -> Sweep:
    for key in content:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}; did you mean {nearest(str(key), _KEYS)}?")
    method: Any = content.get("method")
    if method not in get_args(Method):
        raise UserError(f"method is {method!r}: give one of {', '.join(get_args(Method))}")
    metric, goal = _metric(content.get("metric"))
    parameters = _parameters(content.get("parameters"), ())
    if method == "grid":
        for name, parameter in parameters.items():
            if parameter.choices is None:
                raise UserError(f"method grid cannot count {'.'.join(name)}: give values, or method random")
    command = tuple(str(part) for part in content.get("command") or _COMMAND)
    program = str(content.get("program", ""))
    if "${program}" in command and not program:
        raise UserError("program is missing: give the script that the command starts")
    run_cap = content.get("run_cap")
    if run_cap is not None and not (is_int(run_cap) and run_cap > 0):
        raise UserError(f"run_cap is {run_cap!r}: give a whole number above 0")
    early = content.get("early_terminate") or {}
    if not isinstance(early, dict):
        raise UserError(f"early_terminate is {early!r}: give type, min_iter and so on below it")
    # The points of a Bayesian search depend on the scores too.
    objective = [metric, goal] if method == "bayes" else []
    draws = [_DRAWS] if method == "random" else []
    science = [method, content["parameters"], command, program, *objective, *draws]
    return Sweep(
        method=method,
        metric=metric,
        goal=goal,
        parameters=parameters,
        command=command,
        program=program,
        run_cap=run_cap,
        early_terminate=str(early.get("type", "")),
        fingerprint=hashlib.sha256(json.dumps(science, default=str).encode()).hexdigest()[:8],
    )


def _metric(metric: Any) -> tuple[str, Goal]:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise UserError(
            "metric is missing: give its name and its goal, as in {name: valid/pesq_wb, goal: maximize}"
        )
    goal = metric.get("goal", "minimize")
    if goal not in get_args(Goal):
        raise UserError(f"the metric's goal is {goal!r}: give maximize or minimize")
    return metric["name"], goal


def _parameters(given: Any, group: Name) -> dict[Name, Distribution]:
    """The distributions of a group of parameters, and of the groups in it."""
    where = ".".join(group) or "the file"
    if not isinstance(given, dict) or not given:
        raise UserError(
            f"parameters of {where} are missing: give at least one, as in {{seed: {{values: [1, 2]}}}}"
        )
    parameters: dict[Name, Distribution] = {}
    for key, spec in given.items():
        name = (*group, str(key))
        if not isinstance(spec, dict):
            raise UserError(
                f"parameter {'.'.join(name)} is {spec!r}: give value, values or a distribution below it"
            )
        if "parameters" in spec:
            parameters |= _parameters(spec["parameters"], name)
            continue
        try:
            parameters[name] = parse(spec)
        except UserError as error:
            raise UserError(f"parameter {'.'.join(name)}: {error}") from error
    return parameters
