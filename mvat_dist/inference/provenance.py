"""Where a trained network comes from, as exported files say it: run, teacher, data, scores, licence."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from mvat_dist.config import locations
from mvat_dist.errors import UserError
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.evaluation.systems import CLASSICAL
from mvat_dist.io import read_json
from mvat_dist.models import metadata, weights
from mvat_dist.models.weights import LoadedModel
from mvat_dist.runs.folder import RunDir

UNSTATED = "not stated; the code is MIT, and the data behind the weights have licences of their own"

DAMAGE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, yaml.YAMLError,
    UserError,
)  # fmt: skip
"""What a record raises that is torn, or is not what it should be."""

_Said = TypeVar("_Said")


def describe(file: Path, loaded: LoadedModel, licence: str) -> dict[str, str]:
    """What to write into an exported file, by key; values that are not plain text are JSON.

    ``licence``; ``sha256`` of the weights (`modelfile.fingerprint`); ``exported_with``; and, as far as a
    run's folder is around `file`, ``config`` (YAML), ``inputs`` (teacher and data with their fingerprints),
    ``environment`` (commit and versions) and ``scores`` (by test set). Folders and files of this machine are
    called by their names alone. A file that was exported before keeps what it says. What cannot be read is
    left out, and standard error says so.

    Args:
        file: where `loaded` was read.
        loaded: the network.
        licence: of the weights; empty keeps what an exported file says, or else says that it is not stated.
    """
    sha256 = weights.fingerprint(loaded.model)
    about = {**loaded.about, **_of_run(file, loaded.name, sha256)}
    about["licence"] = licence or about.get("licence", UNSTATED)
    about["sha256"] = sha256
    about["exported_with"] = f"mvat_dist {importlib.metadata.version('mvat_dist')}, torch {torch.__version__}"
    return about


def _of_run(file: Path, name: str, sha256: str) -> dict[str, str]:
    """What the run says of its student: nothing where `file` is not ``RUN/students/NAME/WHICH/FILE``."""
    parents = file.absolute().parents
    if len(parents) < 4 or not RunDir(parents[3]).config.is_file():
        return {}
    run = RunDir(parents[3])
    records: list[tuple[Path, str, Callable[[Path], str]]] = [
        (run.config, "config", _config),
        (run.inputs, "inputs", partial(_inputs, name=name)),
        (run.environment, "environment", _environment),
    ]
    found = {}
    for place, key, read_record in records:
        if place.is_file() and (said := _legible(place, read_record)) is not None:
            found[key] = said
    if scores := _scores(run.path, name, file.parent.name, sha256):
        found["scores"] = json.dumps(scores)
    return found


def _legible(file: Path, read_record: Callable[[Path], _Said]) -> _Said | None:
    """What `file` says; None, with a note, where it is damaged."""
    try:
        return read_record(file)
    except DAMAGE as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"note: {file} cannot be read, and is left out of the export ({why})", file=sys.stderr)
        return None


def _config(file: Path) -> str:
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    training(config)  # raises where the card would
    return yaml.safe_dump(_placeless(config), sort_keys=False)


def training(config: Mapping[str, Any]) -> list[str]:
    """How a run was trained and on what, in words; raises one of `DAMAGE` for what is no configuration."""
    train, data = config["train"], config["data"]
    steps = f"{train['steps']} steps of {train['batch']} segments of {data['segment_seconds']:g} s"
    # Runs of before these terms do not name them.
    terms = [f"{name} {factor:g}" for name, factor in config.get("loss", {}).items() if factor]
    loss = f"loss of the authors, and {', '.join(terms)}" if terms else "loss of the authors"
    method = f"method {config['distil']['method']}, seed {config['seed']}, {steps}"
    return [method, loss, f"data {data['train']}"]


def origin(what: str, found: Mapping[str, Any]) -> str:
    """Which network it was, in words."""
    return f"{what} {found['name']}, SHA-256 {found['sha256']}"


def _inputs(file: Path, name: str) -> str:
    inputs = read_json(file)
    data = [{"name": _name(folder), "manifest_sha256": sha256} for folder, sha256 in inputs["data"].items()]
    learnt_from = {"teacher": _placeless(inputs["teacher"]), "data": data}
    if name in inputs.get("init", {}):
        learnt_from["init"] = inputs["init"][name]
    for one in ("teacher", "init"):
        if learnt_from.get(one):
            origin(one, learnt_from[one])  # raises where the card would
    return json.dumps(learnt_from)


def _environment(file: Path) -> str:
    environment = read_json(file)
    # Not the command, the host and the variables: they say more of the owner than of the network.
    kept = {key: environment.get(key) for key in ("commit", "packages", "python", "platform")}
    return json.dumps(kept)


def _scores(run: Path, name: str, which: str, sha256: str) -> dict[str, Any]:
    """Of the network, the noisy input and the classical filter, by data and section, as evaluated.

    Only where the network that was scored is the one of these weights: a run may have gone on since.
    """
    found = {}
    for file in sorted((run / "evaluate").glob("*/scores.json")):
        if sections := _legible(file, partial(_sections, name=name, which=which, sha256=sha256)):
            found[file.parent.name.removesuffix(f"-{which}")] = sections
    return found


def _sections(file: Path, name: str, which: str, sha256: str) -> dict[str, Any]:
    record = read_json(file)
    if record.get("weights") != which:
        return {}
    if record["identity"]["networks"].get(name) != sha256:
        print(
            f"note: {file} has no scores of these weights of {name} and is left out of the export: evaluate "
            "again",
            file=sys.stderr,
        )
        return {}
    shown = (name, NOISY, CLASSICAL)
    sections = {
        section: {model: scored for model, scored in one["scores"].items() if model in shown}
        for section, one in record["sections"].items()
    }
    for by_model in sections.values():
        for scored in by_model.values():
            for score in scored.values():
                for value in (score["mean"], score["low"], score["high"]):
                    value is None or float(value)
    return {section: by_model for section, by_model in sections.items() if by_model}


def _placeless(value: Any) -> Any:
    """`value` with names in place of its paths: they would say much of the owner, and lead nowhere."""
    if isinstance(value, dict):
        return {key: _placeless(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.startswith(("/", "{")):
        names = [_name(one) for one in locations.expand(value)]
        return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
    return value


def _name(location: str) -> str:
    """Of a folder or a file of this machine; URLs stay."""
    return location if locations.is_url(location) else Path(location).name


def read(about: Mapping[str, str], key: str) -> Any:
    """The JSON value at `key` of a description; None where there is none."""
    return json.loads(about[key]) if key in about else None


def fingerprint_of(file: Path) -> str:
    """Fingerprint of the weights in an exported file (`models.weights.fingerprint`), as the file states it.

    Empty where the file does not state it: another program's, damaged, or an ONNX file without ``onnx`` here.
    """
    read = {".safetensors": _of_safetensors, ".pt": _of_torchscript, ".onnx": _of_onnx}[file.suffix]
    try:
        return read(file)
    except Exception:  # each format has damages of its own
        return ""


def _of_safetensors(file: Path) -> str:
    description = metadata.read(file)
    return description.about.get("sha256", "") if description else ""


def _of_torchscript(file: Path) -> str:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/extra/sha256")]
        return archive.read(names[0]).decode("ascii") if names else ""


def _of_onnx(file: Path) -> str:
    import onnx

    properties = onnx.load(file, load_external_data=False).metadata_props
    return next((entry.value for entry in properties if entry.key == "sha256"), "")
