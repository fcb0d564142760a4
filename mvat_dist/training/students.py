"""The distillation step: one batch, one teacher, many students.

Per micro-batch there is one teacher forward and one set of target spectra; then every student's own
forward, loss and backward. At the end of the step each student reduces its gradients and updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from mvat_dist.config import sizes
from mvat_dist.config.schema import Config
from mvat_dist.config.sizes import Size
from mvat_dist.data.batch import Batch
from mvat_dist.distributed.collectives import average_batchnorm
from mvat_dist.losses.objective import Objective, Prepared
from mvat_dist.training import schedule
from mvat_dist.training.checkpoint import StudentState
from mvat_dist.training.engine import StudentEngine
from mvat_dist.training.teacher import Teacher
from mvat_dist.training.throughput import Stopwatch, clock_of


class Meter:
    """Sums and counts of loss terms since the last row of the record, the same on every rank."""

    def __init__(self, keys: Sequence[str], device: torch.device) -> None:
        self.keys = tuple(keys)
        self.step = torch.zeros(len(self.keys) + 1, dtype=torch.float64, device=device)
        """This rank's sums over the open step; the last entry counts items."""
        self.row = torch.zeros_like(self.step)
        """All ranks' sums since the last row."""
        self._unknown = torch.full((), math.nan, device=device)

    def add(self, terms: Mapping[str, Tensor], items: int) -> None:
        """Count one micro-batch of `items` segments with the given mean terms.

        One that is missing is nan, and so is its mean over the row.
        """
        means = torch.stack([terms.get(key, self._unknown).detach().double() for key in self.keys])
        self.step[:-1] += items * means
        self.step[-1] += items

    def close_step(self) -> None:
        """Add the step's sums, already summed over the ranks, to the row's."""
        self.row += self.step
        self.step.zero_()

    def take_row(self) -> dict[str, float]:
        """Mean of every term since the last row; starts a new row."""
        *sums, items = self.row.tolist()
        self.row.zero_()
        return {key: total / items if items else math.nan for key, total in zip(self.keys, sums, strict=True)}


@dataclass
class Progress:
    """What a student has been through."""

    steps: int = 0
    """Steps of the run that are behind it: a student that joined later is behind the others for a while."""
    updates: int = 0
    """Steps that changed the weights."""
    skipped: int = 0
    """Steps left out because the gradient was not finite."""
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    """Times it went back to a checkpoint after too many skipped steps in a row."""
    lr_factor: float = 1.0
    """Factor of its learning rate: every rollback halves it."""
    given_up: bool = False
    """True where rollbacks did not help: the student stays as it is, the others go on."""
    validated: int = -1
    """Steps done at the last validation; -1 before the first."""
    best: float | None = None
    """Best validation score so far (higher is better)."""


class Student:
    """One student: its network in an engine, its loss and its progress."""

    def __init__(self, name: str, size: Size, engine: StudentEngine, objective: Objective) -> None:
        self.name = name
        self.size = size
        self.engine = engine
        self.objective = objective
        self.meter = Meter(objective.terms, engine.device)
        self.progress = Progress()

    def learn(self, noisy: Tensor, prepared: Prepared, share: float, clock: Stopwatch) -> None:
        """Forward, loss and backward on one micro-batch (B, T); `share` is what the teacher counts for."""
        with clock.section(f"forward/{self.name}"):
            estimate, views = self.engine(noisy, return_views=True)
            terms = self.objective(estimate, views, prepared, share)
            missing = set(self.objective.terms) - set(terms) - {"pesq"}
            assert not share or not missing, f"no target for {missing}"
            self.meter.add(terms, len(noisy))
        with clock.section(f"backward/{self.name}"):
            self.engine.backward(terms["loss"])

    def update(self, now: schedule.Hyperparameters) -> Tensor:
        """Apply the step's gradient, unless it is not finite on some rank; whether it was, ()."""
        return self.engine.step(now._replace(lr=now.lr * self.progress.lr_factor))

    def close_step(self, applied: bool, statistics: dict[torch.dtype, Tensor]) -> None:
        """Count the step, or undo its traces where it was not applied."""
        progress = self.progress
        progress.steps += 1
        if applied:
            progress.updates += 1
            progress.skipped_in_a_row = 0
            return
        self.engine.restore_buffers(statistics)
        self.meter.step.zero_()
        progress.skipped += 1
        progress.skipped_in_a_row += 1

    def roll_back(self, state: StudentState) -> None:
        """Take weights and moments from `state`, and half the learning rate from now on."""
        self.engine.load_weights(state.weights)
        self.engine.load_optimizer_state(state.optimizer)
        self.progress.skipped_in_a_row = 0
        self.progress.rollbacks += 1
        self.progress.lr_factor /= 2

    def state(self) -> StudentState:
        """Everything needed to go on. Every rank must call it."""
        progress = {**asdict(self.progress), "row": self.meter.row.tolist()}
        return StudentState(self.engine.weights(), self.engine.optimizer_state(), progress)

    def restore(self, state: StudentState) -> None:
        """Continue from `state`; the weights were given to the engine when it was made."""
        self.engine.load_optimizer_state(state.optimizer)
        progress = dict(state.progress)
        self.meter.row.copy_(torch.tensor(progress.pop("row"), dtype=torch.float64))
        self.progress = Progress(**progress)


class Fleet:
    """Students that learn side by side from the same batches and the same teacher."""

    def __init__(self, fleet: Iterable[Student], teacher: Teacher | None, config: Config) -> None:
        self.students = list(fleet)
        self.teacher = teacher
        self.config = config
        self.stopwatch = Stopwatch(clock_of(self.students[0].engine.device))
        self.stepped: list[Student] = []
        """Students that made the last step."""

    def at(self, step: int) -> list[Student]:
        """Students that have done `step` steps and have not been given up."""
        return [one for one in self.students if one.progress.steps == step and not one.progress.given_up]

    def step(self, micro_batches: Sequence[Batch], step: int) -> schedule.Hyperparameters:
        """Optimiser step `step`, counted from 0, of the students that it is the next of."""
        steps = self.config.train.steps
        now = schedule.at(step, steps, self.config.optim)
        share = schedule.distillation(step, steps, self.config.distil)
        self.stepped = learning = self.at(step)
        if not learning:  # the one that was behind has been given up: the step of the others is still to come
            return now
        # Gradients travel while the next student computes: the largest go first, the least wait for nobody.
        in_turn = sorted(learning, key=lambda one: -sizes.parameters(one.size))
        clock = self.stopwatch
        statistics = [student.engine.copy_buffers() for student in learning]
        for number, batch in enumerate(micro_batches, start=1):
            prepared = self._prepare(batch, learning[0], share, step)
            for student in in_turn:
                student.learn(prepared.targets.noisy, prepared, share, clock)
                if number == len(micro_batches):
                    with clock.section("communication"):
                        student.engine.begin_reduction()
        with clock.section("communication"):
            for student in in_turn:
                student.engine.end_reduction()
        with clock.section("optimiser"):
            # Read together: on a GPU the one place of a step at which the host waits for the device.
            applied = torch.stack([student.update(now) for student in learning]).tolist()
            for student, was_applied, before in zip(learning, applied, statistics, strict=True):
                student.close_step(was_applied, before)
        with clock.section("communication"):
            modules = [student.engine.module for student in learning]
            average_batchnorm(modules, sums=[student.meter.step for student in learning])
        for student in learning:
            student.meter.close_step()
        return now

    def _prepare(self, batch: Batch, student: Student, share: float, step: int) -> Prepared:
        """What students share of a micro-batch: the lesson, the target's spectra, the loss's weights.

        A teacher that counts for nothing any more is not asked, and no term is made ready before it counts.
        """
        clock = self.stopwatch
        with clock.section("data"):
            batch = (batch if share else replace(batch, teacher_targets=None)).to(student.engine.device)
        maps, output = None, None
        if self.teacher and share:
            with clock.section("teacher"):
                targets = self.teacher(batch)
            maps, output = targets.maps, targets.output
        with clock.section("targets"):
            pesq = schedule.pesq_counts(step, self.config.train.steps, self.config.loss)
            return student.objective.prepare(batch.noisy, batch.clean, maps, output, pesq=pesq)
