"""A folder with a corpus and a sweep file whose trials take seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.conftest import REPOSITORY
from tests.tiny_corpus import write_pairs, write_sources

STUDENTS = ("tiny", "mini")
OBJECTIVE = "mini"


def write_place(folder: Path) -> Path:
    """The folder, whose name has a space, with a corpus in it."""
    place = folder / "a place"
    place.mkdir()
    tone = 0.2 * np.sin(2 * np.pi * 200 * np.arange(8000) / 16_000)
    noise = 0.05 * np.random.default_rng(0).standard_normal(8000)
    write_sources(place / "corpus", "train_clean", {f"c{i}": tone for i in range(8)}, shards=8)
    write_sources(place / "corpus", "train_noise", {"n0": noise})
    write_pairs(place / "corpus", "valid", {"v0": (tone + noise, tone)})
    return place


def sweep_file(place: Path, parameters: Mapping[str, Any], **more: Any) -> Path:
    """``configs/sweep.yaml`` with other parameters, and options of a training that is small."""
    content = yaml.safe_load((REPOSITORY / "configs" / "sweep.yaml").read_text())
    interpreter = content["command"][: content["command"].index("mvat_dist.trial") + 1]
    training = [
        "--sizes={tiny: {kind: small, hidden: 4, depth: 2}, mini: {kind: small, hidden: 4, depth: 2}}",
        f"--student={','.join(STUDENTS)}",
        f"--track.objective={OBJECTIVE}",
        "--track.every=1",
        "--track.examples=0",
        "--distil.method=none",
        "--data.train=corpus",
        "--data.reverb_probability=0",
        "--data.segment_seconds=0.25",
        "--data.workers=0",
        "--train.batch=2",
        "--train.validate_every=1000",
        "--train.save_every=1000",
        "--valid.clips=1",
        "--valid.best=si_sdr",
    ]
    content |= {"command": [*interpreter, *training, "${args}"], "parameters": dict(parameters), **more}
    content["metric"] = {"name": "valid/si_sdr", "goal": "maximize"}
    file = place / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def environment(**more: str) -> dict[str, str]:
    """That of a user in an activated environment, without an account."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return {**clean, "PYTHONPATH": str(REPOSITORY), "NETRC": "/nowhere", **more}
