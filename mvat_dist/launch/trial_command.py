"""What starts a trial, as W&B's agent makes it of a sweep file, and whether it can train at all."""

from __future__ import annotations

import sys
from typing import get_args, get_type_hints

from mvat_dist import trial
from mvat_dist.config.schema import ValidConfig
from mvat_dist.errors import UserError, nearest
from mvat_dist.launch import preflight
from mvat_dist.launch.slurm import Resources
from mvat_dist.launch.sweep_file import Point, Sweep
from mvat_dist.trial import Trial

_TRIAL = "mvat_dist.trial"
_SCORES = {
    f"valid/{name}{end}"
    for name in get_args(get_type_hints(ValidConfig)["best"])
    for end in ("", "_low", "_high", "_failed")
}
"""Of a validation, as a student's history names them."""


def command_line(sweep: Sweep, point: Point) -> list[str]:
    """The command of the file with its macros filled in."""
    # Imported late: half a second that --help and --ranking need not wait.
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    command = {"program": sweep.program, "args": {name: {"value": value} for name, value in point.items()}}
    macros = create_sweep_command_args(command)
    # The agent says `python`, which need not be this one.
    macros |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep.program]}
    line: list[str] = []
    for part in create_sweep_command(list(sweep.command)):
        known = part.startswith("${") and part.endswith("}")
        line += macros.get(part[2:-1], []) if known else [part]
    return line


def check(sweep: Sweep, point: Point, run_id: str, group: str, resources: Resources) -> None:
    """Find a mistake that this trial would make before any starts; a command that is not ours is let be.

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
    if _TRIAL not in line:
        return
    _check_metric(sweep.metric)
    _, rest = trial.parser().parse_known_args(line[line.index(_TRIAL) + 1 :])
    _, config = Trial(run_id, group, point, {}).arguments(rest)
    preflight.check_inputs(config)
    preflight.check_shares("together", config, resources)


def _check_metric(metric: str) -> None:
    if metric in _SCORES or metric == "loss":
        return
    message = f"metric {metric} is no score of a validation; did you mean {nearest(metric, _SCORES)}?"
    if metric.startswith("valid/"):
        raise UserError(message)
    # Training records a term of the loss under whatever name the method gives it.
    print(f"warning: {message}", file=sys.stderr)
