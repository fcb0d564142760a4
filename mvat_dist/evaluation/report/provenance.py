"""What the runs cost, and how to make each of them again."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mvat_dist.config import parser
from mvat_dist.config.schema import Config
from mvat_dist.evaluation.report.blocks import Block, Cell, Code, Fold, Items, Missing, Section, Table, Text
from mvat_dist.evaluation.report.runs import Run, number
from mvat_dist.evaluation.report.study import Study
from mvat_dist.evaluation.statistics import Row
from mvat_dist.runs.history import APART

_LONGEST_STEP = 86_400.0
"""Seconds. A row by which a step took longer is damaged: a run that hangs is ended long before."""


@dataclass(frozen=True)
class Spent:
    """What training in one folder has cost."""

    processes: int
    device: str
    """``CPU``, ``GPU`` or ``unknown``."""
    seconds: float | None
    """Wall-clock, of training with its validations and checkpoints; None without a record.

    Of several students, who are trained at once, that of the one with the longest record. Starting up is not
    in it."""
    joules: float | None
    """Of all processors, over the same time; None where a row does not say."""


def spent(run: Run) -> list[Spent]:
    """Of each folder in which students of `run` were trained."""
    found = []
    for folder, environment in run.environments.items():
        histories = [rows for name, rows in run.histories.items() if run.home_of(name) == folder]
        known = [(taken, rows) for rows in histories if (taken := _seconds(rows, run.config)) is not None]
        seconds, longest = max(known, key=lambda one: one[0], default=(None, []))
        ranks = environment.get("ranks")
        size = number(ranks.get("world_size")) if isinstance(ranks, dict) else None
        device = _device(environment, histories, run.config)
        found.append(Spent(int(size or 1), device, seconds, _joules(longest)))
    return found


def _joules(rows: Sequence[Row]) -> float | None:
    """Of all rows of training; None where one of them does not say."""
    told = [number(row.get("joules")) for row in rows if "audio_seconds_per_second" in row]
    known = [one for one in told if one is not None]
    return sum(known) if known and len(known) == len(told) else None


def _seconds(rows: Sequence[Row], config: Config) -> float | None:
    """From the speeds in the record, each over the steps since the row before; None without one, or where one
    cannot be true."""
    heard_per_step = config.train.batch * config.data.segment_seconds
    known: dict[int, float] = {}
    for row in rows:
        shares = row.get("time")
        apart = [number(shares.get(name)) or 0.0 for name in APART] if isinstance(shares, dict) else []
        speed = (number(row.get("audio_seconds_per_second")) or 0.0) * (1 - sum(apart))
        if speed > 0:
            known[row["step"]] = speed
    if any(heard_per_step / speed > _LONGEST_STEP for speed in known.values()):
        return None
    before = [0, *sorted(known)]
    total = sum((step - last) * heard_per_step / known[step] for last, step in pairwise(before))
    return total if known else None


def cost(study: Study) -> Section:
    """Hours of each run."""
    totals: defaultdict[str, float] = defaultdict(float)
    rows = []
    for run in study.runs:
        parts = spent(run)
        known = [(part, part.seconds / 3600) for part in parts if part.seconds is not None]
        for part, hours in known:
            totals[part.device] += hours * part.processes
        processes = " + ".join(str(part.processes) for part in parts)
        rows.append(
            [
                Cell(run.name),
                Cell(_state(run)),
                Cell(f"{_step(run)} of {run.config.train.steps}"),
                Cell(f"{processes}, {' and '.join(sorted({part.device for part in parts}))}"),
                Cell(f"{sum(hours for _, hours in known):.2f}" if known else "-"),
                Cell(f"{sum(hours * part.processes for part, hours in known):.2f}" if known else "-"),
                Cell(_kilowatt_hours([part.joules for part in parts])),
            ]
        )
    spent_on = (
        ", ".join(f"{hours:.2f} {device} hours" for device, hours in sorted(totals.items()))
        or "nothing known"
    )
    text = (
        f"In all: {spent_on}. Hours are the time of training with its validations and checkpoints, from the "
        "speed in each record; GPU or CPU hours are these times the number of processes, one per GPU. "
        "Energy is that of the GPUs, or "
        "of whole nodes' CPUs and memory, up to the last row before each stop, where counters could be read."
    )
    heads = ["run", "state", "steps", "processes", "hours", "GPU or CPU hours", "kWh"]
    return Section("Cost of the runs", [Text(text), Table("What was spent", heads, rows)])


def _state(run: Run) -> str:
    state = run.status.get("state")
    return state if isinstance(state, str) and state else "unknown"


def _step(run: Run) -> str:
    step = number(run.status.get("step"))
    return "unknown" if step is None or step < 0 else f"{step:.0f}"


def _kilowatt_hours(joules: Sequence[float | None]) -> str:
    known = [one for one in joules if one is not None]
    return f"{sum(known) / 3.6e6:.3g}" if known and len(known) == len(joules) else "-"


def _device(environment: dict[str, Any], histories: Sequence[Sequence[Row]], config: Config) -> str:
    packages = environment.get("packages")
    torch = str(packages.get("torch", "")) if isinstance(packages, dict) else ""
    if "cpu" in torch or config.engine.device == "cpu":
        return "CPU"
    # Only a GPU has memory of its own to tell of.
    memory = [row.get("memory") for rows in histories for row in rows]
    return "GPU" if any(isinstance(one, dict) and "cuda_gb" in one for one in memory) else "unknown"


def reproduction(study: Study) -> Section:
    """The commands behind every run."""
    text = (
        "Every run as one command: its options are all those that differ from the defaults and matter. The "
        "eight digits are the hash of the configuration; equal digits are the same experiment."
    )
    return Section("How to make each row again", [Text(text), *(_run(run) for run in study.runs)])


def _run(run: Run) -> Block:
    facts = [f"configuration {parser.fingerprint(run.config)}, seed {run.config.seed}"]
    facts += dict.fromkeys(_code(environment) for environment in run.environments.values())
    facts += dict.fromkeys(_host(environment) for environment in run.environments.values())
    if run.teacher:
        facts.append(f"teacher {run.teacher.get('file')}, SHA-256 of its weights {run.teacher.get('sha256')}")
    blocks: list[Block] = [Items(facts), Code(command(run.config))]
    if run.evaluations:
        blocks.append(Code("\n".join(_evaluation(run, one.name, one.record) for one in run.evaluations)))
    else:
        blocks.append(Missing("Not evaluated: python -m mvat_dist.evaluate on this folder adds its scores."))
    return Fold(run.name, blocks)


def _code(environment: dict[str, Any]) -> str:
    packages = environment.get("packages")
    versions = packages if isinstance(packages, dict) else {}
    return (
        f"code {environment.get('commit') or 'unknown'}, mvat_dist {versions.get('mvat_dist', 'unknown')}, "
        f"torch {versions.get('torch', 'unknown')}"
    )


def _host(environment: dict[str, Any]) -> str:
    return f"on {environment.get('host', 'unknown')}, {environment.get('platform', 'unknown')}"


def command(config: Config) -> str:
    """The command line that trains `config` again."""
    defaults = parser.science(Config())
    options = []
    for key, value in parser.science(config).items():
        if value != defaults.get(key):
            options.append(f"--{key} {shlex.quote(_written(value))}")
    return " \\\n    ".join(["python -m mvat_dist.train", *options])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _evaluation(run: Run, name: str, record: dict[str, Any]) -> str:
    weights = str(record.get("weights", "best"))
    models = record.get("models")
    asked = [str(one) for one in models] if isinstance(models, list) and models else [str(run.path)]
    words = ["python", "-m", "mvat_dist.evaluate", *asked, "--weights", weights]
    for option in ("data", "noisy", "clean"):
        if option in record:
            words += [f"--{option}", str(record[option])]
    metrics = record.get("metrics")
    if isinstance(metrics, dict) and metrics:
        words += ["--metrics", ",".join(metrics)]
    for option in ("limit", "max_seconds"):
        if value := number(record.get(option)):
            words += [f"--{option.replace('_', '-')}", f"{value:g}"]
    # Without it the first network is the one that the others are compared with.
    networks, against = record.get("networks"), record.get("reference")
    if isinstance(networks, dict) and isinstance(against, str) and against != next(iter(networks), against):
        words += ["--against", against]
    if len(asked) > 1:
        words += ["--out", str(run.path / "evaluate" / name)]
    return shlex.join(words)
