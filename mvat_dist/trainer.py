"""The life of a run on one rank: step, record, validate, save, stop, go on."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from mvat_dist import assembly, checkpoint, collectives, configfile, devices, environment, modelfile
from mvat_dist.config import Config
from mvat_dist.data.stream import batches
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

    def __init__(self, config: Config, ranks: Ranks, run: RunDir) -> None:
        """Open everything, on all ranks together.

        Raises:
            UserError: anything about the data, the teacher or the folder that the user can mend.
        """
        self.config = config
        self.ranks = ranks
        self.run = run
        device, precision = assembly.together(lambda: devices.choose(config.engine, ranks.local_rank))
        self.data, self.clips = assembly.together(lambda: assembly.open_data(config, ranks.world_size))
        teacher = assembly.together(lambda: assembly.open_teacher(config, device, precision))
        found = assembly.choose_checkpoint(run, config, ranks.rank)
        self.step = checkpoint.step_of(found) if found else 0
        self.fleet = assembly.build_fleet(config, ranks, run, teacher, found, device, precision)
        self.device = device
        self.tracker = self._open_record() if ranks.rank == 0 else None

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

    def train(self, stop: StopRequest) -> None:
        """All remaining steps, or as many as fit before somebody asks to stop."""
        train = self.config.train
        self._status("running")
        stream = batches(
            self.data,
            batch=train.batch,
            micro_batch=train.micro_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            first_step=self.step,
            steps=train.steps - self.step,
            workers=self.config.data.workers,
        )
        clock = self.fleet.stopwatch
        with self._progress_bar() as bar:
            while not self.finished:
                with clock.section("data"):
                    micro_batches = next(stream)
                now = self.fleet.step(micro_batches, self.step)
                self.step += 1
                bar.update()
                stopping = collectives.any_rank(stop.requested)
                self._after_step(now, bar, stopping=stopping)
                if stopping:
                    break
        self._status("finished" if self.finished else "stopped")

    def _after_step(self, now: Hyperparameters, bar: tqdm[Any], *, stopping: bool) -> None:
        """Record, validate and save where the step number says so."""
        train, clock = self.config.train, self.fleet.stopwatch
        if not self.fleet.learning:
            raise UserError(
                f"every student of {self.run.path} was given up after {train.max_skipped} steps in a row "
                "with a non-finite gradient: lower --optim.lr or look at the data"
            )
        if self._due(self.config.track.every):
            self._record(now, bar)
        if self._due(train.validate_every):
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
        steps = self.step % self.config.track.every or self.config.track.every
        speed = steps * self.config.train.batch * self.config.data.segment_seconds / elapsed
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
            self.clips,
            VALIDATION_METRICS,
            device=self.device,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            gather=collectives.gather,
        )
        means = summarise(rows, VALIDATION_METRICS)
        for student in learning:
            summaries = means[student.name]
            row: dict[str, Any] = {f"valid/{metric}": found.mean for metric, found in summaries.items()}
            row |= {f"valid/{metric}_failed": sum(f.failed.values()) for metric, f in summaries.items()}
            if self.tracker:
                self.tracker.log(student.name, self.step, **row)
            score, best = summaries[self.config.valid.best].mean, student.progress.best
            if score is not None and (best is None or score > best):
                student.progress.best = score
                self._write_weights(student, "best", weights[student.name])

    def _plain_copy(self, student: Student, weights: dict[str, Tensor]) -> Manner:
        """The student outside its engine: under ZeRO stage 3 an engine's forward is collective, and ranks
        score different numbers of clips. It is also what a user would load."""
        network = Manner(student.size)
        network.load_state_dict(weights)
        return network.to(self.device).eval()

    def _save(self) -> None:
        """A checkpoint of all students, and the weights that users take away."""
        states = {student.name: student.state() for student in self.fleet.students}
        if self.ranks.rank == 0:
            checkpoint.save(self.run.checkpoints, self.step, states, self.config.train.keep)
        for student in self.fleet.students:
            self._write_weights(student, "last", states[student.name].weights)

    def _write_weights(
        self, student: Student, which: Literal["best", "last"], weights: dict[str, Tensor]
    ) -> None:
        if self.ranks.rank == 0:
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
