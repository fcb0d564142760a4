"""What the runs cost, and how to make each of them again."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from itertools import pairwise
from typing import Any

from mvat_dist import configfile
from mvat_dist.config import Config
from mvat_dist.reporting.blocks import Block, Cell, Code, Fold, Items, Missing, Section, Table, Text
from mvat_dist.reporting.runs import Run, number
from mvat_dist.reporting.study import Study
from mvat_dist.students import SIZES


def seconds(run: Run) -> float | None:
    """Wall-clock seconds of training with its validations and checkpoints; None without a record.

    From the speed in the record, seconds of audio per second, over the steps since the row before. Of
    several students in one run, the one with the longest record. Starting up is not in it.
    """
    heard_per_step = run.config.train.batch * run.config.data.segment_seconds
    longest: float | None = None
    for rows in run.histories.values():
        told = [(row["step"], number(row.get("audio_seconds_per_second"))) for row in rows]
        known = {step: speed for step, speed in told if speed}
        before = [0, *sorted(known)]
        total = sum((step - last) * heard_per_step / known[step] for last, step in pairwise(before))
        if known:
            longest = max(total, longest or 0.0)
    return longest


def cost(study: Study) -> Section:
    """Hours of each run."""
    totals: defaultdict[str, float] = defaultdict(float)
    rows = []
    for run in study.runs:
        spent = seconds(run)
        hours = spent * _ranks(run) / 3600 if spent is not None else None
        totals[_device(run)] += hours or 0.0
        rows.append(
            [
                Cell(run.name),
                Cell(str(run.status.get("state", "unknown"))),
                Cell(f"{run.status.get('step', 0)} of {run.config.train.steps}"),
                Cell(f"{_ranks(run)}, {_device(run)}"),
                Cell(f"{spent / 3600:.2f}" if spent is not None else "-"),
                Cell(f"{hours:.2f}" if hours is not None else "-"),
            ]
        )
    spent_on = ", ".join(f"{hours:.2f} {device} hours" for device, hours in sorted(totals.items()))
    text = (
        f"In all: {spent_on}. Hours are the time of training with its validations and checkpoints, from the "
        "speed in each record; GPU or CPU hours are these times the number of processes, one per GPU. "
        "Energy: not measured."
    )
    heads = ["run", "state", "steps", "processes", "hours", "GPU or CPU hours"]
    return Section("Cost of the runs", [Text(text), Table("What was spent", heads, rows)])


def _ranks(run: Run) -> int:
    ranks = run.environment.get("ranks")
    size = number(ranks.get("world_size")) if isinstance(ranks, dict) else None
    return int(size or 1)


def _device(run: Run) -> str:
    packages = run.environment.get("packages")
    torch = str(packages.get("torch", "")) if isinstance(packages, dict) else ""
    if "cpu" in torch or run.config.engine.device == "cpu":
        return "CPU"
    # Only a GPU has memory of its own to tell of.
    memory = [row.get("memory") for rows in run.histories.values() for row in rows]
    return "GPU" if any(isinstance(one, dict) and "cuda_gb" in one for one in memory) else "unknown"


def reproduction(study: Study) -> Section:
    """The commands behind every run."""
    text = (
        "Every run as one command: its options are all those that differ from the defaults and matter. The "
        "eight digits are the hash of the configuration; equal digits are the same experiment."
    )
    return Section("How to make each row again", [Text(text), *(_run(run) for run in study.runs)])


def _run(run: Run) -> Block:
    environment = run.environment
    packages = environment.get("packages")
    versions = packages if isinstance(packages, dict) else {}
    facts = [
        f"configuration {configfile.identity(run.config)}, seed {run.config.seed}",
        f"code {environment.get('commit') or 'unknown'}, mvat_dist {versions.get('mvat_dist', 'unknown')}, "
        f"torch {versions.get('torch', 'unknown')}",
        f"on {environment.get('host', 'unknown')}, {environment.get('platform', 'unknown')}",
    ]
    if run.teacher:
        facts.append(f"teacher {run.teacher.get('file')}, SHA-256 of its weights {run.teacher.get('sha256')}")
    blocks: list[Block] = [Items(facts), Code(command(run.config))]
    if run.evaluations:
        blocks.append(Code("\n".join(_evaluation(run, one.record) for one in run.evaluations)))
    else:
        blocks.append(Missing("Not evaluated: python -m mvat_dist.evaluate on this folder adds its scores."))
    return Fold(run.name, blocks)


def command(config: Config) -> str:
    """The command line that trains `config` again."""
    defaults = configfile.science(Config())
    options = []
    for key, value in configfile.science(config).items():
        if key == "sizes":
            value = {name: size for name, size in value.items() if name not in SIZES}
        if value != defaults.get(key):
            options.append(f"--{key} {shlex.quote(_written(value))}")
    return " \\\n    ".join(["python -m mvat_dist.train", *options])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _evaluation(run: Run, record: dict[str, Any]) -> str:
    data, weights = str(record.get("data", "DATA")), str(record.get("weights", "best"))
    words = ["python", "-m", "mvat_dist.evaluate", str(run.path), "--data", data, "--weights", weights]
    return shlex.join(words)
