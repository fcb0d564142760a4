"""How much faster scoring is with several processes, and whether a network at work holds them up.

    python benchmarks/scoring.py --processes 2

Every figure is the ratio of two durations that were measured in this run, on a machine with nothing else to
do: one process against several; and several beside a source that takes as long for a pair as they do, which
in the best case costs nothing and in the worst case twice the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.pool import available_cores
from mvat_dist.evaluation.scorer import Pair, score_pairs

METRICS = ["pesq_wb", "segsnr", "csig"]
SECONDS = 8.0


def main() -> None:
    """Score the same clips in three ways, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=available_cores())
    parser.add_argument("--clips", type=int, default=60)
    arguments = parser.parse_args()
    clips = [_pair(seed) for seed in range(arguments.clips)]
    alone = _duration(iter(clips), 1)
    together = _duration(iter(clips), arguments.processes)
    beside = _duration(_slowly(clips, together / len(clips)), arguments.processes)
    print(f"{arguments.processes} processes are {alone / together:.2f} times as fast as one")
    print(f"beside a source as slow as they are, they take {beside / together:.2f} times as long")


def _pair(seed: int) -> Pair:
    generator = np.random.default_rng(seed)
    samples = round(SECONDS * SAMPLE_RATE)
    clean = generator.standard_normal(samples) * (np.sin(np.arange(samples) / 2000) > 0)
    return Pair(clean + 0.3 * generator.standard_normal(samples), clean)


def _slowly(clips: list[Pair], seconds: float) -> Iterator[Pair]:
    for clip in clips:
        time.sleep(seconds)
        yield clip


def _duration(clips: Iterator[Pair], processes: int) -> float:
    started = time.perf_counter()
    score_pairs(clips, METRICS, processes=processes)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
