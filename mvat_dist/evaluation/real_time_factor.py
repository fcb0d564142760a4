"""What a network costs to run: parameters, multiply-accumulates and measured time. Lower is better."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.config.sizes import COST_SECONDS, Size
from mvat_dist.models.fold import folded


@dataclass(frozen=True)
class Cost:
    """The cost of one network. Lower is better in all three."""

    parameters: int
    gmac_at_4_s: float
    """10^9 multiply-accumulates for one clip of `COST_SECONDS`."""
    real_time_factor: float
    """Processing time over audio duration of its inference form, on one thread of this machine."""


def cost(model: nn.Module, size: Size | None) -> Cost:
    """Count and measure `model`, on the CPU and in eval mode; without a size it multiplies no matrices."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = sizes.macs(size, round(COST_SECONDS * SAMPLE_RATE)) if size else 0
    return Cost(parameters, macs / 1e9, real_time_factor(folded(model)))


@torch.no_grad()
def real_time_factor(model: nn.Module, seconds: float = COST_SECONDS, runs: int = 5) -> float:
    """Processing time over audio duration of one pass over `seconds` of noise; below 1 keeps up with speech.

    Wall-clock median of `runs` passes on one CPU thread, after one that is not counted (it allocates
    and picks kernels). The whole clip is one pass, so this is throughput, not the latency of a stream.
    """
    samples = round(seconds * SAMPLE_RATE)
    noise = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    times = []
    with _one_thread():
        model(noise)
        for _ in range(runs):
            started = time.perf_counter()
            model(noise)
            times.append(time.perf_counter() - started)
    return statistics.median(times) / seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
