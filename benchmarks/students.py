"""What a group of students saves: k students in one group, against k plain jobs of their own.

    python -m benchmarks.students
    python -m benchmarks.students --rounds 1 --students manner-s-0.9gf,manner-s-0.6gf --seconds 1

Every round times, one after the other, the plain teacher, every student's plain step, and the group's step
with one, three and all students, with a live teacher and with its targets at hand. Results are medians over
rounds of ratios within a round, so that a busy machine slows both sides. Reading and mixing are left out: k
jobs do them k times.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.plain import PlainJob, enhance
from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE, Config, DistilConfig, EngineConfig
from mvat_dist.data.batch import Batch, TeacherTargets
from mvat_dist.distributed.process_group import init_distributed
from mvat_dist.distributed.ranks import export, read
from mvat_dist.losses.objective import Objective
from mvat_dist.models import weights
from mvat_dist.models.manner import Manner
from mvat_dist.training.engine import StudentEngine, deepspeed_config
from mvat_dist.training.schedule import Schedule
from mvat_dist.training.students import Student, StudentGroup
from mvat_dist.training.teacher import LiveTeacher
from mvat_dist.training.throughput import Stopwatch

CPU = torch.device("cpu")
SEGMENTS = 1_000_000
"""Segments of the training whose hours are reckoned."""


class Spent:
    """Wall and CPU seconds of this process and all its threads."""

    def __init__(self, work: Callable[[], object]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        work()
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - processor


class FixedTeacher:
    """A teacher whose targets have come with the batch."""

    def __init__(self, targets: TeacherTargets) -> None:
        self.targets = targets

    def __call__(self, batch: Batch) -> TeacherTargets:
        del batch
        return self.targets


def build_group(names: list[str], teacher: LiveTeacher) -> StudentGroup:
    """Students with fresh weights beside the teacher, as the trainer makes them."""
    config = Config(distil=DistilConfig(), engine=EngineConfig())
    students, stopwatch = [], Stopwatch()
    for name in names:
        size = sizes.get(name)
        engine_config = deepspeed_config(
            config.engine,
            config.optim,
            parameters=sizes.parameters(size),
            micro_batch=1,
            accumulation=1,
            precision="fp32",
        )
        torch.manual_seed(0)
        engine = StudentEngine(Manner(size), engine_config, config.optim, CPU)
        engine.module.train()
        objective = Objective(config.distil, size, teacher.size)
        students.append(Student(name, size, engine, objective, stopwatch))
    teacher.select({key for student in students for key in student.objective.keys}, output=False)
    schedule = Schedule(config.train.steps, config.optim, config.distil, config.loss)
    return StudentGroup(students, teacher, schedule, config.loss, stopwatch)


def check_plain(job: PlainJob, model: Manner, noisy: torch.Tensor) -> None:
    """The plain side is the same function, or the comparison means nothing."""
    with torch.no_grad():
        expected, _ = model.eval()(noisy, return_views=True)
        actual, _ = enhance(job.tensors, job.size, noisy, training=False)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    """Measure and print."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    export(read({}))
    init_distributed(CPU, timedelta(minutes=5))
    names = list(sizes.select(arguments.students))
    samples = round(arguments.seconds * SAMPLE_RATE)
    generator = torch.Generator().manual_seed(0)
    clean = 0.05 * torch.randn(arguments.batch, samples, generator=generator)
    noisy = clean + 0.05 * torch.randn(arguments.batch, samples, generator=generator)
    batch = Batch(noisy, clean, [])
    with tempfile.TemporaryDirectory(prefix="students benchmark ") as place:
        size = sizes.get(arguments.teacher)
        file = Path(place) / "model.safetensors"
        weights.save(file, Manner(size).state_dict(), name=arguments.teacher, size=size, step=0)
        teacher = LiveTeacher(file, CPU, "fp32")
    jobs = {}
    for name in names:
        model = Manner(sizes.get(name))
        jobs[name] = PlainJob(model, teacher.model)
        check_plain(jobs[name], model, noisy[:1])
    counts = sorted({1, min(3, len(names)), len(names)})
    groups = {count: _spread(names, count) for count in counts}
    trained = {count: build_group(names, teacher) for count, names in groups.items()}
    rounds = []
    for number in range(arguments.rounds + 1):
        measured = _round(jobs, trained, teacher, batch)
        if number:  # the first allocates and picks kernels
            rounds.append(measured)
    _report(arguments, groups, rounds)
    torch.distributed.destroy_process_group()


Round = tuple[dict[str, Spent], dict[tuple[int, str], Spent]]


def _round(
    jobs: dict[str, PlainJob], groups: dict[int, StudentGroup], teacher: LiveTeacher, batch: Batch
) -> Round:
    """Every measurement once: (the plain teacher and the rest of each plain step, every group's step)."""
    noisy, clean = batch.noisy, batch.clean
    first = next(iter(jobs.values()))
    maps: list[object] = []
    plain = {"teacher": Spent(lambda: maps.append(first.ask(noisy)))}
    for name, job in jobs.items():
        plain[name] = Spent(lambda job=job: job.forward_backward(noisy, clean, maps[0]))  # type: ignore[misc]
    grouped: dict[tuple[int, str], Spent] = {}
    fixed = FixedTeacher(teacher.forward(noisy))
    for count, group in groups.items():
        for source, chosen in (("live", teacher), ("cached", fixed)):
            group.teacher = chosen  # type: ignore[assignment]
            step = group.students[0].progress.steps
            work = partial(group.train_step, [batch], step)
            grouped[count, source] = Spent(work)
    return plain, grouped


def _spread(names: list[str], count: int) -> list[str]:
    """`count` of the names, from large to small."""
    return names if count == len(names) else [names[len(names) * at // count] for at in range(count)]


def _report(arguments: argparse.Namespace, groups: dict[int, list[str]], rounds: list[Round]) -> None:
    audio = arguments.batch * arguments.seconds
    print(
        f"batch {arguments.batch} x {arguments.seconds:g} s, {arguments.threads} threads, "
        f"teacher {arguments.teacher}, median of {len(rounds)} rounds"
    )
    rows = []
    for (count, group), source in itertools.product(groups.items(), ("live", "cached")):

        def jobs(plain: dict[str, Spent], clock: str, group: list[str] = group) -> float:
            return sum(getattr(plain["teacher"], clock) + getattr(plain[name], clock) for name in group)

        key = (count, source)
        separate = [jobs(plain, "cpu") for plain, _ in rounds]
        hours = SEGMENTS / arguments.batch / 3600 / count
        median = statistics.median
        rows.append(
            {
                "students": count,
                "teacher": source,
                "group audio s/s ^": count * audio / median(grouped[key].wall for _, grouped in rounds),
                "jobs audio s/s ^": count * audio / median(jobs(plain, "wall") for plain, _ in rounds),
                "group CPU h v": hours * median(grouped[key].cpu for _, grouped in rounds),
                "jobs CPU h v": hours * median(separate),
                "wall ratio ^": median(jobs(plain, "wall") / grouped[key].wall for plain, grouped in rounds),
                "CPU ratio ^": median(jobs(plain, "cpu") / grouped[key].cpu for plain, grouped in rounds),
            }
        )
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    print(
        "audio s/s: seconds of audio learnt from, summed over students, per second; CPU h: CPU-hours per "
        f"trained student of {SEGMENTS:,} segments; jobs: plain, each with a live teacher; ^ more is better"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A group's step against its students' own plain jobs.",
        epilog="example: python -m benchmarks.students --rounds 5",
    )
    parser.add_argument("--students", default="all", help="names separated by commas (default: all)")
    parser.add_argument("--teacher", default="manner-b", help="size of the teacher (default: manner-b)")
    parser.add_argument("--batch", type=int, default=2, help="segments a step (default: 2)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a segment (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
