"""The distillation step: one batch, one teacher, many students.

Per micro-batch the teacher runs once and the target spectra are computed once. Then every student makes its
own forward pass, loss and backward pass. At the end of the step each student's gradients are averaged over
the ranks and applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mvat_dist.config import sizes
from mvat_dist.config.schema import LossConfig
from mvat_dist.config.sizes import Size
from mvat_dist.data.batch import Batch
from mvat_dist.distributed.collectives import average_batchnorm
from mvat_dist.losses.objective import BatchTargets, Objective, prepare_targets
from mvat_dist.training.checkpoint import Progress, StudentState
from mvat_dist.training.engine import StudentEngine
from mvat_dist.training.schedule import Hyperparameters, Schedule
from mvat_dist.training.teacher import Teacher
from mvat_dist.training.throughput import Stopwatch


class MetricAccumulator:
    """Sums and counts of loss terms since the last row of the history, the same on every rank."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.step = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=device)
        """This rank's sums over the open step; the last entry counts segments."""
        self.row = torch.zeros_like(self.step)
        """All ranks' sums since the last row."""
        self._missing = torch.full((), math.nan, device=device)

    def add(self, terms: Mapping[str, Tensor], segments: int) -> None:
        """Add one micro-batch of `segments` segments with the given mean terms.

        A term that is missing counts as nan, and so does its mean over the row.
        """
        means = torch.stack([terms.get(name, self._missing).detach().double() for name in self.names])
        self.step[:-1] += segments * means
        self.step[-1] += segments

    def close_step(self) -> None:
        """Add the step's sums, already summed over the ranks, to the row's."""
        self.row += self.step
        self.step.zero_()

    def discard_step(self) -> None:
        """Forget the open step, which was not applied."""
        self.step.zero_()

    def compute_and_reset(self) -> dict[str, float]:
        """Mean of every term since the last row; starts a new row."""
        *sums, segments = self.row.tolist()
        self.row.zero_()
        means = [total / segments if segments else math.nan for total in sums]
        return dict(zip(self.names, means, strict=True))


class Student:
    """One student: its network in an engine, its loss, its metrics and its progress."""

    def __init__(
        self, name: str, size: Size, engine: StudentEngine, objective: Objective, stopwatch: Stopwatch
    ) -> None:
        self.name = name
        self.size = size
        self.engine = engine
        self.objective = objective
        self.metrics = MetricAccumulator(objective.terms, engine.device)
        self.progress = Progress()
        # Timed here, once, so that the step below reads like the paper.
        self.forward = stopwatch.timed(f"forward/{name}", engine)
        self.loss = stopwatch.timed(f"forward/{name}", objective)
        self.backward = stopwatch.timed(f"backward/{name}", engine.backward)

    def update(self, hparams: Hyperparameters) -> Tensor:
        """Apply the step's gradient if it is finite on every rank; returns whether it was applied, ()."""
        return self.engine.step(hparams.lr * self.progress.lr_factor, hparams.beta1)

    def close_step(self, applied: bool, batchnorm: dict[torch.dtype, Tensor]) -> None:
        """Count the step; where it was not applied, forget its losses and put `batchnorm` back."""
        progress = self.progress
        progress.steps += 1
        if applied:
            progress.updates += 1
            progress.skipped_in_a_row = 0
            return
        self.engine.restore_batchnorm(batchnorm)
        self.metrics.discard_step()
        progress.skipped += 1
        progress.skipped_in_a_row += 1

    def roll_back(self, state: StudentState) -> None:
        """Take weights and moments from `state`, and halve the learning rate from now on."""
        self.engine.load_weights(state.weights)
        self.engine.load_optimizer_state(state.optimizer)
        self.progress.skipped_in_a_row = 0
        self.progress.rollbacks += 1
        self.progress.lr_factor /= 2

    def state(self) -> StudentState:
        """Everything needed to go on. Every rank must call it."""
        return StudentState(
            self.engine.weights(),
            self.engine.optimizer_state(),
            replace(self.progress),
            self.metrics.row.tolist(),
        )

    def restore(self, state: StudentState) -> None:
        """Continue from `state`; the weights were given to the engine when it was made."""
        self.engine.load_optimizer_state(state.optimizer)
        self.metrics.row.copy_(torch.tensor(state.open_row, dtype=torch.float64))
        self.progress = replace(state.progress)


class StudentGroup:
    """Students that learn side by side from the same batches and the same teacher."""

    def __init__(
        self,
        students: Iterable[Student],
        teacher: Teacher | None,
        schedule: Schedule,
        loss: LossConfig,
        stopwatch: Stopwatch,
    ) -> None:
        self.students = list(students)
        self.teacher = teacher
        self.schedule = schedule
        self.stopwatch = stopwatch
        self.active: list[Student] = []
        """Students that made the last step."""
        self._loss = loss
        self._device = self.students[0].engine.device

    def students_at(self, step: int) -> list[Student]:
        """Students that have done `step` steps and have not been given up."""
        return [s for s in self.students if s.progress.steps == step and not s.progress.given_up]

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> Hyperparameters:
        """Take optimiser step `step`, from 0, with every student whose next one it is (arXiv 2208.10367)."""
        hparams = self.schedule.at(step)  # lr, beta1, kd_weight
        self.active = self.students_at(step)
        if not self.active:  # the student that was behind has been given up; the others did this step before
            return hparams
        largest_first = sorted(self.active, key=lambda student: -sizes.parameters(student.size))
        snapshots = [student.engine.snapshot_batchnorm() for student in self.active]
        for batch in micro_batches:
            targets = self.prepare_targets(batch, hparams)  # spectra and teacher maps: once for all students
            for student in largest_first:
                enhanced, views = student.forward(targets.noisy)
                # L_enhance + mu * L_output + lambda * L_MVAT, the last two times kd_weight.
                losses = student.loss(enhanced, views, targets, hparams.kd_weight)
                # The last backward starts the all-reduce, which overlaps the next student's compute.
                student.backward(losses["loss"], last=batch is micro_batches[-1])
                student.metrics.add(losses, len(targets.noisy))
                del enhanced, views, losses  # their memory is the next student's
        with self.stopwatch.section("communication"):
            for student in largest_first:
                student.engine.wait_for_gradients()
        with self.stopwatch.section("optimiser"):
            # Read at once: here the host waits for the GPU, and again where several ranks agree on the step.
            applied = torch.stack([student.update(hparams) for student in self.active]).tolist()
            for student, was_applied, snapshot in zip(self.active, applied, snapshots, strict=True):
                student.close_step(was_applied, snapshot)
        with self.stopwatch.section("communication"):
            modules = [student.engine.module for student in self.active]
            average_batchnorm(modules, sums=[student.metrics.step for student in self.active])
        for student in self.active:
            student.metrics.close_step()
        return hparams

    def prepare_targets(self, batch: Batch, hparams: Hyperparameters) -> BatchTargets:
        """Compute what all students share of one micro-batch: target spectra, teacher maps, teacher output.

        A teacher of weight 0 is not asked, and no term is prepared before it counts.
        """
        with self.stopwatch.section("data"):
            wanted = batch if hparams.kd_weight else replace(batch, teacher_targets=None)
            batch = wanted.to(self._device)
        maps, output = None, None
        if self.teacher and hparams.kd_weight:
            with self.stopwatch.section("teacher"):
                teacher_targets = self.teacher(batch)
            maps, output = teacher_targets.maps, teacher_targets.output
        with self.stopwatch.section("targets"):
            return prepare_targets(
                batch.noisy, batch.clean, maps, output, config=self._loss, pesq=hparams.pesq
            )
