"""A network as one traced graph for any batch and length, written as a TorchScript or an ONNX file.

Both files come from the same trace. It is TorchScript's and not `torch.export`'s, because a trace keeps every
length symbolic, from one sample on, where `torch.export` adds guards on the lengths it has seen (torch 2.13).
ONNX files need the extra ``export``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.models.fold import folded
from mvat_dist.models.manner import NORMALISATION_EPS, Manner

Run = Callable[[Audio], Audio]
"""Maps noisy (B, T) to enhanced (B, T)."""

ONNX_OPSET = 17
"""Operators that onnxruntime 1.13 (2022) and later know."""

INPUT, OUTPUT = "noisy", "enhanced"
"""Names of an ONNX file's input and output, both (batch, time) float32."""

_TRACED_SAMPLES = SAMPLE_RATE + 1


class Traceable(nn.Module):
    """`Manner` with its arithmetic on lengths in a form that a trace keeps: no branch, no Python integer."""

    def __init__(self, model: Manner) -> None:
        super().__init__()
        self.size = model.size
        self.manner_block = model.manner_block

    def forward(self, noisy: Tensor) -> Tensor:
        """(B, T) -> (B, T), any B and T of 1 or more."""
        samples = noisy.shape[-1]
        deviations = noisy - noisy.mean(dim=-1, keepdim=True)
        freedom = 1 + _positive(samples - 2)
        deviation = (deviations.square().sum(dim=-1, keepdim=True) / freedom).sqrt()
        padding = padded_length(self.size, samples) - samples
        padded = F.pad(noisy / (NORMALISATION_EPS + deviation), (0, padding))
        estimate, _ = self.manner_block(padded.unsqueeze(1), False)
        enhanced: Tensor = deviation * estimate[:, 0, :samples]
        return enhanced


def padded_length(size: Size, samples: int) -> int:
    """``size.frames(samples)[0]`` in closed form: the shortest length, plus hops of the deepest level."""
    shortest, step = size.frames(1)[0], int(size.stride**size.depth)
    return shortest + _positive(samples - shortest + step - 1) // step * step


def _positive(length: int) -> int:
    """max(length, 0) without a comparison, whose outcome a trace would keep for all lengths."""
    return (length + abs(length)) // 2


def traced(model: Manner) -> torch.jit.ScriptModule:
    """The graph of `model` with its weights as constants: what depends on them alone is computed once."""
    graph = Traceable(folded(model)).eval()
    with quiet(), torch.no_grad():
        trace = torch.jit.trace(graph, (example(),), check_trace=False)  # type: ignore[no-untyped-call]
        frozen: torch.jit.ScriptModule = torch.jit.freeze(trace)
        return frozen


def save_torchscript(model: Manner, file: Path, sha256: str = "") -> None:
    """Write `model` as a TorchScript file, a zip whose ``extra/sha256`` is the fingerprint of the weights."""
    with quiet():
        torch.jit.save(traced(model), file, _extra_files={"sha256": sha256})


def run_torch(model: nn.Module) -> Run:
    """`model`, or a loaded TorchScript module, as a function of arrays."""

    @torch.inference_mode()
    def run(noisy: Audio) -> Audio:
        enhanced: Audio = model(torch.from_numpy(noisy)).numpy()
        return enhanced

    return run


def load_torchscript(file: Path) -> Run:
    """A TorchScript file as a function of arrays."""
    with quiet():
        return run_torch(torch.jit.load(file, map_location="cpu"))  # type: ignore[no-untyped-call]


def save_onnx(model: Manner, file: Path, about: Mapping[str, str]) -> None:
    """Write `model` as one ONNX file, with `about` as its metadata.

    Raises:
        UserError: the extra ``export`` is not installed.
    """
    onnx = _package("onnx")
    axes = {0: "batch", 1: "time"}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            traced(model),
            (example(),),
            str(file),
            dynamo=False,
            opset_version=ONNX_OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: axes, OUTPUT: axes},
        )
    graph = onnx.load(file)
    onnx.helper.set_model_props(graph, dict(about))
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, file)


def load_onnx(file: Path) -> Run:
    """An ONNX file as a function of arrays, run by onnxruntime on as many threads as torch uses.

    Raises:
        UserError: the extra ``export`` is not installed.
    """
    onnxruntime = _package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(noisy: Audio) -> Audio:
        enhanced: Audio = session.run(None, {INPUT: noisy})[0]
        return enhanced

    return run


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"needs the package {error.name}: pip install 'mvat_dist[export]'") from error


def example() -> Tensor:
    """The input that the graph is traced on: noise of shape (2, 1 s and one sample)."""
    return 0.1 * torch.randn(2, _TRACED_SAMPLES, generator=torch.Generator().manual_seed(0))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings that recommend torch's newer exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
