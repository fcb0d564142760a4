"""A sweep file as W&B defines it: its parameters, what they are drawn from, and its points.

The same file serves ``wandb sweep`` and `mvat_dist.sweep`. Here a point depends on the file, the seed
and its number alone, so that any task of an array can make its own, before and after a restart.
Their laws are in `mvat_dist.launch.distributions`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jsonargparse import get_loader

from mvat_dist.errors import UserError, nearest
from mvat_dist.launch.distributions import Law, is_whole, law_of

Point = dict[str, Any]
"""Value by parameter name; a nested group of parameters is a dict again."""

_KEYS = {
    "program", "command", "method", "metric", "parameters", "name", "description", "project", "entity",
    "run_cap", "early_terminate",
}  # fmt: skip
_METHODS = ("grid", "random", "bayes")
_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")


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
    if run_cap is not None and not (is_whole(run_cap) and run_cap > 0):
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
            found[path] = law_of(given)
        except UserError as error:
            raise UserError(f"parameter {'.'.join(path)}: {error}") from error
    return found
