"""Describe where a trained network comes from, for exported files: run, teacher, data, scores, licence."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from mvat_dist.config import locations
from mvat_dist.errors import UserError
from mvat_dist.evaluation.score_record import Scores
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.evaluation.systems import CLASSICAL
from mvat_dist.io import read_json, read_record
from mvat_dist.models import metadata, weights
from mvat_dist.models.weights import LoadedModel
from mvat_dist.runs.folder import RunDir

UNSTATED = "not stated; the code is MIT, and the data behind the weights have licences of their own"

DAMAGE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, yaml.YAMLError,
    UserError,
)  # fmt: skip
"""Errors that a damaged record raises, or one of another kind."""

_Record = TypeVar("_Record")


def describe(file: Path, loaded: LoadedModel, licence: str) -> dict[str, str]:
    """Collect the metadata of an exported file, by key; values that are not plain text are JSON.

    The keys are ``licence``, ``sha256`` of the weights (`models.weights.fingerprint`), ``exported_with``
    and, if `file` lies in a run's folder, ``config`` (YAML), ``inputs`` (teacher and data with their
    fingerprints), ``environment`` (commit and versions) and ``scores`` (by test set). Folders and files of
    this machine appear by name only. A file that was exported before keeps its metadata. A record that
    cannot be read is left out, with a note on standard error.

    Args:
        file: where `loaded` was read.
        loaded: the network.
        licence: of the weights; empty keeps that of an exported file, or says that it is not stated.
    """
    sha256 = weights.fingerprint(loaded.model)
    about = {**loaded.about, **_of_run(file, loaded.name, sha256)}
    about["licence"] = licence or about.get("licence", UNSTATED)
    about["sha256"] = sha256
    about["exported_with"] = f"mvat_dist {importlib.metadata.version('mvat_dist')}, torch {torch.__version__}"
    return about


def _of_run(file: Path, name: str, sha256: str) -> dict[str, str]:
    """Metadata from the run's records; empty if `file` is not ``RUN/students/NAME/WHICH/FILE``."""
    parents = file.absolute().parents
    if len(parents) < 4 or not RunDir(parents[3]).config.is_file():
        return {}
    run = RunDir(parents[3])
    records: list[tuple[Path, str, Callable[[Path], str]]] = [
        (run.config, "config", _config),
        (run.inputs, "inputs", partial(_inputs, name=name)),
        (run.environment, "environment", _environment),
    ]
    about = {}
    for path, key, read in records:
        if path.is_file() and (text := _legible(path, read)) is not None:
            about[key] = text
    if scores := _scores(run.path, name, file.parent.name, sha256):
        about["scores"] = json.dumps(scores)
    return about


def _legible(file: Path, read: Callable[[Path], _Record]) -> _Record | None:
    """Read a record; None, with a note on standard error, if it is damaged."""
    try:
        return read(file)
    except DAMAGE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"note: {file} cannot be read, and is left out of the export ({reason})", file=sys.stderr)
        return None


def _config(file: Path) -> str:
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    training(config)  # raises where the card would
    return yaml.safe_dump(_placeless(config), sort_keys=False)


def training(config: Mapping[str, Any]) -> list[str]:
    """Say how a run was trained and on what data; raises one of `DAMAGE` for a damaged configuration."""
    train, data = config["train"], config["data"]
    steps = f"{train['steps']} steps of {train['batch']} segments of {data['segment_seconds']:g} s"
    # Runs of before these terms do not name them.
    terms = [f"{name} {factor:g}" for name, factor in config.get("loss", {}).items() if factor]
    loss = f"loss of the authors, and {', '.join(terms)}" if terms else "loss of the authors"
    method = f"method {config['distil']['method']}, seed {config['seed']}, {steps}"
    return [method, loss, f"data {data['train']}"]


def origin(role: str, network: Mapping[str, Any]) -> str:
    """Name a network that a training used, with its fingerprint."""
    return f"{role} {network['name']}, SHA-256 {network['sha256']}"


def _inputs(file: Path, name: str) -> str:
    inputs = read_json(file)
    data = [{"name": _name(folder), "manifest_sha256": sha256} for folder, sha256 in inputs["data"].items()]
    origins = {"teacher": _placeless(inputs["teacher"]), "data": data}
    if name in inputs.get("init", {}):
        origins["init"] = inputs["init"][name]
    for role in ("teacher", "init"):
        if origins.get(role):
            origin(role, origins[role])  # raises where the card would
    return json.dumps(origins)


def _environment(file: Path) -> str:
    environment = read_json(file)
    # Without command, host and variables, which describe the owner and not the network.
    kept = {key: environment.get(key) for key in ("commit", "packages", "python", "platform")}
    return json.dumps(kept)


def _scores(run: Path, name: str, which: str, sha256: str) -> dict[str, Any]:
    """Scores of the network, the noisy input and the classical filter, by data and section.

    Only scores of these very weights count: a run may have gone on since its evaluation.
    """
    scores = {}
    for file in sorted((run / "evaluate").glob("*/scores.json")):
        if sections := _legible(file, partial(_sections, name=name, which=which, sha256=sha256)):
            scores[file.parent.name.removesuffix(f"-{which}")] = sections
    return scores


def _sections(file: Path, name: str, which: str, sha256: str) -> dict[str, Any]:
    record = read_record(file, Scores)
    if record.weights != which:
        return {}
    if record.inputs.networks.get(name) != sha256:
        print(
            f"note: {file} has no scores of these weights of {name} and is left out of the export: evaluate "
            "again",
            file=sys.stderr,
        )
        return {}
    shown = (name, NOISY, CLASSICAL)
    sections = {
        test_set: {
            model: {metric: asdict(score) for metric, score in by_metric.items()}
            for model, by_metric in section.scores.items()
            if model in shown
        }
        for test_set, section in record.sections.items()
    }
    return {test_set: by_model for test_set, by_model in sections.items() if by_model}


def _placeless(value: Any) -> Any:
    """Replace paths in `value` by names: paths reveal the owner's folders and do not exist elsewhere."""
    if isinstance(value, dict):
        return {key: _placeless(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.startswith(("/", "{")):
        names = [_name(location) for location in locations.expand(value)]
        return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
    return value


def _name(location: str) -> str:
    """The name of a folder or a file of this machine; URLs stay."""
    return location if locations.is_url(location) else Path(location).name


def read(about: Mapping[str, str], key: str) -> Any:
    """The JSON value at `key` of the metadata; None if there is none."""
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
