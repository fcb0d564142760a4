"""Export a network: write each format, read it back, and keep it if it computes what the network does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.clips import Clip
from mvat_dist.errors import UserError
from mvat_dist.inference import graph
from mvat_dist.inference.graph import Run, run_torch
from mvat_dist.inference.model_card import Exported, card
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.inference.provenance import fingerprint_of
from mvat_dist.io import atomic_file, fsync, make_folder, scratch_directory, write_text
from mvat_dist.models import weights
from mvat_dist.models.weights import LoadedModel

FP32_BOUND = 1e-4
"""Largest difference from the network, relative to the peak of its output: -80 dB."""
FP16_BOUND = 1e-2
"""For weights with 11 bits."""


@dataclass(frozen=True)
class Subject:
    """The network to export, its description, and the clips to check the files on."""

    loaded: LoadedModel
    about: Mapping[str, str]
    clips: Sequence[Clip]

    def difference(self, exported: Run, bound: float) -> str:
        """Say how far an exported file's output is from the network's.

        Raises:
            UserError: further than `bound`.
        """
        reference = run_torch(self.loaded.model)
        error = largest_error(exported, reference, probes([clip.noisy for clip in self.clips]))
        verdict = f"differs by at most {error:.1e} of the output's peak"
        if error > bound:
            raise UserError(f"{verdict}, more than {bound:g}")
        return f"{verdict} (bound {bound:g})"


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    suffix: str
    kind: str
    make: Callable[[Subject, Path], str]
    """Writes a file, reads it back, compares it with the network and says how they differ.

    Raises `UserError` where they differ too much.
    """


def _safetensors(subject: Subject, file: Path) -> str:
    return _weights(subject, file, torch.float32, 0.0)


def _fp16(subject: Subject, file: Path) -> str:
    return _weights(subject, file, torch.float16, FP16_BOUND)


def _weights(subject: Subject, file: Path, dtype: torch.dtype, bound: float) -> str:
    loaded = subject.loaded
    # BatchNorm's statistics stay float32: variances exceed the range of 16 bits, and there are few.
    parameters = {name: value.detach().to(dtype) for name, value in loaded.model.named_parameters()}
    state = loaded.model.state_dict() | parameters
    size, about = loaded.model.size, subject.about
    weights.save(file, state, name=loaded.name, size=size, step=loaded.step, about=about)
    return subject.difference(run_torch(weights.load(file).model), bound)


def _torchscript(subject: Subject, file: Path) -> str:
    graph.save_torchscript(subject.loaded.model, file, subject.about["sha256"])
    return subject.difference(graph.load_torchscript(file), FP32_BOUND)


def _onnx(subject: Subject, file: Path) -> str:
    # ONNX has no other place for the name and the rate than its metadata.
    about = {**subject.about, "name": subject.loaded.name, "sample_rate": str(SAMPLE_RATE)}
    graph.save_onnx(subject.loaded.model, file, about)
    return subject.difference(graph.load_onnx(file), FP32_BOUND)


FORMATS = {
    "safetensors": Format(".safetensors", "weights, fp32, with origin and scores", _safetensors),
    "fp16": Format(".fp16.safetensors", "weights, fp16", _fp16),
    "torchscript": Format(".pt", "TorchScript, BatchNorm folded", _torchscript),
    "onnx": Format(".onnx", "ONNX, BatchNorm folded", _onnx),
}


def export(subject: Subject, names: Sequence[str], out: Path) -> list[Exported]:
    """Write the formats called `names` and the model card into `out`; drop a file that fails its check.

    Where a format is not kept, the file of an earlier export is removed too. Nothing in `out` changes before
    all files, the card included, are complete.

    Raises:
        UserError: a folder is in the place of a file.
    """
    targets = [out / (subject.loaded.name + FORMATS[name].suffix) for name in names]
    card_path = out / f"{subject.loaded.name}.md"
    if taken := [str(place) for place in (*targets, card_path) if place.is_dir()]:
        raise UserError(f"a folder is in the place of {', '.join(taken)}: move it, or choose another --out")
    make_folder(out)
    with scratch_directory(out, "export") as staged:
        bar = tqdm(names, unit="file", desc="exporting")
        files = [_write_checked(subject, FORMATS[name], staged) for name in bar]
        text = card(subject.loaded, subject.about, files)
        for exported in files:
            if exported.kept:
                (staged / exported.file).replace(out / exported.file)
            else:
                (out / exported.file).unlink(missing_ok=True)
        fsync(out)
    write_text(card_path, text)
    return files


def _write_checked(subject: Subject, kind: Format, folder: Path) -> Exported:
    """Write one file into `folder` if it passes its check."""
    target = folder / (subject.loaded.name + kind.suffix)
    try:
        with atomic_file(target) as temporary, scratch_directory(folder, "making") as scratch:
            # Readers go by the ending, so the file has its own name, in a folder that a failure removes.
            file = scratch / target.name
            check = kind.make(subject, file)
            size = file.stat().st_size
            file.replace(temporary)
        return Exported(target.name, kind.kind, size, check)
    except UserError as refusal:
        return Exported(target.name, kind.kind, 0, str(refusal), kept=False)


def outdated(subject: Subject, names: Sequence[str], out: Path) -> Iterator[str]:
    """Name the files of earlier exports, in formats other than `names`, that hold other weights."""
    for file in (out / (subject.loaded.name + FORMATS[name].suffix) for name in FORMATS if name not in names):
        if file.is_file() and (sha256 := fingerprint_of(file)) != subject.about["sha256"]:
            reason = (
                f"is of other weights (SHA-256 {sha256})" if sha256 else "does not say of which weights it is"
            )
            yield f"{file}, of an earlier export, {reason}: remove it or export it again"


def probes(clips: Sequence[Audio]) -> Iterator[Audio]:
    """Inputs (B, T) of real audio to compare on, with lengths and batches that no trace has seen.

    They are every clip by itself, all clips as one batch of the shortest length, and short cuts of the first
    clip, down to one sample.
    """
    for clip in clips:
        yield clip[None]
    shortest = min(clip.size for clip in clips)
    yield np.stack([clip[:shortest] for clip in clips])
    middle = clips[0][clips[0].size // 2 :]
    for samples in (1, 2, 339, 4001, 16_000):
        yield middle[None, :samples]


def largest_error(exported: Run, reference: Run, inputs: Iterable[Audio]) -> float:
    """Largest difference of any sample, relative to the peak of the network's output for that input.

    Raises:
        UserError: a shape that differs, or an output that is not finite.
    """
    worst = 0.0
    for noisy in inputs:
        expected, estimate = reference(noisy), exported(noisy)
        if estimate.shape != expected.shape or not np.isfinite(estimate).all():
            raise UserError(f"maps {noisy.shape} to {estimate.shape}, or to values that are not finite")
        peak = max(float(np.abs(expected).max()), 1e-4)  # -80 dB: nothing is heard below that
        worst = max(worst, float(np.abs(estimate - expected).max()) / peak)
    return worst
