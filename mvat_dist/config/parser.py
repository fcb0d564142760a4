"""Read a `Config` from YAML files and the command line, check it, and write it back.

The parsing is jsonargparse's; this module adds the nearest known name to a refused key and the
checks that need no data, so that a login node can say no before a job waits in the queue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from mvat_dist.config import locations, sizes
from mvat_dist.config.cli import ConfigHelpFormatter
from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.errors import UserError, nearest

EXAMPLE = """example:
  python -m mvat_dist.train --config configs/distil.yaml --student manner-s-5.3gf \\
      --teacher runs/teacher --distil.weight 0.5 --data.train shards/dns
"""

UNIMPORTANT = (
    "runs",
    "name",
    "parts",
    "resume",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.on_damage",
    "data.max_damaged",
    "engine.zero_stage",
    "engine.device",
    "train.keep",
    "train.watchdog_seconds",
    "track",
)
"""Keys that change where and how a run is computed, not what: they are no part of its identity."""


_PARSER_MODE = "mvat_dist"

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list such as [0,1]",
    "str": "text",
}


def parser(prog: str) -> ArgumentParser:
    """The parser of every command that takes a `Config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(_PARSER_MODE, _load_yaml, exceptions=(yaml.YAMLError,))
    made = ArgumentParser(
        prog=prog,
        parser_mode=_PARSER_MODE,
        description="Train a fleet of students beside one teacher, or a teacher alone.",
        epilog=EXAMPLE,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=ConfigHelpFormatter,
    )
    made.add_argument("--config", action="config", help="YAML file with any of the keys below")
    made.add_class_arguments(Config)
    return made


def _load_yaml(text: str) -> Any:
    """YAML in which ``teacher: FILE`` is short for ``teacher: {file: FILE}``."""
    # jsonargparse's own loader reads 1e-3 as a number, which YAML 1.1 does not.
    loaded = get_loader("yaml")(text)
    if isinstance(loaded, dict) and isinstance(loaded.get("teacher"), str):
        loaded["teacher"] = {"file": loaded["teacher"]}
    return loaded


def _written_out(argv: Sequence[str]) -> list[str]:
    """The command line with ``--teacher FILE`` written out as ``--teacher.file FILE``."""
    return [re.sub(r"^--teacher(?=$|=)", "--teacher.file", argument) for argument in argv]


def parse(argv: list[str] | None, prog: str = "python -m mvat_dist.train") -> Config:
    """The checked configuration for a command line.

    Raises:
        UserError: an unknown key (the nearest names are shown), a wrong type, an unreadable file
            or values that contradict each other.
    """
    made = parser(prog)
    try:
        given = sys.argv[1:] if argv is None else argv
        parsed = made.instantiate(made.parse_args(_written_out(given)))
    except SystemExit:
        raise  # --help and --print_config
    except Exception as error:
        raise UserError(_readable(str(error), made)) from error
    config = Config(**{field.name: parsed[field.name] for field in dataclasses.fields(Config)})
    check(config)
    _make_paths_absolute(config)
    return config


def _make_paths_absolute(config: Config) -> None:
    """A run is the same experiment from whichever folder it is started."""
    config.runs = str(Path(config.runs).absolute())
    config.data.train = locations.absolute(config.data.train)
    config.data.valid = config.data.valid and locations.absolute(config.data.valid)
    for holder, name in ((config.teacher, "file"), (config.teacher, "cache"), (config.train, "init")):
        if getattr(holder, name):
            setattr(holder, name, str(Path(getattr(holder, name)).absolute()))


def _readable(message: str, made: ArgumentParser) -> str:
    """One line from jsonargparse's message, with the nearest keys where a key is unknown."""
    line = re.sub(r"\s+", " ", message).strip()
    line = re.sub(r"<class '(\w+)'>", lambda found: _TYPES.get(found[1], found[1]), line)
    line = re.sub(r'Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*)', r"--\1 \3: expected \2", line)
    line = line.replace("typing.Literal", "one of ")
    known = [option.lstrip("-") for action in made._actions for option in action.option_strings]
    if unknown := re.search(r"unrecognized arguments: --([\w.+-]+)", line):
        line += f"; did you mean {nearest(unknown.group(1), known)}?"
    elif unknown := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line):
        line += f"; did you mean {nearest('.'.join(unknown.groups()), known)}?"
    return f"configuration: {line}"


def check(config: Config) -> None:
    """Refuse values that contradict each other, before anything is read or written.

    Raises:
        UserError: with the key at fault and the fix.
    """
    if not config.runs:
        raise UserError("--runs is empty: name the folder for the runs")
    locations.check("--data.train", config.data.train)
    if config.data.valid:
        locations.check("--data.valid", config.data.valid)
    chosen = sizes.select(config.student, config.sizes)
    if config.track.objective and config.track.objective not in chosen:
        raise UserError(
            f"--track.objective {config.track.objective} is none of the students: {', '.join(chosen)}"
        )
    distil = config.distil
    _check_teacher(config)
    if "mvat" in distil.method and not any(distil.view_betas.values()):
        raise UserError(
            "every view is switched off: give one of --distil.beta_channel, _global, _local above 0"
        )
    if locations.is_url(config.train.init):
        raise UserError(f"--train.init {config.train.init} is a URL: copy it to a folder of this machine")
    _check_ranges(config)


def _check_teacher(config: Config) -> None:
    teacher, method = config.teacher, config.distil.method
    for key, value in (("file", teacher.file), ("cache", teacher.cache)):
        if locations.is_url(value):
            raise UserError(f"--teacher.{key} {value} is a URL: copy it to a folder of this machine")
    if method == "none":
        return
    if teacher.source == "cache" and not teacher.cache:
        raise UserError(
            "--teacher.source cache needs --teacher.cache FOLDER: make one with python -m mvat_dist.cache"
        )
    if teacher.source == "live" and teacher.cache:
        raise UserError(
            f"--teacher.cache {teacher.cache} would not be read: add --teacher.source cache, or leave it out"
        )
    if teacher.source == "live" and not teacher.file:
        raise UserError(
            f"--distil.method {method} needs a teacher: give --teacher RUN_OR_CHECKPOINT, "
            "or train without one with --distil.method none"
        )


def _check_ranges(config: Config) -> None:
    train, optim = config.train, config.optim
    positive = {
        "train.steps": train.steps,
        "train.batch": train.batch,
        "train.micro_batch": train.micro_batch,
        "train.validate_every": train.validate_every,
        "train.save_every": train.save_every,
        "train.keep": train.keep,
        "train.max_skipped": train.max_skipped,
        "train.watchdog_seconds": train.watchdog_seconds,
        "track.every": config.track.every,
        "optim.lr": optim.lr,
        "optim.eps": optim.eps,
        "data.cache_gb": config.data.cache_gb,
        "data.segment_seconds": config.data.segment_seconds,
    }
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"--{key} is {value}: it must be above 0")
    _check_not_negative(config)
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"--optim.betas is {list(optim.betas)}: both lie from 0 to below 1")
    if not 0 <= train.batchnorm_momentum <= 1:
        raise UserError(f"--train.batchnorm_momentum is {train.batchnorm_momentum}: give 0 to 1")
    shares = {
        "optim.warmup_fraction": optim.warmup_fraction,
        "distil.fade_by": config.distil.fade_by,
        "loss.pesq_after": config.loss.pesq_after,
    }
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"--{key} is {value}: it is a share from 0 to 1")
    # A few frames of the longest window of the losses, 1200 samples.
    if config.data.segment_seconds * SAMPLE_RATE < 2048:
        raise UserError(
            f"--data.segment_seconds is {config.data.segment_seconds}: the spectral loss needs 0.128 s"
        )


def _check_not_negative(config: Config) -> None:
    optim = config.optim
    not_negative = {
        "seed": config.seed,
        "train.rollbacks": config.train.rollbacks,
        "valid.clips": config.valid.clips,
        "track.examples": config.track.examples,
        "valid.max_seconds": config.valid.max_seconds,
        "optim.clip_norm": optim.clip_norm,
        "optim.weight_decay": optim.weight_decay,
        "loss.waveform": config.loss.waveform,
        "loss.compressed": config.loss.compressed,
        "loss.pesq": config.loss.pesq,
        "distil.weight": config.distil.weight,
        "distil.output_weight": config.distil.output_weight,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise UserError(f"--{key} is {value}: it must not be negative")


def as_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, as they stand in a YAML file."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``--config`` reads back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def science(config: Config) -> dict[str, Any]:
    """The configuration without the `UNIMPORTANT` keys, flat: what makes a run this run."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if prefix in UNIMPORTANT:
            return
        if isinstance(value, dict) and prefix != "sizes":
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    visit("", as_dict(config))
    return flat


def identity(config: Config) -> str:
    """Eight hexadecimal digits that are equal for two configurations of the same science.

    Of the keys that are not at their default alone: a key that a later version adds renames no run.
    """
    usual = science(Config())
    canonical = json.dumps({k: v for k, v in science(config).items() if v != usual.get(k)}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
