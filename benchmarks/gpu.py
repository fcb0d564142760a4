"""What a GPU makes of the students: right results, speed beside its peak, memory, where the time goes.

    make gpu
    python -m benchmarks.gpu --device cpu --tiny    # the same path on a CPU; its figures mean nothing

FLOPs are counted (`torch.utils.flop_counter`: matrix products, convolutions, attention; forward and
backward), the peak is the best of some large matrix products measured in the same run. Writes
docs/results/DATE-gpu.md on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE, Config, DistilConfig, LossConfig
from mvat_dist.config.sizes import Size
from mvat_dist.data.batch import Batch, TeacherTargets
from mvat_dist.distributed.device import Precision
from mvat_dist.distributed.process_group import init_distributed
from mvat_dist.distributed.ranks import export, read
from mvat_dist.errors import EXIT_USER_ERROR
from mvat_dist.io import write_text
from mvat_dist.losses.objective import Objective
from mvat_dist.models import weights
from mvat_dist.models.manner import Manner
from mvat_dist.training.engine import StudentEngine, deepspeed_config
from mvat_dist.training.schedule import Schedule
from mvat_dist.training.students import Student, StudentGroup
from mvat_dist.training.teacher import LiveTeacher
from mvat_dist.training.throughput import Stopwatch, clock_of

TINY = {"one": Size("base", 6, depth=2), "two": Size("small", 4, depth=3)}
KINDS = {  # in this order: the first that matches
    "attention": ("attention", "flash", "fmha"),
    "convolution": ("conv",),
    "matrix product": ("mm", "linear", "matmul", "addmm"),
    "normalisation": ("norm",),
    "transform": ("fft", "stft"),
    "copy": ("copy", "cat", "memcpy", "memset", "fill", "zero"),
    "optimiser": ("foreach", "fused_adam", "adam"),
    "reduction": ("sum", "mean", "amax", "max", "reduce"),
}
COUNTED = ("attention", "convolution", "matrix product")


class Bench:
    """One run on one device."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.tiny: bool = arguments.tiny
        self.sizes = TINY if self.tiny else sizes.select("all")
        self.teacher = Size("base", 8, depth=2) if self.tiny else sizes.get("manner-b")
        self.samples = 8000 if self.tiny else 4 * SAMPLE_RATE
        self.batch = 1 if self.tiny else arguments.batch
        self.repeats = 2 if self.tiny else 10
        generator = torch.Generator().manual_seed(0)
        self.clean = (0.05 * torch.randn(self.batch, self.samples, generator=generator)).to(self.device)
        self.noisy = self.clean + 0.05 * torch.randn(self.batch, self.samples, generator=generator).to(
            self.device
        )

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median of a piece of work, with the device's queue empty before and after."""
        times = []
        for _ in range(self.repeats + 2):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest of some square matrix products."""
        found = 0.0
        for side in (256,) if self.tiny else (4096, 8192, 16384):
            a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            found = max(found, 2 * side**3 / self.seconds(lambda a=a, b=b: a @ b))  # type: ignore[misc]
        return found

    @contextmanager
    def memory(self) -> Iterator[list[float]]:
        """Fills a list with the block's peak in gigabytes, beyond what was there before; 0 on a CPU."""
        found: list[float] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        yield found
        found.append(
            (torch.cuda.max_memory_allocated() - before) / 1e9 if self.device.type == "cuda" else 0.0
        )

    def network(self, size: Size) -> Manner:
        """Fresh weights, the same every time."""
        torch.manual_seed(0)
        return Manner(size).to(self.device)


def flops(work: Callable[[], Any]) -> float:
    """Counted FLOPs of a piece of work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def snr(actual: Tensor, expected: Tensor) -> float:
    """Decibels by which `expected` is above the error; higher is better."""
    error = (actual.double().cpu() - expected.double().cpu()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum().cpu() / error.clamp(min=1e-300)))


def correctness(bench: Bench) -> list[dict[str, Any]]:
    """Output and gradient of every network against float64 on the CPU, in dB; higher is better."""
    rows = []
    noisy = bench.noisy[:1, : min(bench.samples, SAMPLE_RATE)]
    for name, size in {**bench.sizes, "teacher": bench.teacher}.items():
        exact = _result(bench.network(size).cpu().double(), noisy.cpu().double())
        row: dict[str, Any] = {"network": name}
        ways: list[tuple[str, nn.Module, bool]] = [
            ("fp32", bench.network(size), False),
            ("bf16", bench.network(size), True),
        ]
        if not bench.tiny or name == "one":  # tracing takes seconds
            compiled = torch.compile(bench.network(size), backend="eager" if bench.tiny else "inductor")
            ways.append(("compiled fp32", compiled, False))  # type: ignore[arg-type]
        for way, network, half in ways:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
                found = _result(network, noisy)
            row |= {
                f"{way} output dB ^": snr(found[0], exact[0]),
                f"{way} gradient dB ^": snr(found[1], exact[1]),
            }
        rows.append(row)
    return rows


def _result(network: nn.Module, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """(output, all gradients joined) of a training pass."""
    output = network.train()(noisy)
    network.zero_grad()
    output.float().square().mean().backward()
    return output.detach(), torch.cat(
        [one.grad.flatten() for one in network.parameters() if one.grad is not None]
    )


def build(bench: Bench, precision: Precision) -> StudentGroup:
    """All students beside the teacher, as the trainer makes them."""
    config = Config()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.safetensors"
        weights.save(file, bench.network(bench.teacher).state_dict(), name="t", size=bench.teacher, step=0)
        teacher = LiveTeacher(file, bench.device, precision)
    students, stopwatch = [], Stopwatch(clock_of(bench.device))
    for name, size in bench.sizes.items():
        engine_config = deepspeed_config(
            config.engine,
            config.optim,
            parameters=sizes.parameters(size),
            micro_batch=bench.batch,
            accumulation=1,
            precision=precision,
        )
        engine = StudentEngine(bench.network(size), engine_config, config.optim, bench.device)
        engine.module.train()
        shares_blocks = set(size.blocks()) & set(bench.teacher.blocks())
        distil = DistilConfig(method="mvat" if shares_blocks else "none")
        objective = Objective(distil, size, bench.teacher)
        students.append(Student(name, size, engine, objective, stopwatch))
    teacher.select({key for student in students for key in student.objective.keys}, output=False)
    schedule = Schedule(config.train.steps, config.optim, config.distil, config.loss)
    return StudentGroup(students, teacher, schedule, config.loss, stopwatch)


def speed(bench: Bench, precision: Precision, peak: float) -> list[dict[str, Any]]:
    """Teacher's forward, every student's step and the group's: segments a second and share of the peak."""
    batch = Batch(bench.noisy, bench.clean, [])
    group = build(bench, precision)
    teacher = group.teacher
    assert teacher is not None
    works: dict[str, Callable[[], Any]] = {"teacher's forward": lambda: teacher(batch)}
    for student in group.students:
        fixed: Any = _FixedTeacher(teacher(batch))
        alone = StudentGroup([student], fixed, group.schedule, LossConfig(), group.stopwatch)
        works[student.name] = _step(alone, batch)
    works["group"] = _step(group, batch)
    rows = []
    for name, work in works.items():
        counted = flops(work)
        with bench.memory() as gigabytes:
            seconds = bench.seconds(work)
        rows.append(
            {
                "work": name,
                "ms v": 1000 * seconds,
                "segments/s ^": bench.batch / seconds,
                "TFLOP": counted / 1e12,
                "share of peak ^": counted / seconds / peak,
                "GB above v": gigabytes[0],
            }
        )
    return rows


class _FixedTeacher:
    """A teacher whose targets are at hand."""

    def __init__(self, targets: TeacherTargets) -> None:
        self._targets = targets

    def __call__(self, batch: Batch) -> TeacherTargets:
        del batch
        return self._targets


def _step(group: StudentGroup, batch: Batch) -> Callable[[], Any]:
    """A step of the group, whatever its students have done before."""
    return lambda: group.train_step([batch], group.students[0].progress.steps)


def profiled(bench: Bench, precision: Precision, peak: float) -> tuple[list[dict[str, Any]], float]:
    """Where the device's time of a group's step goes; the share of the peak in what FLOPs are counted of."""
    batch, group = Batch(bench.noisy, bench.clean, []), build(bench, precision)
    work = _step(group, batch)
    work()
    counted = flops(work)
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        work()
    spent: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.key.startswith(("aten::", "fused", "void", "nvjet", "cudnn", "sm")) or on_gpu:
            spent[kind_of(event.key)] += micros / 1e6
    total = sum(spent.values())
    rows = [
        {"kind": kind, "ms v": 1000 * seconds, "share": seconds / total}
        for kind, seconds in sorted(spent.items(), key=lambda item: -item[1])
    ]
    in_counted = sum(spent[kind] for kind in COUNTED)
    return rows, counted / in_counted / peak if in_counted else 0.0


def kind_of(kernel: str) -> str:
    """What sort of work a profiler's name stands for."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise")


def report(bench: Bench, command: str) -> str:
    """Everything, as Markdown."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "a CPU: figures mean nothing"
    precisions: tuple[Precision, ...] = ("fp32",) if bench.device.type == "cpu" else ("fp32", "bf16")
    lines = [
        f"# The students on {name}",
        f"`{command}`, torch {torch.__version__}, batch {bench.batch} x {bench.samples / SAMPLE_RATE:g} s; "
        "^ higher is better, v lower.",
        "## Right results",
        "Against float64 on a CPU, one pass in train mode: dB of output and of all gradients.",
        _table(correctness(bench)),
    ]
    for precision in precisions:
        peak = bench.peak(torch.bfloat16 if precision == "bf16" else torch.float32)
        rows, share = profiled(bench, precision, peak)
        lines += [
            f"## {precision}: measured matrix peak {peak / 1e12:.3g} TFLOP/s",
            _table(speed(bench, precision, peak)),
            f"A group's step by kernels; {', '.join(COUNTED)}: {100 * share:.1f} % of the peak.",
            _table(rows),
        ]
    return "\n\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    arguments = _parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here, nothing was measured", file=sys.stderr)
        return EXIT_USER_ERROR
    export(read({}))
    bench = Bench(arguments)
    init_distributed(bench.device, timedelta(minutes=5))
    try:
        text = report(bench, "make gpu" if not argv else f"python -m benchmarks.gpu {' '.join(argv)}")
    finally:
        torch.distributed.destroy_process_group()
    print(text)
    if bench.device.type == "cuda" and not bench.tiny:
        write_text(arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-gpu.md", text)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The students on a GPU.", epilog="example: python -m benchmarks.gpu --batch 16"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, short segments, nothing written")
    parser.add_argument("--batch", type=int, default=8, help="segments of 4 s (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
