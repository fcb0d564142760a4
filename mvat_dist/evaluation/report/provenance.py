"""Say what the runs cost, and give the command behind each of them."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mvat_dist.config import parser
from mvat_dist.config.schema import Config
from mvat_dist.evaluation.report.load import Environment, Evaluation, Run, number
from mvat_dist.evaluation.report.study import Study
from mvat_dist.evaluation.report.table import Cell, Table
from mvat_dist.evaluation.statistics import Row
from mvat_dist.runs.history import APART

_LONGEST_STEP = 86_400.0
"""Seconds. A row by which a step took longer is damaged: a run that hangs is ended long before."""


@dataclass(frozen=True)
class Spent:
    """What a training has cost."""

    processes: int
    device: str
    """``CPU``, ``GPU`` or ``unknown``."""
    hours: float | None
    """Wall-clock, of training with its validations and checkpoints, without starting up; of the student with
    the longest history, as all are trained at once. None without a history."""
    joules: float | None
    """Of all GPUs, over the same time; None where a row does not say."""


def spent(run: Run) -> Spent:
    """What the training of `run` has cost."""
    known = [
        (seconds, rows)
        for rows in run.histories.values()
        if (seconds := _seconds(rows, run.config)) is not None
    ]
    processes, device = run.environment.ranks.world_size, _device(run)
    if not known:
        return Spent(processes, device, None, None)
    seconds, rows = max(known, key=lambda item: item[0])
    return Spent(processes, device, seconds / 3600, _joules(rows))


def _seconds(rows: list[Row], config: Config) -> float | None:
    """The time behind the speeds in a history, each over the steps since the row before.

    None without a speed, or where one cannot be true.
    """
    seconds_per_step: dict[int, float] = {}
    for row in rows:
        shares = row.get("time")
        apart = sum(number(shares.get(name)) or 0.0 for name in APART) if isinstance(shares, dict) else 0.0
        speed = (number(row.get("audio_seconds_per_second")) or 0.0) * (1 - apart)
        if speed > 0:
            seconds_per_step[row["step"]] = config.train.batch * config.data.segment_seconds / speed
    if not seconds_per_step or max(seconds_per_step.values()) > _LONGEST_STEP:
        return None
    steps = [0, *sorted(seconds_per_step)]
    return sum((step - previous) * seconds_per_step[step] for previous, step in pairwise(steps))


def _joules(rows: list[Row]) -> float | None:
    """Of all rows of training; None where one of them does not say."""
    joules = [number(row.get("joules")) for row in rows if "audio_seconds_per_second" in row]
    known = [value for value in joules if value is not None]
    return sum(known) if known and len(known) == len(joules) else None


def _device(run: Run) -> str:
    if "cpu" in (run.environment.packages.get("torch") or "") or run.config.engine.device == "cpu":
        return "CPU"
    # Only a GPU has memory of its own to report.
    memory = [row.get("memory") for rows in run.histories.values() for row in rows]
    return "GPU" if any(isinstance(entry, dict) and "cuda_gb" in entry for entry in memory) else "unknown"


def cost_table(study: Study) -> Table:
    """State, steps and hours of each run."""
    rows = []
    for run in study.runs:
        cost = spent(run)
        step = run.status.step
        cells = [
            run.name,
            run.status.state,
            f"{'unknown' if step is None or step < 0 else step} of {run.config.train.steps}",
            f"{cost.processes}, {cost.device}",
            f"{cost.hours:.2f}" if cost.hours is not None else "-",
            f"{cost.hours * cost.processes:.2f}" if cost.hours is not None else "-",
            f"{cost.joules / 3.6e6:.3g}" if cost.joules is not None else "-",
        ]
        rows.append([Cell(text) for text in cells])
    heads = ["run", "state", "steps", "processes", "hours", "GPU or CPU hours", "kWh"]
    return Table("What was spent", heads, rows)


def total_hours(study: Study) -> str:
    """``12.50 GPU hours``."""
    totals: defaultdict[str, float] = defaultdict(float)
    for cost in map(spent, study.runs):
        if cost.hours is not None:
            totals[cost.device] += cost.hours * cost.processes
    return (
        ", ".join(f"{hours:.2f} {device} hours" for device, hours in sorted(totals.items()))
        or "nothing known"
    )


@dataclass(frozen=True)
class Reproduction:
    """How to make a run again."""

    name: str
    facts: list[str]
    train: str
    """The command that trains it."""
    evaluate: str
    """The commands behind its scores, a line each; empty without an evaluation."""


def reproduction(run: Run) -> Reproduction:
    """The facts and commands behind `run`."""
    facts = [
        f"configuration {parser.fingerprint(run.config)}, seed {run.config.seed}",
        *_facts(run.environment),
    ]
    if teacher := run.inputs.teacher:
        facts.append(f"teacher {teacher.file}, SHA-256 of its weights {teacher.sha256}")
    commands = [_evaluate_command(run, evaluation) for evaluation in run.evaluations]
    return Reproduction(run.name, facts, train_command(run.config), "\n".join(commands))


def _facts(environment: Environment) -> list[str]:
    package, torch = (environment.packages.get(name) or "unknown" for name in ("mvat_dist", "torch"))
    return [
        f"code {environment.commit or 'unknown'}, mvat_dist {package}, torch {torch}",
        f"on {environment.host}, {environment.platform}",
    ]


def train_command(config: Config) -> str:
    """The command line that trains `config` again: the options that differ from the defaults and matter."""
    defaults = parser.science(Config())
    options = [
        f"--{key} {shlex.quote(_written(value))}"
        for key, value in parser.science(config).items()
        if value != defaults.get(key)
    ]
    return " \\\n    ".join(["python -m mvat_dist.train", *options])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _evaluate_command(run: Run, evaluation: Evaluation) -> str:
    record = evaluation.record
    models = record.models or [str(run.folder.path)]
    words = ["python", "-m", "mvat_dist.evaluate", *models, "--weights", record.weights]
    for option, value in (("data", record.data), ("noisy", record.noisy), ("clean", record.clean)):
        words += [f"--{option}", value] if value is not None else []
    words += ["--metrics", ",".join(record.metrics)] if record.metrics else []
    words += ["--limit", str(record.limit)] if record.limit else []
    words += ["--max-seconds", f"{record.max_seconds:g}"] if record.max_seconds else []
    # Without it the first network is the one that the others are compared with.
    if record.networks and record.reference not in (None, next(iter(record.networks))):
        words += ["--against", str(record.reference)]
    if len(models) > 1:
        words += ["--out", str(evaluation.folder)]
    return shlex.join(words)
