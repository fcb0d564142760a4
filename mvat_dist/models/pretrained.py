"""Load MANNER weights, the authors' or ours, and infer the architecture from the shapes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mvat_dist.config.sizes import Kind, Size
from mvat_dist.errors import UserError
from mvat_dist.models.manner import Manner

WRAPPER_PREFIX = "module."
"""Prefix that DataParallel and DistributedDataParallel add to every key."""

# The authors' files hold the best PESQ beside the weights, which may be a numpy scalar. These are
# the harmless globals that its pickle names, the function under its old and its new module.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


def load_manner_checkpoint(source: str | Path | Mapping[str, Any], size: Size | None = None) -> Manner:
    """A network with the given weights, in float32, on the CPU and in eval mode.

    Args:
        source: a file written by torch (the authors' ``manner_*.pth``) or a ``.safetensors`` file, or
            the state dict itself; a dict that has it under ``state_dict`` will do.
        size: the architecture. Without it, kind, hidden, depth, chunk and kernel size are taken from
            the keys and shapes. The stride, which shows in no shape, is then half the kernel, and
            there is one head: several cannot be told from wider ones.

    Raises:
        UserError: there is no such file, it is something else, it belongs to another architecture,
            or its weights are not finite.
    """
    if isinstance(source, Mapping):
        name, content = "the state dict", source
    else:
        name, content = str(source), _read(Path(source))
    state = _state_dict(name, content)
    size = size or _infer_size(name, state)
    with torch.device("meta"):  # spend no time and no random numbers on weights that are replaced
        model = Manner(size)
    _check(name, state, model.state_dict())
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    if kind := _graph(path):
        raise UserError(
            f"{path}: this is an exported {kind} file: give the .safetensors beside it, or the run"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            # Mapped: the optimiser's state, twice as large as the weights, is never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise UserError(f"{path}: not a checkpoint that torch or safetensors can read safely") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds {type(content).__name__} instead of a dict of weights")
    return content


def _graph(path: Path) -> str:
    """The kind of an exported graph, which has no weights by name; empty for any other file."""
    if path.suffix == ".onnx":
        return "ONNX"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch itself recognises one by this file.
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""
    return "TorchScript" if scripted else ""


def _state_dict(name: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = content.get("state_dict", content)
    if not isinstance(inner, Mapping) or not inner:
        raise UserError(f"{name}: holds no weights")
    state = {str(key).removeprefix(WRAPPER_PREFIX): value for key, value in inner.items()}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{name}: not a MANNER checkpoint, {key!r} is {type(value).__name__}, not a tensor"
            )
    return state


def _infer_size(name: str, state: Mapping[str, Tensor]) -> Size:
    def shape(key: str, dimensions: int) -> torch.Size:
        key = f"manner_block.{key}"
        if key not in state:
            raise UserError(f"{name}: not a MANNER checkpoint, {key!r} is missing")
        if state[key].ndim != dimensions:
            raise UserError(f"{name}: not a MANNER checkpoint, {key!r} has shape {tuple(state[key].shape)}")
        return state[key].shape

    depth = len({key.split(".")[2] for key in state if key.startswith("manner_block.encoder.")})
    hidden, _, kernel_size = shape("encoder.0.down_conv.0.weight", 3)
    token, chunk = shape(f"encoder.{depth - 1}.attn_block.global_attn.w_qs.weight", 2)
    if token != chunk:
        raise UserError(f"{name}: has several attention heads; say which architecture it has")
    has_first_block = any(key.startswith("manner_block.encoder.0.attn_block.") for key in state)
    kind: Kind = "base" if has_first_block else "small"
    return Size(kind, hidden, depth, chunk, kernel_size, stride=max(1, kernel_size // 2))


def _check(name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    shared = [key for key in expected if key in state]
    for wrong, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
        ("of another shape", [key for key in shared if state[key].shape != expected[key].shape]),
        ("not finite", [key for key in shared if not state[key].isfinite().all()]),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{name}: not a usable MANNER checkpoint, {wrong}: {keys[0]!r}{more}")
