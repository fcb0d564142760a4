"""Save and load weights: one safetensors file that names its own architecture.

A training writes ``students/NAME/{best,last}/model.safetensors`` at every save. Checkpoints of the authors
(``.pth``) are read too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as serialise

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.config.sizes import Size
from mvat_dist.io import atomic_file
from mvat_dist.models import metadata
from mvat_dist.models.manner import Manner
from mvat_dist.models.pretrained import load_manner_checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode and where it came from."""

    name: str
    model: Manner
    step: int | None
    """Optimiser steps of its training; None where the file does not say."""
    about: Mapping[str, str] = field(default_factory=dict)
    """An exported file's statements on its origin (`inference.provenance`); empty for other files."""


def save(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    size: Size,
    step: int | None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write weights and BatchNorm buffers atomically to `path`, with `about` as further metadata."""
    header = {
        **(about or {}),
        "format": metadata.FORMAT,
        "name": name,
        "size": json.dumps(asdict(size)),
        "sample_rate": str(SAMPLE_RATE),
    }
    if step is not None:
        header["step"] = str(step)
    with atomic_file(path) as temporary:
        # As bytes, because a file that safetensors writes itself can be read by its owner alone.
        temporary.write_bytes(
            serialise({key: value.contiguous().cpu() for key, value in weights.items()}, header)
        )


def load(file: Path) -> LoadedModel:
    """The network in a model file; `mvat_dist.runs.weights.resolve` finds the file of a run.

    Raises:
        UserError: the file is damaged, or is something else.
    """
    description = metadata.read(file)
    if description is None:
        return LoadedModel(file.stem, load_manner_checkpoint(file), None)
    network = load_manner_checkpoint(file, description.size)
    return LoadedModel(description.name, network, description.step, description.about)


def fingerprint(model: Manner) -> str:
    """Hexadecimal SHA-256 of a network's weights and BatchNorm statistics."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
