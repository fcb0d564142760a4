"""Fits `mvat_dist.launch.cost_model` to this machine, checks it on what it has not seen, and looks ahead.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --write machine.json      # for `submit --dry-run --machine machine.json`
    python -m benchmarks.scaling --simulate machine.json   # 4, 64 and 512 such nodes; nothing is measured
    python -m benchmarks.scaling --simulate                # the same, with the default rates

The real fleet trains on 1, 2 and 4 processes for the fit. What the fit has not seen is the check: 3
processes, and other students on 2 with other segments. Run it on a machine that is doing nothing else: these
are wall times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from tabulate import tabulate

from benchmarks.fleet import CPU, build_fleet
from benchmarks.processes import measured_by
from mvat_dist.config import sizes as students
from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.data.batch import Batch
from mvat_dist.distributed.process_group import init_distributed
from mvat_dist.distributed.ranks import export, read
from mvat_dist.io import write_text
from mvat_dist.launch import cost_model, forecast
from mvat_dist.launch import processes as launch
from mvat_dist.launch.cost_model import Machine, Rate, Work
from mvat_dist.models import weights
from mvat_dist.models.manner import Manner
from mvat_dist.training.teacher import LiveTeacher

FITTED, HELD_OUT = (1, 2, 4), 3
OTHER: dict[str, Any] = {"students": "manner-s-8.1gf,manner-s-0.6gf", "batch": 3, "seconds": 2.0}
"""Another fleet, held out as well: of sizes, a batch and a length that are not in the fit."""
OTHER_PROCESSES = 2
SMALL, LARGE = 1_000, 4_000_000
"""Floats of the two messages from whose times latency and bandwidth follow."""


def main() -> None:
    """Measure, fit, check and simulate; or as one of the measured processes be measured."""
    arguments = _parse()
    if arguments.measured:
        _measured(arguments)
        return
    if arguments.simulate is not None:
        _simulate(Machine.read(Path(arguments.simulate)) if arguments.simulate else Machine())
        return
    found = {processes: _run(arguments, processes) for processes in (*FITTED, HELD_OUT)}
    other = argparse.Namespace(**{**vars(arguments), **OTHER})
    machine = _fit(arguments, found)
    print(machine.to_json())
    checks = [
        _compared(arguments, machine, processes, one, "held out" if processes == HELD_OUT else "fitted")
        for processes, one in sorted(found.items())
    ]
    unseen = _run(other, OTHER_PROCESSES)
    checks.append(_compared(other, machine, OTHER_PROCESSES, unseen, "held out: other students, 3 x 2 s"))
    print(tabulate(checks, headers="keys", tablefmt="github", floatfmt=".3g"))
    if arguments.write:
        write_text(arguments.write, machine.to_json())
    _simulate(machine)


def _work(arguments: argparse.Namespace, processes: int) -> Work:
    """What the measured processes did: as many segments each, whatever their number."""
    return Work(
        students=tuple(students.select(arguments.students).values()),
        teacher=students.get(arguments.teacher),
        samples=round(arguments.seconds * SAMPLE_RATE),
        batch=processes * arguments.batch,
        micro_batch=arguments.batch,
        steps=1,
        readers=1,
        shards=10**6,
        save_every=10**12,
        validate_every=10**12,
    )


def _fit(arguments: argparse.Namespace, found: dict[int, dict[str, Any]]) -> Machine:
    alone, sizes = found[1], students.select(arguments.students)
    samples = round(arguments.seconds * SAMPLE_RATE)
    base = Machine(name=arguments.name, cores=launch.cores(), loss=0.0)
    learning = {
        name: (alone["sections"][f"forward/{name}"] + alone["sections"][f"backward/{name}"]) / arguments.batch
        for name in sizes
    }
    forward = {**alone["forwards"], arguments.teacher: alone["sections"]["teacher"] / arguments.batch}
    # Losses are in what was measured: a constant of the fit, per second of audio.
    rate, constant = _rate({students.get(name): seconds for name, seconds in learning.items()}, samples)
    forward_rate, _ = _rate({students.get(name): seconds for name, seconds in forward.items()}, samples)
    parameters = sum(students.parameters(size) for size in sizes.values())
    crowded = (_computing(found[2]) / _computing(alone) - 1) if base.cores > 1 else 0.0
    latencies, bandwidths = zip(
        *(_messages(found[count], count) for count in FITTED if count > 1), strict=True
    )
    return replace(
        base,
        learning=rate,
        forward=forward_rate,
        loss=constant / arguments.seconds,
        call=0.0,
        update=alone["sections"]["optimiser"] / parameters,
        crowding=max(0.0, crowded),
        jitter=statistics.median(one["jitter"] for one in found.values()),
        latency=statistics.median(latencies),
        bandwidth=statistics.median(bandwidths),
        saving=alone["saving"],
    )


def _rate(seconds: dict[students.Size, float], samples: int) -> tuple[Rate, float]:
    """Least squares with no negative rate, of relative errors; and seconds that every network takes alike."""
    rows = np.array([[students.macs(size, samples), students.values(size, samples), 1.0] for size in seconds])
    times = np.array(list(seconds.values()))
    scale = rows.max(0)
    fitted, _ = nnls(rows / scale / times[:, None], np.ones(len(times)))
    per_mac, per_value, constant = (fitted / scale).tolist()
    return Rate(per_mac, per_value), constant


def _computing(found: dict[str, Any]) -> float:
    kinds = ("teacher", "targets", "forward", "backward")
    return sum(s for name, s in found["sections"].items() if name.partition("/")[0] in kinds)


def _messages(found: dict[str, Any], processes: int) -> tuple[float, float]:
    """(latency, bandwidth) of a ring from the times of a small and a large message."""
    rounds = 2 * (processes - 1)
    slope = max(1e-12, (found["large"] - found["small"]) / rounds)
    return found["small"] / rounds, 4 * (LARGE - SMALL) / processes / slope


def _compared(
    arguments: argparse.Namespace, machine: Machine, processes: int, found: dict[str, Any], what: str
) -> dict[str, Any]:
    """A row: the step that was measured, and its forecast."""
    forecasted = cost_model.step(_work(arguments, processes), machine, processes, processes).seconds
    error = 100 * (forecasted / found["step"] - 1)
    return {
        "processes": processes,
        "": what,
        "measured s": found["step"],
        "forecast s": forecasted,
        "error %": error,
    }


def _simulate(machine: Machine) -> None:
    """All students on 4, 64 and 512 nodes of such processes, and what ends their growth."""
    print(f"\nall students, live manner-b, {machine.name}, one process a node; no such cluster was measured")
    config = Config()
    for batch in (64, 512):
        config.train.batch, config.train.steps = batch, 300_000
        fleet = forecast.Fleet(config, students.get("manner-b"), 4096, machine)
        for nodes in (4, 64, 512):
            print(f"\nbatch {batch}, {nodes} nodes")
            print(forecast.table(fleet.options(nodes, 1)))
        for kind, teacher in (("live", students.get("manner-b")), ("no teacher", None)):
            where, why = forecast.breaking_point(Work.of(config, teacher, 4096), machine, 1)
            print(f"batch {batch}, {kind}: breaks first at {where} nodes: {why}")


def _run(arguments: argparse.Namespace, processes: int) -> dict[str, Any]:
    """What so many fresh processes measure."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--measured", f"--students={arguments.students}"]
    command += [f"--{key}={getattr(arguments, key)}" for key in ("teacher", "batch", "seconds", "steps")]
    return measured_by(command, processes)


def _measured(arguments: argparse.Namespace) -> None:
    """Train some steps and print, as JSON, where the time of a step went."""
    torch.set_num_threads(1)
    export(read())
    init_distributed(CPU, timedelta(minutes=10))
    samples = round(arguments.seconds * SAMPLE_RATE)
    clean = 0.05 * torch.randn(arguments.batch, samples)
    batch = Batch(clean + 0.05 * torch.randn_like(clean), clean, [])
    with tempfile.TemporaryDirectory(prefix="scaling ") as place:
        file, size = Path(place) / "model.safetensors", students.get(arguments.teacher)
        torch.manual_seed(0)
        weights.save(file, Manner(size).state_dict(), name=arguments.teacher, size=size, step=0)
        fleet = build_fleet(list(students.select(arguments.students)), LiveTeacher(file, CPU, "fp32"))
        fleet.step([batch], 0)
        fleet.stopwatch.lap()
        durations, sections = [], []
        for step in range(1, arguments.steps + 1):
            fleet.step([batch], step)
            elapsed, shares = fleet.stopwatch.lap()
            durations.append(elapsed)
            sections.append({name: share * elapsed for name, share in shares.items()})
        found: dict[str, Any] = {
            "step": statistics.median(durations),
            "jitter": statistics.pstdev(durations) / statistics.mean(durations),
            "sections": {name: statistics.median(one[name] for one in sections) for name in sections[0]},
            "small": _message(SMALL),
            "large": _message(LARGE),
        }
        if torch.distributed.get_world_size() == 1:
            found["forwards"] = {student.name: _forward(student.size, batch) for student in fleet.students}
            found["saving"] = _saving(Path(place) / "checkpoint")
    print(json.dumps(found))
    torch.distributed.destroy_process_group()


def _message(floats: int) -> float:
    """Seconds of an all-reduce."""
    data, times = torch.zeros(floats), []
    for _ in range(6):
        torch.distributed.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(data)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@torch.no_grad()
def _forward(size: students.Size, batch: Batch) -> float:
    """Seconds of a network's forward per segment."""
    network, times = Manner(size).eval(), []
    for _ in range(4):
        began = time.perf_counter()
        network(batch.noisy, return_views=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) / len(batch.noisy)


def _saving(file: Path) -> float:
    """Bytes per second of writing and flushing a file."""
    content = os.urandom(50_000_000)
    began = time.perf_counter()
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    return len(content) / (time.perf_counter() - began)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fit the cost model to this machine.",
        epilog="example: python -m benchmarks.scaling --write machine.json",
    )
    parser.add_argument("--students", default="manner-s-5.3gf,manner-s-3.1gf,manner-s-2.0gf,manner-s-0.9gf")
    parser.add_argument("--teacher", default="manner-b")
    parser.add_argument("--batch", type=int, default=2, help="segments of a process (default: 2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a segment (default: 1)")
    parser.add_argument("--steps", type=int, default=5, help="measured steps (default: 5)")
    parser.add_argument("--name", default="this machine", help="what forecasts call it")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the rates")
    simulate = "only look ahead, with these rates or the default ones"
    parser.add_argument("--simulate", nargs="?", const="", metavar="FILE", help=simulate)
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
