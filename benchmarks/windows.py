"""How far windows with cross-fades are from one pass over a long recording, and what that does to its scores.

    python benchmarks/windows.py --models runs/teacher runs/student --data shards/dns/test_no_reverb

Clips are joined to one recording, every second one 12 dB quieter, so that windows and the whole have other
levels. Every way of cutting it is compared with one pass: SI-SDR between the two outputs (the one pass is the
reference), mean SI-SDR and PESQ of the clips against the clean ones, and the time that it took over the time
of one pass.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.clips import Clip, ValidationClips
from mvat_dist.evaluation.metrics.registry import si_sdr
from mvat_dist.evaluation.scorer import Pair, score_pairs
from mvat_dist.inference import enhancer
from mvat_dist.inference.overlap_add import Audio
from mvat_dist.models import weights

QUIETER = 10 ** (-12 / 20)
HEADS = ["window s", "overlap s", "SI-SDR to one pass dB", "SI-SDR dB", "PESQ-WB", "time / one pass"]


def main() -> None:
    """Join, enhance in every way, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--data", required=True, help="as for ValidationClips")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--windows", type=float, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.5, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clips = [_quieter(clip) if at % 2 else clip for at, clip in enumerate(_clips(arguments))]
    noisy = np.concatenate([clip.noisy for clip in clips])
    print(f"{len(clips)} clips, {noisy.size / SAMPLE_RATE:.0f} s, of {arguments.data}")
    for path in arguments.models:
        model = enhancer.Enhancer(weights.load(path))
        whole, whole_time = _enhanced(model, noisy, noisy.size / SAMPLE_RATE, 1)
        rows = [["one pass", "-", "-", *_scores(whole, clips), 1.0]]
        for window in arguments.windows:
            for overlap in (one for one in arguments.overlaps if one < window / 2):
                pieces, seconds = _enhanced(model, noisy, window, overlap)
                agreement = si_sdr(pieces, whole).value
                rows.append([window, overlap, agreement, *_scores(pieces, clips), seconds / whole_time])
        print(
            f"\n{model.name} ({path})\n{tabulate(rows, HEADS, tablefmt='github', floatfmt='.3f')}", flush=True
        )


def _clips(arguments: argparse.Namespace) -> ValidationClips:
    return ValidationClips(arguments.data, limit=arguments.clips)


def _quieter(clip: Clip) -> Clip:
    return Clip(clip.key, QUIETER * clip.noisy, QUIETER * clip.clean)


def _enhanced(model: enhancer.Enhancer, noisy: Audio, window: float, overlap: float) -> tuple[Audio, float]:
    enhancer.WINDOW_SECONDS, enhancer.OVERLAP_SECONDS = window, overlap
    started = time.perf_counter()
    return model.enhance(noisy, SAMPLE_RATE), time.perf_counter() - started


def _scores(estimate: Audio, clips: list[Clip]) -> list[float]:
    """Mean SI-SDR and PESQ over the clips that have both."""
    ends = np.cumsum([clip.noisy.size for clip in clips])
    pairs = [Pair(part, clip.clean) for part, clip in zip(np.split(estimate, ends[:-1]), clips, strict=True)]
    scored = score_pairs(pairs, ["si_sdr", "pesq_wb"])
    return [
        float(np.mean([one[name].value for one in scored if one[name].value is not None]))
        for name in scored[0]
    ]


if __name__ == "__main__":
    main()
