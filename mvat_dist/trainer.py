"""The life of a run on one rank: step, record, validate, save, stop, go on."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mvat_dist import assembly, checkpoint, collectives, configfile, environment, modelfile
from mvat_dist.collectives import together
from mvat_dist.config import Config
from mvat_dist.data.stream import batches
from mvat_dist.devices import Precision
from mvat_dist.errors import UserError
from mvat_dist.fleet import Student
from mvat_dist.models import Manner
from mvat_dist.ranks import Ranks
from mvat_dist.rundir import RunDir, State
from mvat_dist.schedule import Hyperparameters
from mvat_dist.stopping import StopRequest
from mvat_dist.summary import summarise
from mvat_dist.tracking import Tracker
from mvat_dist.validate import validate

VALIDATION_METRICS = ("pesq_wb", "stoi", "si_sdr")


class Trainer:
    """One rank of a run."""

    def __init__(
        self, config: Config, ranks: Ranks, run: RunDir, device: torch.device, precision: Precision
    ) -> None:
        """Open everything, on all ranks together.

        Raises:
            UserError: anything about the data, the teacher or the folder that the user can mend.
        """
        self.config = config
        self.ranks = ranks
        self.run = run
        self.device = device
        self.inputs = together(lambda: assembly.open_inputs(config, ranks.world_size, device, precision))
        found = assembly.claim_folder(run, config, self.inputs, ranks)
        self.step = checkpoint.step_of(found) if found else 0
        self.fleet = assembly.build_fleet(config, ranks, run, self.inputs, found, device, precision)
        self.tracker = together(lambda: self._open_record() if ranks.rank == 0 else None)
        self._steps_in_row = 0

    @property
    def finished(self) -> bool:
        """Whether every step has been done."""
        return self.step >= self.config.train.steps

    def _open_record(self) -> Tracker:
        environment.record(self.run.environment, self.ranks)
        names = [student.name for student in self.fleet.students]
        for name in names:
            self.run.student(name).mkdir(parents=True, exist_ok=True)
        tracker = Tracker(self.run.path, {name: self.run.history(name) for name in names})
        tracker.rewind(self.step)
        tracker.connect(self.config.track, configfile.as_dict(self.config))
        return tracker

    def train(self, stop: StopRequest) -> int:
        """All remaining steps, or as many as fit before somebody asks to stop.

        Returns:
            The signal that stopped the run, the same on every rank; 0 where it is finished.
        """
        train = self.config.train
        self._status("running")
        if self.step and self._due(train.validate_every) and not self._validated():
            self._validate()  # the last start stopped before it could
        stream = batches(
            self.inputs.data,
            batch=train.batch,
            micro_batch=train.micro_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            first_step=self.step,
            steps=train.steps - self.step,
            workers=self.config.data.workers,
        )
        reason = 0
        with self._progress_bar() as bar:
            while not self.finished and not reason:
                with self.fleet.stopwatch.section("data"):
                    micro_batches = next(stream)
                now = self.fleet.step(micro_batches, self.step)
                self.step += 1
                self._steps_in_row += 1
                bar.update()
                reason = 0 if self.finished else collectives.largest(stop.signal)
                self._after_step(now, bar, stopping=bool(reason))
        self._status("finished" if self.finished else "stopped")
        return reason

    def _after_step(self, now: Hyperparameters, bar: tqdm[Any], *, stopping: bool) -> None:
        """Record, validate and save where the step number says so; save at once when stopping."""
        train, clock = self.config.train, self.fleet.stopwatch
        if not self.fleet.learning:
            raise UserError(
                f"every student of {self.run.path} was given up after {train.max_skipped} steps in a row "
                "with a non-finite gradient: lower --optim.lr or look at the data",
                say=self.ranks.rank == 0,
            )
        if self._due(self.config.track.every):
            self._record(now, bar)
        if self._due(train.validate_every) and not stopping:
            with clock.section("validation"):
                self._validate()
        if self._due(train.save_every) or stopping:
            with clock.section("checkpoint"):
                self._save()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.finished

    def _record(self, now: Hyperparameters, bar: tqdm[Any]) -> None:
        """One row per student: means over all ranks and over the steps since the last row."""
        elapsed, shares = self.fleet.stopwatch.lap()
        heard = self._steps_in_row * self.config.train.batch * self.config.data.segment_seconds
        speed = heard / elapsed
        self._steps_in_row = 0
        losses = {}
        for student in self.fleet.students:
            row: dict[str, Any] = {
                **student.meter.take_row(),
                "lr": now.lr,
                "gradient_norm": student.engine.gradient_norm,
                "skipped": student.progress.skipped,
                "audio_seconds_per_second": speed,
                "time": shares,
            }
            losses[student.name.removeprefix("manner-")] = f"{row['loss']:.3f}"
            if self.tracker:
                self.tracker.log(student.name, self.step, **row)
        bar.set_postfix(losses, refresh=False)
        self._status("running", audio_seconds_per_second=speed)

    def _validate(self) -> None:
        """Score every student on the held-out clips; keep the weights of its best score."""
        learning = self.fleet.learning
        weights = {student.name: student.engine.weights() for student in learning}
        rows = validate(
            {student.name: self._plain_copy(student, weights[student.name]) for student in learning},
            self.inputs.clips,
            VALIDATION_METRICS,
            device=self.device,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            gather=collectives.gather,
        )
        means = summarise(rows, VALIDATION_METRICS)
        improved: list[Student] = []
        for student in learning:
            summaries = means[student.name]
            row: dict[str, Any] = {f"valid/{metric}": found.mean for metric, found in summaries.items()}
            row |= {f"valid/{metric}_failed": sum(f.failed.values()) for metric, f in summaries.items()}
            if self.tracker:
                self.tracker.log(student.name, self.step, **row)
            student.progress.validated = self.step
            score, best = summaries[self.config.valid.best].mean, student.progress.best
            if score is not None and (best is None or score > best):
                student.progress.best = score
                improved.append(student)

        def write() -> None:
            for student in improved:
                self._write_weights(student, "best", weights[student.name])

        together(lambda: write() if self.ranks.rank == 0 else None)

    def _validated(self) -> bool:
        return all(student.progress.validated == self.step for student in self.fleet.learning)

    def _plain_copy(self, student: Student, weights: dict[str, Tensor]) -> Manner:
        """The student outside its engine: under ZeRO stage 3 an engine's forward is collective, and ranks
        score different numbers of clips. It is also what a user would load."""
        network = Manner(student.size)
        network.load_state_dict(weights)
        return network.to(self.device).eval()

    def _save(self) -> None:
        """A checkpoint of all students, and the weights that users take away."""
        states = {student.name: student.state() for student in self.fleet.students}

        def write() -> None:
            checkpoint.save(self.run.checkpoints, self.step, states, self.config.train.keep)
            for student in self.fleet.students:
                self._write_weights(student, "last", states[student.name].weights)

        together(lambda: write() if self.ranks.rank == 0 else None)

    def _write_weights(
        self, student: Student, which: Literal["best", "last"], weights: dict[str, Tensor]
    ) -> None:
        file = self.run.weights(student.name, which)
        modelfile.save(file, weights, name=student.name, size=student.size, step=self.step)

    def _progress_bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.config.train.steps,
            initial=self.step,
            unit="step",
            desc="training",
            disable=self.ranks.rank != 0,
            # A log file wants a line now and then, a terminal a living bar.
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def _status(self, state: State, **more: Any) -> None:
        if self.ranks.rank == 0:
            progress = {student.name: asdict(student.progress) for student in self.fleet.students}
            self.run.write_status(state, self.step, steps=self.config.train.steps, students=progress, **more)

    def close(self, exit_code: int) -> None:
        """Leave a truthful status and close the record, also after an error."""
        if self.ranks.rank == 0 and self.run.read_status().get("state") == "running":
            self._status("failed", exit_code=exit_code)
        if self.tracker:
            self.tracker.finish(exit_code)
