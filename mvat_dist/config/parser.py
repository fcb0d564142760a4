"""Read a `Config` from YAML files and the command line, check it, and write it back.

jsonargparse does the parsing. This module adds the nearest known name to a refused key, and the checks
that need no data: a login node refuses a configuration before its job waits in the queue.
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
from mvat_dist.config.bounds import IN_WORDS
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
    "resume",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.on_bad_sample",
    "data.max_bad_samples",
    "engine.zero_stage",
    "engine.device",
    "train.keep",
    "train.watchdog_seconds",
    "track",
)
"""Keys that change where and how a run is computed, but not what: the fingerprint leaves them out."""


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
    arguments = ArgumentParser(
        prog=prog,
        parser_mode=_PARSER_MODE,
        description="Train a group of students beside one teacher, or a teacher alone.",
        epilog=EXAMPLE,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=ConfigHelpFormatter,
    )
    arguments.add_argument("--config", action="config", help="YAML file with any of the keys below")
    arguments.add_class_arguments(Config)
    return arguments


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
    arguments = parser(prog)
    try:
        values = arguments.parse_args(_written_out(sys.argv[1:] if argv is None else argv))
        _check_given("", {key: value for key, value in values.as_dict().items() if key != "config"})
        parsed = arguments.instantiate(values)
    except SystemExit:
        raise  # --help and --print_config
    except Exception as error:
        raise UserError(_readable(str(error), arguments)) from error
    config = Config(**{field.name: _plain(parsed[field.name]) for field in dataclasses.fields(Config)})
    check(config)
    _make_paths_absolute(config)
    return config


def _plain(value: Any) -> Any:
    """A value with int and float in place of the bounded types, which a pickle of it would name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(
            value, **{field.name: _plain(getattr(value, field.name)) for field in fields}
        )
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_plain(inner) for inner in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, float) else value


def _make_paths_absolute(config: Config) -> None:
    """A run is the same experiment from whichever folder it is started."""
    config.runs = str(Path(config.runs).absolute())
    config.data.train = locations.absolute(config.data.train)
    config.data.valid = config.data.valid and locations.absolute(config.data.valid)
    for holder, name in ((config.teacher, "file"), (config.teacher, "cache"), (config.train, "init")):
        if getattr(holder, name):
            setattr(holder, name, str(Path(getattr(holder, name)).absolute()))


def _readable(message: str, arguments: ArgumentParser) -> str:
    """One line from jsonargparse's message, with the nearest keys where a key is unknown."""
    line = re.sub(r"\s+", " ", message).strip()
    line = re.sub(r"<class '(\w+)'>", lambda match: _TYPES.get(match[1], match[1]), line)
    line = re.sub(r'Parser key "([\w.]+)": Expected a (.+?)\. Got value: (.*)', r"--\1 \3: expected \2", line)
    line = re.sub(
        r'Parser key "([\w.]+)": Not of type (\w+): (.+?) does not conform to restriction .*',
        lambda match: f"--{match[1]} {match[3]}: must be {IN_WORDS[match[2]]}",
        line,
    )
    line = re.sub(
        r'Parser key "([\w.]+)": Not of type (\w+): (.+)',
        lambda match: f"--{match[1]}: expected {IN_WORDS.get(match[2], match[2])} ({match[3]})",
        line,
    )
    line = line.replace("typing.Literal", "one of ")
    known = [option.lstrip("-") for action in arguments._actions for option in action.option_strings]
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
    # A few frames of the longest window of the losses, 1200 samples.
    if config.data.segment_seconds * SAMPLE_RATE < 2048:
        raise UserError(
            f"--data.segment_seconds is {config.data.segment_seconds}: the spectral loss needs 0.128 s"
        )


def _check_given(prefix: str, values: dict[str, Any]) -> None:
    """Refuse ``null`` and empty sections, which jsonargparse takes for a value of any type."""
    for key, value in values.items():
        if value is None:
            raise UserError(f"--{prefix}{key} is null: give a value, or leave the key out for its default")
        if isinstance(value, dict):
            _check_given(f"{prefix}{key}.", value)


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


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits that are equal for two configurations of the same science.

    Only keys that differ from their default count, so that a key added by a later version renames no run.
    """
    defaults = science(Config())
    canonical = json.dumps({k: v for k, v in science(config).items() if v != defaults.get(k)}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
