"""What fewer bits cost in PESQ and save in time: a trained network in fp32 and bf16 on the same clips.

    python -m benchmarks.precision runs/teacher/students/teacher --data shards/dns --clips 40

One thread, CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.clips import Clip
from mvat_dist.data.test_sets import held_out
from mvat_dist.evaluation.scorer import Pair, score_pairs
from mvat_dist.inference import graph
from mvat_dist.inference.enhancer import Enhancer
from mvat_dist.inference.graph import Run
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.models import weights
from mvat_dist.models.weights import LoadedModel
from mvat_dist.runs import weights as weightsfile


def torch_run(loaded: LoadedModel, precision: str) -> Run:
    """The network as `mvat_dist.enhance` runs it."""
    network = Enhancer(loaded, precision="bf16" if precision == "bf16" else "fp32")
    return lambda noisy: network.enhance(noisy[0], SAMPLE_RATE)[None]


def runs(loaded: LoadedModel, folder: Path) -> dict[str, Run]:
    graph.save_onnx(loaded.model, folder / "full.onnx", {})
    return {
        "fp32": torch_run(loaded, "fp32"),
        "bf16": torch_run(loaded, "bf16"),
        "fp32, ONNX": graph.load_onnx(folder / "full.onnx"),
    }


def table(several: dict[str, Run], clips: Sequence[Clip]) -> str:
    """PESQ-WB, STOI and time of each, and how far PESQ lies from that of the first."""
    estimates: dict[str, list[Audio]] = {name: [] for name in several}
    seconds = dict.fromkeys(several, 0.0)
    for clip in clips:
        for name, run in several.items():
            before = time.process_time()
            estimates[name].append(run(clip.noisy[None])[0])
            seconds[name] += time.process_time() - before
    audio = sum(len(clip.noisy) for clip in clips) / SAMPLE_RATE
    exact = estimates["fp32"]
    base: np.ndarray | None = None
    lines = []
    for name, found in estimates.items():
        scores = score_pairs(
            [Pair(one, clip.clean) for one, clip in zip(found, clips, strict=True)], ["pesq_wb", "stoi"]
        )
        pesq = np.array([one["pesq_wb"].value for one in scores], float)
        stoi = np.array([one["stoi"].value for one in scores], float)
        base = pesq if base is None else base
        error = sum(np.sum((a - b) ** 2) for a, b in zip(found, exact, strict=True))
        snr = 10 * np.log10(sum(np.sum(b**2) for b in exact) / error) if error else np.inf
        worst = np.nanmax(np.abs(pesq - base))
        changed = np.nanmean(pesq - base)
        lines.append([name, snr, np.nanmean(pesq), changed, worst, np.nanmean(stoi), seconds[name] / audio])
    heads = ["", "SNR to fp32, dB", "PESQ-WB", "mean change", "largest", "STOI", "CPU s per s"]
    return tabulate(lines, heads, tablefmt="github", floatfmt=("", ".1f", ".3f", "+.4f", ".3f", ".4f", ".4f"))


def main() -> None:
    """Print the table of one network."""
    parser = argparse.ArgumentParser(
        description="PESQ and time of a trained network in fp32 and bf16.",
        epilog="example: python -m benchmarks.precision best.safetensors --data shards/dns --clips 40",
    )
    parser.add_argument("model", type=Path, help="a student's folder in a run, or a model file")
    parser.add_argument("--data", required=True, help="packed corpus; its test sets are used")
    parser.add_argument("--clips", type=int, default=40, help="clips to score (default: 40)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = weights.load(weightsfile.resolve(arguments.model, "best"))
    (clips, *_) = held_out(arguments.data, arguments.clips, 8.0).values()
    chosen = list(clips)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{loaded.name}, {len(chosen)} clips\n\n{table(runs(loaded, Path(folder)), chosen)}")


if __name__ == "__main__":
    main()
