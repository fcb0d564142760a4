"""Files of earlier exports, under the name of a new one: do they hold the same weights?"""

from __future__ import annotations

import zipfile
from pathlib import Path

from mvat_dist.models import metadata


def sha256_of(file: Path) -> str:
    """Of which weights an exported file says that it is (`mvat_dist.models.weights.fingerprint`).

    Empty where it does not say: of another origin, damaged, or an ONNX file where ``onnx`` is not installed.
    """
    read = {".safetensors": _of_safetensors, ".pt": _of_torchscript, ".onnx": _of_onnx}[file.suffix]
    try:
        return read(file)
    except Exception:  # each of the formats has damages of its own
        return ""


def _of_safetensors(file: Path) -> str:
    description = metadata.read(file)
    return description.about.get("sha256", "") if description else ""


def _of_torchscript(file: Path) -> str:
    with zipfile.ZipFile(file) as archive:
        found = [name for name in archive.namelist() if name.endswith("/extra/sha256")]
        return archive.read(found[0]).decode("ascii") if found else ""


def _of_onnx(file: Path) -> str:
    import onnx

    graph = onnx.load(file, load_external_data=False)
    return next((one.value for one in graph.metadata_props if one.key == "sha256"), "")
