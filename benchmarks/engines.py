"""What ZeRO's stages and plain DDP cost networks of 1 to 25 M parameters, on one and two processes.

    python -m benchmarks.engines
    python -m benchmarks.engines --student manner-s-0.9gf --processes 2 --steps 10

Every way runs in fresh processes, which therefore have a peak memory of their own; CPU time bears a busy
machine better than wall time. A step is one student's forward, backward, reduction and update, without a
loss's spectra.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.processes import measured_by
from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE, EngineConfig, OptimConfig
from mvat_dist.distributed.process_group import init_distributed
from mvat_dist.distributed.ranks import export, read
from mvat_dist.models.manner import Manner
from mvat_dist.training.engine import StudentEngine, deepspeed_config

CPU = torch.device("cpu")
WAYS = {
    "plain (no reduction)": "plain",
    "plain DDP": "ddp",
    "stage 0, ours": "0",
    "stage 0, DeepSpeed's reduction": "deepspeed",
    "stage 1": "1",
    "stage 2": "2",
    "stage 3": "3",
    "stage 1, DeepSpeed's bucket of 5e8": "1-default",
}


def main() -> None:
    """Measure, or as one of the measured processes be measured."""
    arguments = _parse()
    if arguments.way:
        _measured(arguments)
        return
    for processes in arguments.processes:
        rows = {way: _run(arguments, way, processes) for way in _ways(processes)}
        _report(arguments, processes, rows)


def _ways(processes: int) -> list[str]:
    return [way for way in WAYS if processes > 1 or WAYS[way] not in {"ddp", "deepspeed"}]


def _report(arguments: argparse.Namespace, processes: int, rows: dict[str, dict[str, float]]) -> None:
    base = rows["plain (no reduction)"]
    parameters = sizes.parameters(sizes.get(arguments.student))
    print(f"\n{processes} processes, {arguments.student} ({parameters / 1e6:.2f} M parameters)")
    table = [
        {
            "way": way,
            "step ms v": 1000 * row["wall"],
            "CPU ms v": 1000 * row["cpu"],
            "CPU to plain v": row["cpu"] / base["cpu"],
            "peak MB above start v": row["memory"] / 1e6,
        }
        for way, row in rows.items()
    ]
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".3g"), flush=True)


def _run(arguments: argparse.Namespace, way: str, processes: int) -> dict[str, float]:
    """Median of a way's repeated measurements, in fresh processes each time."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.engines",
        f"--student={arguments.student}",
        f"--way={WAYS[way]}",
    ]
    command += [f"--steps={arguments.steps}", f"--seconds={arguments.seconds}", f"--batch={arguments.batch}"]
    runs = [measured_by(command, processes) for _ in range(arguments.repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _measured(arguments: argparse.Namespace) -> None:
    """Train and print what a step takes as JSON."""
    torch.set_num_threads(1)
    export(read())
    init_distributed(CPU, timedelta(minutes=5))
    torch.manual_seed(0)
    noisy = 0.1 * torch.randn(arguments.batch, round(arguments.seconds * SAMPLE_RATE))
    network = Manner(sizes.get(arguments.student)).train()
    before = _peak()
    step = _stepper(arguments.way, network, noisy)
    step()
    walls, processors = [], []
    for _ in range(arguments.steps):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    medians = {
        "wall": statistics.median(walls),
        "cpu": statistics.median(processors),
        "memory": _peak() - before,
    }
    print(json.dumps(medians))
    torch.distributed.destroy_process_group()


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _stepper(way: str, network: nn.Module, noisy: Tensor) -> Callable[[], None]:
    if way in {"plain", "ddp"}:
        return _without_deepspeed(network, noisy, reduced=way == "ddp")
    stage = 0 if way == "deepspeed" else int(way[0])
    optim = OptimConfig()
    count = sum(parameter.numel() for parameter in network.parameters())
    config: dict[str, Any] = deepspeed_config(
        EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
        optim,
        parameters=count,
        micro_batch=len(noisy),
        accumulation=1,
        precision="fp32",
    )
    if way.endswith("default"):
        config["zero_optimization"] |= {
            "reduce_bucket_size": 500_000_000,
            "allgather_bucket_size": 500_000_000,
        }
    engine = StudentEngine(network, config, optim, CPU)

    def step() -> None:
        engine.backward(engine(noisy, return_views=False).square().mean(), last=True)
        engine.wait_for_gradients()
        engine.step(lr=1e-3, beta1=0.9)

    def deepspeeds() -> None:
        engine._engine.backward(engine(noisy, return_views=False).square().mean())
        engine._engine.step()

    if way == "deepspeed":
        engine._engine.enable_backward_allreduce = True
        return deepspeeds
    return step


def _without_deepspeed(network: nn.Module, noisy: Tensor, *, reduced: bool) -> Callable[[], None]:
    module = nn.parallel.DistributedDataParallel(network) if reduced else network
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        module(noisy).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What ZeRO's stages and DDP cost a student.",
        epilog="example: python -m benchmarks.engines --processes 1 2",
    )
    parser.add_argument("--student", default="manner-s-5.3gf")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a segment (default: 1)")
    parser.add_argument("--batch", type=int, default=2, help="segments of a process (default: 2)")
    parser.add_argument("--steps", type=int, default=7, help="measured steps (default: 7)")
    parser.add_argument("--repeats", type=int, default=1, help="fresh starts of every way (default: 1)")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
