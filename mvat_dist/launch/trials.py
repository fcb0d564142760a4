"""One trial of a sweep: what its agent tells it, the training that it means, and its record.

An agent is W&B's, or `mvat_dist.sweep` where there is no server. Both say the same in the same way: by
environment variables, a file of parameters and the command line. No torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from mvat_dist.config import parser as configfile
from mvat_dist.config import sizes
from mvat_dist.config.cli import CommandParser
from mvat_dist.config.schema import Config, ValidConfig
from mvat_dist.errors import UserError, nearest
from mvat_dist.io import make_folder, read_record, write_json, write_text
from mvat_dist.launch import preflight
from mvat_dist.launch.slurm import Resources
from mvat_dist.launch.sweep_file import Point, Sweep

MODULE = "mvat_dist.trial"
"""The command that a sweep file starts."""
PROG = f"python -m {MODULE}"

PROCESSES = "MVAT_PROCESSES"
"""Environment variable: ranks of a trial where no Slurm job has nodes for it."""
SRUN_ARGS = "MVAT_SRUN_ARGS"
"""Environment variable: further options of srun."""
RECORD = "MVAT_TRIAL_RECORD"
"""Environment variable: the file of the trial's record; none is written where it is not set."""

AGENT_VARIABLES = (
    "WANDB_RUN_ID",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_RUN_GROUP",
    "WANDB_ENTITY",
    "WANDB_PROJECT",
    "WANDB_DIR",
)
"""Environment variables by which an agent tells a trial which one it is."""

_SCORES = {
    f"valid/{name}{end}"
    for name in get_args(get_type_hints(ValidConfig)["best"])
    for end in ("", "_low", "_high", "_failed")
}
"""Scores of a validation, by their names in a student's history."""


# ---------------------------------------------------------------------------------------- its files


@dataclass(frozen=True)
class TrialRecord:
    """Enough to find a trial's scores, and to start it again without asking an agent."""

    run: str
    """Its run folder."""
    student: str
    """The student whose scores count."""
    argv: list[str]
    """Arguments of `mvat_dist.trial`."""
    environment: dict[str, str]
    """Values of `AGENT_VARIABLES`."""
    exit_code: int | None = None
    """None while the trial runs, and where it was killed."""

    @classmethod
    def read(cls, file: Path) -> TrialRecord | None:
        """The record in `file`; None where there is none yet.

        Raises:
            UserError: the file is damaged.
        """
        return read_record(file, cls) if file.exists() else None

    def write(self, file: Path) -> None:
        """Write the record atomically."""
        make_folder(file.parent)
        write_json(file, asdict(self))


def read_parameters(file: Path) -> Point:
    """Read the values by name from the file that W&B's agent writes for a trial.

    Raises:
        UserError: it is missing or not of that form.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {name: entry["value"] for name, entry in content.items() if name != "wandb_version"}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"the parameters of this trial cannot be read from {file}: {error!r}") from error


def write_parameters(file: Path, point: Point) -> None:
    """Write the file that W&B's agent would write."""
    content = {"wandb_version": 1, **{name: {"value": value} for name, value in point.items()}}
    make_folder(file.parent)
    write_text(file, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))


# -------------------------------------------------------------------------------- what the agent says


def parser() -> argparse.ArgumentParser:
    """The options of `mvat_dist.trial` that are not the trainer's."""
    options = CommandParser(
        PROG,
        "Train one trial of a sweep. A W&B agent or mvat_dist.sweep starts it: it is the command of a sweep "
        "file (configs/sweep.yaml). All other options are the trainer's (python -m mvat_dist.train --help); "
        "the parameters of the sweep come after them and win. Exit code: 0 when the trial is finished or was "
        "stopped by its agent, 128 plus a signal's number when it was preempted and may go on, else the "
        "training's own.",
        "wandb sweep configs/sweep.yaml\n  wandb agent ENTITY/PROJECT/ID",
    )
    options.add_argument(
        "--processes",
        type=int,
        default=os.environ.get(PROCESSES, "1"),
        metavar="N",
        help=f"ranks on this machine; in a Slurm job its tasks are (default: ${PROCESSES}, else 1)",
    )
    return options


@dataclass(frozen=True)
class Trial:
    """What the agent says about a trial."""

    run_id: str
    """Id of the W&B run that the sweep looks at, and name of the trial's folder."""
    sweep: str
    """Name of the folder of all trials."""
    parameters: Point | None
    """By name; None where the agent has left no file of them."""
    environment: dict[str, str]
    """The values of `AGENT_VARIABLES` that say all this."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Trial:
        """Read the trial of this process from its environment.

        Raises:
            UserError: the environment names none, or the file of its parameters cannot be read.
        """
        run_id, sweep_id = environ.get("WANDB_RUN_ID"), environ.get("WANDB_SWEEP_ID")
        sweep = f"sweep-{sweep_id}" if sweep_id else environ.get("WANDB_RUN_GROUP")
        if not run_id or not sweep:
            raise UserError(
                "this is no trial of a sweep (no WANDB_RUN_ID and WANDB_SWEEP_ID): start it by wandb agent "
                "or python -m mvat_dist.sweep, or train with python -m mvat_dist.train"
            )
        for name in (run_id, sweep):
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise UserError(f"{name!r} cannot name a folder: a sweep and its runs have plain ids")
        file = environ.get("WANDB_SWEEP_PARAM_PATH")
        parameters = read_parameters(Path(file)) if file else None
        return cls(
            run_id, sweep, parameters, {name: environ[name] for name in AGENT_VARIABLES if name in environ}
        )

    def arguments(self, given: Sequence[str]) -> tuple[list[str], Config]:
        """The trainer's command line, and the configuration that it means.

        The parameters are read from the agent's file, which keeps their types. The same names in `given`
        are the agent's spelling of them, and are left out.

        Raises:
            UserError: the trainer knows no such key (the nearest is named), or refuses its value.
        """
        parameters = self.parameters or {}
        argv = _without(given, parameters)
        argv += [
            # true, null, 1e-05, {"lr": 0.1}: as the trainer takes them
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in parameters.items()
            if not name.startswith("_wandb")
        ]
        config = configfile.parse(argv, prog=PROG)
        if config.name:
            raise UserError(
                f"--name {config.name}: a trial's folder has the name of its W&B run; leave --name out"
            )
        options = {
            "runs": str(Path(config.runs) / self.sweep),
            "name": self.run_id,
            "track.objective": config.track.objective
            or next(iter(sizes.select(config.student, config.sizes))),
        }
        # `mvat_dist.sync`, which no agent tells anything, has to find the project later.
        for key in ("project", "entity", "group"):
            variable = "WANDB_RUN_GROUP" if key == "group" else f"WANDB_{key.upper()}"
            if value := self.environment.get(variable):
                options[f"track.{key}"] = value
                setattr(config.track, key, value)
        config.runs, config.name = options["runs"], options["name"]
        config.track.objective = options["track.objective"]
        return [*argv, *(f"--{name}={value}" for name, value in options.items())], config


def _without(given: Sequence[str], parameters: Mapping[str, Any]) -> list[str]:
    """`given` without what repeats `parameters`, in any of the forms of W&B's ``${args...}``."""
    kept: list[str] = []
    value_follows = False
    for token in given:
        name, equals, _ = token.lstrip("-+").partition("=")
        if value_follows and not token.startswith("--"):
            value_follows = False
            continue
        value_follows = name in parameters and not equals
        if name not in parameters and not name.startswith("_wandb"):
            kept.append(token)
    return kept


# -------------------------------------------------------------------------- what a sweep file starts


def command_line(sweep: Sweep, point: Point) -> list[str]:
    """The command of a sweep file with its macros filled in, as W&B's agent does it."""
    # Imported late: half a second that --help and --ranking need not wait.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    command = {"program": sweep.program, "args": {name: {"value": value} for name, value in point.items()}}
    macros = create_sweep_command_args(command)
    # The agent says `python`, which need not be this one.
    macros |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep.program]}
    line: list[str] = []
    for part in create_sweep_command(list(sweep.command)):
        is_macro = part.startswith("${") and part.endswith("}")
        line += macros.get(part[2:-1], []) if is_macro else [part]
    return line


def check(sweep: Sweep, point: Point, run_id: str, group: str, resources: Resources) -> None:
    """Find a mistake that a trial would make before any starts; commands other than ours are not checked.

    Args:
        sweep: the file.
        point: the trial's parameters.
        run_id: of the trial.
        group: name of the folder of all trials.
        resources: their processes share the batch.

    Raises:
        UserError: the metric is no score, or the training's options or inputs are refused.
    """
    line = command_line(sweep, point)
    if MODULE not in line:
        return
    _check_metric(sweep.metric)
    _, given = parser().parse_known_args(line[line.index(MODULE) + 1 :])
    _, config = Trial(run_id, group, point, {}).arguments(given)
    preflight.check_inputs(config)
    preflight.check_sharing(config, resources)


def _check_metric(metric: str) -> None:
    if metric in _SCORES or metric == "loss":
        return
    message = f"metric {metric} is no score of a validation; did you mean {nearest(metric, _SCORES)}?"
    if metric.startswith("valid/"):
        raise UserError(message)
    # Training records a term of the loss under the name that the method gives it.
    print(f"warning: {message}", file=sys.stderr)
