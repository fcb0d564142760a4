"""Where a trained network comes from, as exported files say it: run, teacher, data, scores, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from mvat_dist import locations, modelfile
from mvat_dist.files import read_json
from mvat_dist.modelfile import LoadedModel
from mvat_dist.rundir import RunDir
from mvat_dist.summary import NOISY

UNSTATED = "not stated; the code is MIT, and the data behind the weights have licences of their own"


def describe(file: Path, loaded: LoadedModel, licence: str) -> dict[str, str]:
    """What to write into an exported file, by key; values that are not plain text are JSON.

    ``licence``; ``sha256`` of the weights (`modelfile.fingerprint`); ``exported_with``; and, as far as a
    run's folder is around `file`, ``config`` (YAML), ``inputs`` (teacher and data with their fingerprints),
    ``environment`` (commit and versions) and ``scores`` (by test set). Folders and files of this machine are
    called by their names alone. A file that was exported before keeps what it says.

    Args:
        file: where `loaded` was read.
        loaded: the network.
        licence: of the weights; empty keeps what an exported file says, or else says that it is not stated.
    """
    about = {**loaded.about, **_of_run(file, loaded.name)}
    about["licence"] = licence or about.get("licence", UNSTATED)
    about["sha256"] = modelfile.fingerprint(loaded.model)
    about["exported_with"] = f"mvat_dist {metadata.version('mvat_dist')}, torch {torch.__version__}"
    return about


def _of_run(file: Path, name: str) -> dict[str, str]:
    """What the run says of its student: nothing where `file` is not ``RUN/students/NAME/WHICH/FILE``."""
    parents = file.absolute().parents
    if len(parents) < 4 or not RunDir(parents[3]).config.is_file():
        return {}
    run = RunDir(parents[3])
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    found = {"config": yaml.safe_dump(_placeless(config), sort_keys=False)}
    if run.inputs.is_file():
        inputs = read_json(run.inputs)
        data = [
            {"name": _name(folder), "manifest_sha256": sha256} for folder, sha256 in inputs["data"].items()
        ]
        learnt_from = {"teacher": _placeless(inputs["teacher"]), "data": data}
        if name in inputs.get("init", {}):
            learnt_from["init"] = inputs["init"][name]
        found["inputs"] = json.dumps(learnt_from)
    if run.environment.is_file():
        environment = read_json(run.environment)
        # Not the command, the host and the variables: they say more of the owner than of the network.
        kept = {key: environment.get(key) for key in ("commit", "packages", "python", "platform")}
        found["environment"] = json.dumps(kept)
    # A part of a run is evaluated with the others.
    whole = run.path.parents[1] if run.path.parent.name == run.parts.name else run.path
    if scores := _scores(whole, name, file.parent.name):
        found["scores"] = json.dumps(scores)
    return found


def _scores(run: Path, name: str, which: str) -> dict[str, Any]:
    """Of the network and of the noisy input, as `mvat_dist.evaluate` left them, by data and section."""
    found = {}
    for file in sorted((run / "evaluate").glob("*/scores.json")):
        record = read_json(file)
        if record.get("weights") != which:
            continue
        sections = {
            section: {model: scored for model, scored in one["scores"].items() if model in (name, NOISY)}
            for section, one in record["sections"].items()
        }
        found[file.parent.name.removesuffix(f"-{which}")] = sections
    return found


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
