"""What a training step will cost: a closed formula over a machine's measured rates. No torch.

Per process and step, with n segments of the global batch: reading n segments (beside the computation, in
reader processes), the teacher's forward, every student's forward and backward, the optimiser, a ring
all-reduce of every student's gradient (all but the last beside the next student's computation), waiting for
the slowest process, and this step's share of validations and checkpoints. Rates come from
`benchmarks/scaling.py`, on the machine itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mvat_dist.config import sizes as students
from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.config.sizes import Size
from mvat_dist.data.mixing.sampler import micro_batch_size
from mvat_dist.errors import UserError
from mvat_dist.io import read_json

FLOAT = 4
"""Bytes of a weight."""


class Rate(NamedTuple):
    """Seconds of one item = macs * per_mac + values * per_value: arithmetic, and traffic with memory."""

    per_mac: float
    per_value: float

    def seconds(self, size: Size, samples: int) -> float:
        """Of one item of `samples` samples."""
        return students.macs(size, samples) * self.per_mac + students.values(size, samples) * self.per_value


_MAKE_ONE = "python -m benchmarks.scaling --write FILE makes one"
_PAIRS = ("forward", "learning")
_SPEEDS = ("bandwidth", "store", "saving")
_FORWARD, _LEARNING = Rate(3.3e-11, 1.4e-9), Rate(2.1e-11, 1.1e-8)


@dataclass(frozen=True)
class Machine:
    """Measured rates of one process and its surroundings. The defaults: see `docs/performance.md`."""

    name: str = "a node of two CPU cores"
    cores: int = 2
    """Processes of a node that compute at full speed beside each other; beyond, they take turns."""
    forward: Rate = _FORWARD
    """Of the teacher."""
    learning: Rate = _LEARNING
    """Of a student: forward and backward."""
    loss: float = 0.018
    """Seconds of the losses per second of audio and student, with the backward."""
    update: float = 5.8e-9
    """Optimiser seconds per parameter."""
    call: float = 0.0
    """Seconds per student and micro-batch whatever their size: Python, launching of kernels."""
    crowding: float = 0.017
    """By how much computation slows down per other process of the node, for memory and caches are shared."""
    jitter: float = 0.054
    """Standard deviation of a step's duration over processes, as a share of it."""
    latency: float = 1e-3
    """Seconds for one message from a process to the next."""
    bandwidth: float = 1.4e9
    """Bytes per second from a process to the next."""
    overlap: float = 0.5
    """Share of a student's computation during which the gradients of the one before can travel."""
    reading: float = 0.008
    """Seconds in which one reader makes a segment of four seconds."""
    store: float = 1e9
    """Bytes per second that the shared storage gives to all processes together."""
    saving: float = 2.9e8
    """Bytes per second of writing a checkpoint, flushed to the disk."""
    scoring: float = 0.12
    """Seconds of PESQ and the like for a clip of four seconds, per process."""
    base_memory: float = 6e8
    """Bytes of a process that has trained nothing."""
    learning_memory: float = 10.0
    """Bytes per value (`students.values`) that a student's forward keeps for its backward."""
    forward_memory: float = 2.0
    """Bytes per value that the teacher's forward needs at once."""

    @classmethod
    def read(cls, file: Path) -> Machine:
        """What `benchmarks/scaling.py --write` has measured.

        Raises:
            UserError: no such file, another kind of file, or a rate that is missing or cannot be one.
        """
        try:
            known = read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"--machine {file}: {error}; {_MAKE_ONE}") from error
        if wrong := _wrong(known):
            raise UserError(f"--machine {file}: {wrong}; {_MAKE_ONE}")
        return cls(**{**known, **{name: Rate(*known[name]) for name in _PAIRS}})

    def to_json(self) -> str:
        """For `read`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _wrong(rates: Any) -> str | None:
    """What of the content of a machine's file cannot be right, in words."""
    if not isinstance(rates, dict):
        return "it holds no object of rates"
    names = [field.name for field in dataclasses.fields(Machine)]
    if unknown := sorted(rates.keys() - set(names)):
        return f"it has {unknown[0]!r}, which is no rate"
    for name in names:
        if name not in rates:
            return f"{name!r} is missing"
        if needed := _needed(name, rates[name]):
            return f"{name!r} is {json.dumps(rates[name])}, and must be {needed}"
    return None


def _needed(name: str, value: Any) -> str:
    """What the rate called `name` has to be, where `value` is not that; else nothing."""
    if name == "name":
        return "" if isinstance(value, str) else "a text"
    if name == "cores":
        return "" if type(value) is int and value > 0 else "a whole number above 0"
    if name in _PAIRS:
        right = isinstance(value, list) and len(value) == 2 and all(map(_is_rate, value))
        return "" if right else "two numbers, none below 0"
    if name in _SPEEDS:
        return "" if _is_rate(value) and value > 0 else "a number above 0"
    return "" if _is_rate(value) else "a number, not below 0"


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


@dataclass(frozen=True)
class Work:
    """What is trained, whatever it is trained on."""

    students: tuple[Size, ...]
    teacher: Size | None
    """None where there is none, or a cache."""
    samples: int
    """Of a segment."""
    batch: int
    micro_batch: int
    steps: int
    readers: int
    """Reader processes per process."""
    shards: int
    """Of the corpus: no more readers can share it."""
    lesson_bytes: float = 0.0
    """Of a segment in the teacher's cache."""
    taught: float = 1.0
    """Share of the steps in which a live teacher is asked."""
    save_every: int = 1000
    validate_every: int = 1000
    clips: int = 64

    @classmethod
    def of(
        cls, config: Config, teacher: Size | None, shards: int, names: Sequence[str] | None = None
    ) -> Work:
        """Of a configuration, or of some of its students."""
        chosen = students.select(config.student, config.sizes)
        samples = round(config.data.segment_seconds * SAMPLE_RATE)
        cached = config.teacher.source == "cache" and config.distil.method != "none"
        sizes = tuple(size for name, size in chosen.items() if names is None or name in names)
        return cls(
            students=sizes,
            teacher=None if cached or config.distil.method == "none" else teacher,
            samples=samples,
            batch=config.train.batch,
            micro_batch=config.train.micro_batch,
            steps=config.train.steps,
            readers=config.data.workers,
            shards=shards,
            # Measured of the default codec (docs/results/2026-11-22-cache.md).
            lesson_bytes=0.26 * sum(teacher.views(samples).values()) if cached and teacher else 0.0,
            taught=config.distil.fade_by or 1.0,
            save_every=config.train.save_every,
            validate_every=config.train.validate_every,
            clips=config.valid.clips,
        )

    @property
    def parameters(self) -> list[int]:
        """Of each student."""
        return [students.parameters(size) for size in self.students]


@dataclass(frozen=True)
class Step:
    """Seconds of one step by what they go to; lower is better."""

    teacher: float
    students: float
    optimiser: float
    communication: float
    """What is not hidden behind computation."""
    waiting: float
    """For the slowest process."""
    data: float
    """What reading takes longer than all of the above; all of it where no process of its own reads."""
    validation: float
    checkpoint: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return math.fsum(dataclasses.astuple(self))

    @property
    def computing(self) -> float:
        """What is not paid for being many."""
        return self.teacher + self.students + self.optimiser

    def largest_burden(self) -> str:
        """What takes most besides computing."""
        burdens = ("communication", "waiting", "data", "validation", "checkpoint")
        return max(burdens, key=lambda name: getattr(self, name))


def impossible(work: Work, processes: int) -> str | None:
    """Why so many processes cannot train it; None where they can."""
    if work.batch % processes:
        return f"a batch of {work.batch} is not shared by {processes} processes"
    if work.readers * processes > work.shards:
        return f"{work.readers * processes} readers share {work.shards} shards"
    return None


def step(work: Work, machine: Machine, processes: int, per_node: int) -> Step:
    """Forecast for so many processes on nodes of `per_node` each; `impossible` is for the caller to ask."""
    share = work.batch / processes
    calls = share / _micro_batch(work, processes)
    slower = slowdown(machine, per_node)
    seconds = work.samples / SAMPLE_RATE
    learning = [
        share * (machine.learning.seconds(size, work.samples) + machine.loss * seconds) + calls * machine.call
        for size in sorted(work.students, key=students.parameters, reverse=True)
    ]
    teacher = 0.0
    if work.teacher:
        teacher = work.taught * share * machine.forward.seconds(work.teacher, work.samples)
    computing = slower * (teacher + sum(learning))
    update = slower * machine.update * sum(work.parameters)
    messages = [ring(FLOAT * count, processes, machine) for count in sorted(work.parameters, reverse=True)]
    # BatchNorm's statistics and the sums of the losses, then the word on who stops.
    small = 2 * ring(FLOAT * 0.01 * sum(work.parameters), processes, machine)
    # The largest students learn first, and gradients travel beside the last micro-batch alone.
    hidden = min(sum(messages[:-1]), machine.overlap * slower * sum(learning[1:]) / calls)
    communication = sum(messages) - hidden + small
    waiting = computing * machine.jitter * math.sqrt(2 * math.log(processes))
    busy = computing + update + communication + waiting
    return Step(
        teacher=slower * teacher,
        students=slower * sum(learning),
        optimiser=update,
        communication=communication,
        waiting=waiting,
        data=max(0.0, reading(work, machine, processes) - (busy if work.readers else 0.0)),
        validation=_validation(work, machine, processes, slower) / work.validate_every,
        checkpoint=checkpoint_bytes(work) / machine.saving / work.save_every,
    )


def _micro_batch(work: Work, processes: int) -> int:
    # Of what cannot be shared, as much as nearest could: `impossible` says so.
    return micro_batch_size(max(1, work.batch // processes), work.micro_batch)


def slowdown(machine: Machine, per_node: int) -> float:
    """Factor on computation for `per_node` processes on a node; 1 for one."""
    beside = min(per_node, machine.cores)
    return (1 + machine.crowding * (beside - 1)) * max(1.0, per_node / machine.cores)


def ring(size: float, processes: int, machine: Machine) -> float:
    """Seconds of a ring all-reduce of `size` bytes: 2 (R - 1) rounds of a part of size / R each.

    Thakur et al., "Optimization of Collective Communication Operations in MPICH" (2005). 0 for one process.
    """
    rounds = 2 * (processes - 1)
    return rounds * (machine.latency + size / processes / machine.bandwidth)


def reading(work: Work, machine: Machine, processes: int) -> float:
    """Seconds until all readers have made their share and the storage has given the cache's part."""
    share = work.batch / processes * machine.reading * work.samples / (4 * SAMPLE_RATE)
    return max(share / max(1, work.readers), work.batch * work.lesson_bytes / machine.store)


def checkpoint_bytes(work: Work) -> float:
    """Weights and two moments of every student, and the weights for users."""
    return FLOAT * 4.0 * sum(work.parameters)


def memory(work: Work, machine: Machine, processes: int) -> float:
    """Bytes of one of `processes` at its peak: students learn one after another, their states stay."""
    items = _micro_batch(work, processes)
    states = 4 * FLOAT * sum(work.parameters)  # weights, gradients, two moments
    learning = max(machine.learning_memory * students.values(size, work.samples) for size in work.students)
    teacher = 0.0
    if work.teacher:
        states += FLOAT * students.parameters(work.teacher)
        teacher = machine.forward_memory * students.values(work.teacher, work.samples)
    return machine.base_memory + states + items * max(learning, teacher)


def _validation(work: Work, machine: Machine, processes: int, slower: float) -> float:
    """Seconds of one validation on clips of four seconds, shared by the processes."""
    samples = 4 * SAMPLE_RATE
    clips = math.ceil(work.clips / processes)
    enhancing = sum(machine.forward.seconds(size, samples) for size in work.students)
    return clips * slower * (enhancing + machine.scoring * len(work.students))
