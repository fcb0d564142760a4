"""The training loop on one rank: step, prefetch, agree, then whatever is due between two steps."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from mvat_dist.config.schema import TrackConfig, TrainConfig, ValidConfig
from mvat_dist.distributed.collectives import all_gather_object, run_on_all_ranks, run_on_rank_zero
from mvat_dist.evaluation.statistics import statistics_by_model
from mvat_dist.evaluation.validate import validate
from mvat_dist.models import weights as model_files
from mvat_dist.models.manner import Manner
from mvat_dist.runs.folder import State
from mvat_dist.runs.history import Row
from mvat_dist.runs.status import signal_name
from mvat_dist.training import checkpoint, throughput
from mvat_dist.training.fault_tolerance import FaultTolerance, StopRequest
from mvat_dist.training.hooks import Agreement, Hook, StepEnd
from mvat_dist.training.recorder import training_row, validation_row
from mvat_dist.training.setup import Components
from mvat_dist.training.students import Student
from mvat_dist.training.throughput import EnergyMeter

logger = logging.getLogger(__name__)

VALIDATION_METRICS = ("pesq_wb", "stoi", "si_sdr")


class Trainer:
    """Trains the students of an opened run to its last step, or until somebody asks to stop."""

    def __init__(
        self,
        train: TrainConfig,
        valid: ValidConfig,
        track: TrackConfig,
        components: Components,
        fault_tolerance: FaultTolerance,
    ) -> None:
        self.step = components.step
        """Steps done."""
        self._train, self._valid = train, valid
        self._ranks, self._run, self._device = components.ranks, components.run, components.device
        self._students, self._inactive = components.students, components.inactive
        self._prefetcher, self._clips = components.prefetcher, components.clips
        self._recorder, self._status = components.recorder, components.status
        self._recovery = components.recovery
        self._audio_per_step = components.audio_per_step
        self._fault_tolerance = fault_tolerance
        self._stopwatch = components.students.stopwatch
        self._energy = EnergyMeter(components.device)
        self._first_step = self._row_step = components.step
        self._bar: tqdm[Any]
        self._hooks = (
            Hook("recovery", self._recovery.due, self._recovery.run, writes=False),
            Hook("logging", lambda end: end.every(track.every), self._log),
            Hook("validation", self._needs_validation, self._validate),
            Hook("checkpoint", self._needs_checkpoint, self._save),
        )

    @property
    def finished(self) -> bool:
        """Whether every step has been done."""
        return self.step >= self._train.steps

    def train(self, stop: StopRequest) -> int:
        """Make all remaining steps, or as many as fit before somebody asks to stop.

        Returns:
            The signal that stopped the run, the same on every rank; 0 where it is finished.
        """
        self._start()
        stop_signal = 0
        with self._progress_bar() as self._bar:
            self._fetch_next()
            run_on_all_ranks(self._prefetcher.raise_failure)
            while not self.finished and not stop_signal:
                began = time.monotonic()
                micro_batches = self._prefetcher.take()
                hparams = self._students.train_step(micro_batches, self.step)
                self.step += 1
                self._fetch_next()
                self._note_progress("step", began)
                end = StepEnd(self.step, hparams, last=self.finished, stopping=bool(stop.signal))
                with self._stopwatch.section("communication"):
                    agreed = self._agree(stop, end, sum(batch.replaced for batch in micro_batches))
                stop_signal = agreed.stop_signal
                end = replace(end, stopping=bool(stop_signal))
                for hook in self._hooks:
                    if hook.due(end):
                        with self._stopwatch.section(hook.section):
                            hook.run(end)
                if agreed.read_failed and not stop_signal:
                    run_on_all_ranks(self._prefetcher.raise_failure)
        if stop_signal:
            self._note_stop(stop_signal, stop)
        self._write_status("finished" if self.finished else "stopped")
        return stop_signal

    def _start(self) -> None:
        """Do what an earlier start may have left undone, and set the clocks to zero."""
        self._write_status("running")
        self._fault_tolerance.progress("starting", self.step)
        # The last start may have stopped before its validation, and given weights may be the best ever.
        start = StepEnd(self.step, self._students.schedule.at(self.step), last=self.finished, stopping=False)
        if (self.step or self._train.init) and start.every(self._train.validate_every):
            students = self._students.students_at(self.step)
            if waiting := [student for student in students if student.progress.validated < self.step]:
                self._score(waiting)
        self._recovery.check_any_student_left()
        self._stopwatch.lap()  # starting up is no part of the first row's speed, or of its energy
        self._energy.lap()

    def _fetch_next(self) -> None:
        if not self.finished:
            with self._stopwatch.section("data"):
                self._prefetcher.fetch_next()

    def _agree(self, stop: StopRequest, end: StepEnd, bad_samples: int) -> Agreement:
        """Tell all ranks in one all-reduce what this rank knows after a step, and act on what ends the run.

        Raises:
            UserError: the folder was removed, another process has taken the run over, or there are more bad
                samples than the configuration allows; on every rank.
        """
        writes = any(hook.due(end) for hook in self._hooks if hook.writes)
        folder_lost = self._ranks.rank == 0 and writes and not self._owns_folder()
        own = Agreement(stop.signal, self._prefetcher.failed, folder_lost, bad_samples)
        agreed = own.all_reduced(self._device)
        if agreed.folder_lost:
            raise self._fault_tolerance.folder_lost_error()
        self._prefetcher.count_bad_samples(agreed.bad_samples)
        return agreed._replace(stop_signal=0) if end.last else agreed

    def _owns_folder(self) -> bool:
        students = self._students.students
        return self._fault_tolerance.owns_folder() and all(
            self._run.student(student.name).is_dir() for student in students
        )

    def _well(self) -> list[Student]:
        """Students that made the last step and were not given up after it."""
        return [student for student in self._students.active if not student.progress.given_up]

    def _needs_validation(self, end: StepEnd) -> bool:
        return end.every(self._train.validate_every) and not end.stopping

    def _needs_checkpoint(self, end: StepEnd) -> bool:
        return end.every(self._train.save_every) or end.stopping

    def _log(self, end: StepEnd) -> None:
        """Append one row per student: means over all ranks and over the steps since the last row."""
        elapsed, shares = self._stopwatch.lap()
        speed = throughput.speed((self.step - self._row_step) * self._audio_per_step, elapsed, shares)
        self._row_step = self.step
        joules = self._energy.lap()
        bad_samples = self._prefetcher.bad_samples
        rows: dict[str, Row] = {}
        for student in self._well():
            row = training_row(student, end.hparams.lr, speed, shares)
            optional = {"joules": joules, "bad_samples": bad_samples}
            rows[student.name] = row | {key: value for key, value in optional.items() if value is not None}
        self._bar.set_description(f"training ({throughput.in_words(shares)})", refresh=False)
        losses = {name.removeprefix("manner-"): f"{row['loss']:.3f}" for name, row in rows.items()}
        self._bar.set_postfix(losses, refresh=False)

        def write() -> None:
            if self._recorder:
                self._recorder.log_training(self.step, rows)
            self._write_status("running", at_once=False, audio_seconds_per_second=speed, time_shares=shares)

        run_on_rank_zero(write)

    def _validate(self, end: StepEnd) -> None:
        """Validate the students that made the last step."""
        del end
        self._score(self._well())

    def _score(self, students: list[Student]) -> None:
        """Score students on the held-out clips; keep the weights of the best score of each."""
        began = time.monotonic()
        self._fault_tolerance.progress("validating", self.step)
        weights = {student.name: student.engine.weights() for student in students}
        networks = {student.name: self._plain_copy(student, weights[student.name]) for student in students}
        clip_scores = validate(
            networks,
            self._clips,
            VALIDATION_METRICS,
            device=self._device,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            gather=all_gather_object,
        )
        scores = statistics_by_model(clip_scores, VALIDATION_METRICS)
        rows = {student.name: validation_row(scores[student.name]) for student in students}
        improved: list[Student] = []
        for student in students:
            student.progress.validated = self.step
            score, best = scores[student.name][self._valid.best].mean, student.progress.best
            if score is not None and (best is None or score > best):
                student.progress.best = score
                improved.append(student)

        def write() -> None:
            if self._recorder is None:
                return
            self._recorder.log_validation(self.step, rows, networks, self._device)
            for student in improved:
                file = self._write_weights(student, "best", weights[student.name])
                self._recorder.log_best_weights(student, file, self._valid.best)

        run_on_rank_zero(write)
        self._note_progress("validation", began)

    def _plain_copy(self, student: Student, weights: dict[str, Tensor]) -> Manner:
        """The student outside its engine, as a user would load it.

        Under ZeRO stage 3 an engine's forward pass is collective, and ranks score different numbers of clips.
        """
        network = Manner(student.size)
        network.load_state_dict(weights)
        return network.to(self._device).eval()

    def _save(self, end: StepEnd) -> None:
        """Write a checkpoint of all students, and the weights that users take away."""
        del end
        began = time.monotonic()
        self._fault_tolerance.progress("saving", self.step)
        states = {student.name: student.state() for student in self._students.students}

        def write() -> None:
            everything = self._inactive | states
            checkpoint.save(self._run.checkpoints, self.step, everything, self._train.keep)
            if self._status:
                self._status.saved(self.step)
                self._write_status("running")
            for student in self._students.students:
                self._write_weights(student, "last", states[student.name].weights)

        run_on_rank_zero(write)
        self._note_progress("save", began)

    def _write_weights(
        self, student: Student, which: Literal["best", "last"], weights: dict[str, Tensor]
    ) -> Path:
        file = self._run.weights(student.name, which)
        model_files.save(file, weights, name=student.name, size=student.size, step=student.progress.steps)
        return file

    def _progress_bar(self) -> tqdm[Any]:
        return tqdm(
            total=self._train.steps,
            initial=self.step,
            unit="step",
            desc="training",
            disable=self._ranks.rank != 0,
            # A log file needs a line now and then, a terminal a bar that moves.
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )

    def _note_progress(self, what: Literal["step", "validation", "save"], began: float) -> None:
        """Tell the watchdog that something begun at `began` is complete, and remember how long it took."""
        self._fault_tolerance.progress("training", self.step)
        if what == "step":
            self._bar.update()
        # The first step of a start loads and compiles.
        if self._status and self.step > self._first_step + (what == "step"):
            self._status.took(what, time.monotonic() - began)

    def _note_stop(self, stop_signal: int, stop: StopRequest) -> None:
        """Record how long it took from the signal to the saved state."""
        if not self._status:
            return
        seconds, name = round(stop.waited(), 2), signal_name(stop_signal)
        logger.info(
            "%s: everything was saved after step %d, %.1f s after the signal", name, self.step, seconds
        )
        self._write_status("running", reason=name, signal={"name": name, "seconds_to_saved": seconds})

    def _write_status(self, state: State, *, at_once: bool = True, **more: Any) -> None:
        if self._status:
            progress = {student.name: asdict(student.progress) for student in self._students.students}
            self._status.write(state, self.step, at_once=at_once, students=progress, **more)

    def close(self, exit_code: int, reason: str) -> None:
        """Leave a truthful STATUS and end the records, also after an error."""
        self._fault_tolerance.progress("ending", self.step)
        ours = self._status and self._fault_tolerance.owns_folder()
        if ours and self._run.read_status().get("state") == "running":
            try:
                self._write_status("failed", exit_code=exit_code, reason=reason)
            except OSError as error:
                logger.warning("the status of %s cannot be written: %s", self._run.path, error)
        if self._recorder:
            self._recorder.close(exit_code)
