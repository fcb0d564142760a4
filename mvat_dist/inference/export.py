"""A network as one traced graph for any batch and length, and how exported files are checked.

TorchScript files and ONNX files (`inference.onnx_file`) come from the same trace. It is TorchScript's
and not `torch.export`'s because a trace keeps every length symbolic, from one sample on, where
`torch.export` guards what it has seen of the lengths (torch 2.13).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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
    """``size.frames(samples)[0]`` in closed form: the shortest, and whole frames of the deepest level."""
    shortest, step = size.frames(1)[0], int(size.stride**size.depth)
    return shortest + _positive(samples - shortest + step - 1) // step * step


def _positive(length: int) -> int:
    """max(length, 0) without a comparison, whose outcome a trace would keep for all lengths."""
    return (length + abs(length)) // 2


def traced(model: Manner) -> torch.jit.ScriptModule:
    """The graph of `model`, its weights as constants: what is computed from them alone is done once."""
    graph = Traceable(folded(model)).eval()
    with quiet(), torch.no_grad():
        trace = torch.jit.trace(graph, (example(),), check_trace=False)  # type: ignore[no-untyped-call]
        frozen: torch.jit.ScriptModule = torch.jit.freeze(trace)
        return frozen


def save(model: Manner, file: Path, sha256: str = "") -> None:
    """Write `model` as a TorchScript file, a zip, in which ``extra/sha256`` says of which weights it is."""
    with quiet():
        torch.jit.save(traced(model), file, _extra_files={"sha256": sha256})


def run_torch(model: nn.Module) -> Run:
    """`model`, or a loaded TorchScript module, as a function of arrays."""

    @torch.inference_mode()
    def run(noisy: Audio) -> Audio:
        enhanced: Audio = model(torch.from_numpy(noisy)).numpy()
        return enhanced

    return run


def runner(file: Path) -> Run:
    """A TorchScript file as a function of arrays."""
    with quiet():
        return run_torch(torch.jit.load(file, map_location="cpu"))  # type: ignore[no-untyped-call]


def probes(clips: Sequence[Audio]) -> Iterator[Audio]:
    """Inputs (B, T) of real audio to compare on: lengths and batches that no trace has seen.

    Every clip whole; all of them cut to the length of the shortest, at once; and short cuts of the first,
    down to one sample.
    """
    for clip in clips:
        yield clip[None]
    shortest = min(clip.size for clip in clips)
    yield np.stack([clip[:shortest] for clip in clips])
    middle = clips[0][clips[0].size // 2 :]
    for samples in (1, 2, 339, 4001, 16_000):
        yield middle[None, :samples]


def largest_error(exported: Run, reference: Run, inputs: Iterable[Audio]) -> float:
    """Largest difference of any sample, relative to the peak of what the network makes of that input.

    Raises:
        UserError: a shape that differs, or an output that is not finite.
    """
    worst = 0.0
    for noisy in inputs:
        expected, found = reference(noisy), exported(noisy)
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise UserError(f"maps {noisy.shape} to {found.shape}, or to what is not finite")
        peak = max(float(np.abs(expected).max()), 1e-4)  # -80 dB: below that, nothing is heard
        worst = max(worst, float(np.abs(found - expected).max()) / peak)
    return worst


def example() -> Tensor:
    """What the graph is traced on: (2, 1 s and a sample) of noise."""
    return 0.1 * torch.randn(2, _TRACED_SAMPLES, generator=torch.Generator().manual_seed(0))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that torch's newer exporters should be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
