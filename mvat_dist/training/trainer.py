"""The life of a run on one rank: step, record, validate, save, stop, go on."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mvat_dist.config.schema import Config
from mvat_dist.distributed import collectives
from mvat_dist.distributed.collectives import run_on_all_ranks
from mvat_dist.distributed.device import Precision
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError
from mvat_dist.evaluation.statistics import statistics_by_model
from mvat_dist.evaluation.validate import validate
from mvat_dist.models import weights as modelfile
from mvat_dist.models.manner import Manner
from mvat_dist.runs.folder import RunDir, State
from mvat_dist.runs.status import RunState, signal_name, words_of
from mvat_dist.training import checkpoint, energy, recovery, setup, throughput
from mvat_dist.training.fault_tolerance import Guard
from mvat_dist.training.prefetch import Intake
from mvat_dist.training.recorder import Record, peak_memory, validation_row
from mvat_dist.training.schedule import Hyperparameters
from mvat_dist.training.stopping import StopRequest
from mvat_dist.training.students import Student

logger = logging.getLogger(__name__)

VALIDATION_METRICS = ("pesq_wb", "stoi", "si_sdr")

_UNREAD = 1 << 8
"""Above every signal's number: what a rank tells the others where it cannot read the next step's data."""
_FOLDER_LOST = 1 << 16
"""Above that: what rank 0 tells the others where the folder is no longer its own."""


class Trainer:
    """One rank of a run."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        run: RunDir,
        device: torch.device,
        precision: Precision,
        guard: Guard,
    ) -> None:
        """Open everything, on all ranks together.

        Raises:
            UserError: anything about the data, the teacher or the folder that the user can mend.
            BusyError: another process trains the run.
        """
        self.config = config
        self.guard = guard
        self.ranks = ranks
        self.run = run
        self.device = device
        self.inputs = run_on_all_ranks(lambda: setup.open_inputs(config, ranks.world_size, device, precision))
        guard.enter()
        found = setup.claim_folder(run, config, self.inputs, ranks)
        self.step = setup.position(config, found)
        self.state = run_on_all_ranks(lambda: self._begin() if ranks.rank == 0 else None)
        try:
            self.fleet = setup.build_fleet(config, ranks, run, self.inputs, found, device, precision)
            self._left_out = setup.left_out(found, config) if ranks.rank == 0 else {}
            self.record = run_on_all_ranks(lambda: self._open_record() if ranks.rank == 0 else None)
        except Exception as error:
            self._fail_to_start(error)
            raise
        self._energy = energy.Meter(device, energy.counter_of(device, ranks, whole_nodes=True))
        self._first = self.step
        self._steps_in_row = 0
        self._intake: Intake

    @property
    def finished(self) -> bool:
        """Whether every step has been done."""
        return self.step >= self.config.train.steps

    def _begin(self) -> RunState:
        """Note this start before anything else can fail."""
        state = RunState(self.run, self.config.train.steps, self.step)
        state.write("running", self.step)
        return state

    def _fail_to_start(self, error: Exception) -> None:
        """Have STATUS say why: it says already that the run has begun."""
        if self.state and self.guard.intact():
            code = error.code if isinstance(error, UserError) else 1
            with suppress(OSError):
                self.state.write("failed", self.step, exit_code=code, reason=words_of(error))

    def _open_record(self) -> Record:
        return Record(self.config, self.run, self.ranks, self.fleet.students, self.inputs)

    def train(self, stop: StopRequest) -> int:
        """All remaining steps, or as many as fit before somebody asks to stop.

        Returns:
            The signal that stopped the run, the same on every rank; 0 where it is finished.
        """
        train = self.config.train
        self._status("running")
        self.guard.progress("starting", self.step)
        # The last start may have stopped before it could, and given weights may be the best ever.
        if (self.step or train.init) and self._due(train.validate_every):
            waiting = [one for one in self.fleet.at(self.step) if one.progress.validated < self.step]
            if waiting:
                self._validate(waiting)
        intake = self._intake = Intake(self.config, self.inputs.data, self.ranks, self.step)
        clock = self.fleet.stopwatch
        recovery.refuse_if_hopeless(self.fleet, self.config, self.run, self.ranks)
        reason = 0
        clock.lap()  # starting up is no part of the first row's speed, or of its energy
        self._energy.lap()
        with self._progress_bar() as bar:
            self._read_ahead()
            run_on_all_ranks(intake.check)
            while not self.finished and not reason:
                began = time.monotonic()
                micro_batches = intake.take()
                now = self.fleet.step(micro_batches, self.step)
                self.step += 1
                self._steps_in_row += 1
                intake.count_damage(micro_batches, self.device)
                self._read_ahead()
                self._done("step", began)
                bar.update()
                with clock.section("communication"):
                    told = self._agreed(stop)
                reason = 0 if told == _UNREAD else told
                self._after_step(now, bar, stopping=bool(reason))
                if told == _UNREAD:
                    run_on_all_ranks(intake.check)
        if reason:
            self._say_saved(reason, stop)
        self._status("finished" if self.finished else "stopped")
        return reason

    def _read_ahead(self) -> None:
        if not self.finished:
            with self.fleet.stopwatch.section("data"):
                self._intake.read_ahead()

    def _agreed(self, stop: StopRequest) -> int:
        """The signal on which all ranks stop after this step; 0 where they go on, or are done anyway.

        `_UNREAD` where some rank has no data for the next one.

        Raises:
            UserError: the folder was removed, or another process has taken the run over.
        """
        train = self.config.train
        writes = any(
            self._due(every) for every in (self.config.track.every, train.validate_every, train.save_every)
        )
        writes = writes or bool(stop.signal)
        lost = self.ranks.rank == 0 and writes and not self._folder_is_ours()
        here = _UNREAD if self._intake.failed else stop.signal
        told = collectives.all_reduce_max(_FOLDER_LOST if lost else here)
        if told == _FOLDER_LOST:
            raise self.guard.lost()
        return 0 if self.finished else told

    def _folder_is_ours(self) -> bool:
        return self.guard.intact() and all(
            self.run.student(student.name).is_dir() for student in self.fleet.students
        )

    def _done(self, what: Literal["step", "validation", "save"], began: float) -> None:
        """Something that began at `began` is complete: tell the watchdog, and remember how long it took."""
        self.guard.progress("training", self.step)
        self._energy.look()
        # The first step of a start loads and compiles.
        if self.state and self.step > self._first + (what == "step"):
            self.state.took(what, time.monotonic() - began)

    def _say_saved(self, reason: int, stop: StopRequest) -> None:
        """Record how long it took from the signal to the saved state."""
        if not self.state:
            return
        seconds, name = round(stop.waited(), 2), signal_name(reason)
        logger.info(
            "%s: everything was saved after step %d, %.1f s after the signal", name, self.step, seconds
        )
        self._status("running", reason=name, signal={"name": name, "seconds_to_saved": seconds})

    def _after_step(self, now: Hyperparameters, bar: tqdm[Any], *, stopping: bool) -> None:
        """Record, validate and save where the step number says so; save at once when stopping."""
        train, clock = self.config.train, self.fleet.stopwatch
        recovery.relieve(self.fleet, self.config, self.run, self.ranks)
        if self._due(self.config.track.every):
            with clock.section("logging"):
                self._record(now, bar)
        if self._due(train.validate_every) and not stopping:
            with clock.section("validation"):
                self._validate(self._well)
        if self._due(train.save_every) or stopping:
            with clock.section("checkpoint"):
                self._save()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.finished

    def _record(self, now: Hyperparameters, bar: tqdm[Any]) -> None:
        """One row per student: means over all ranks and over the steps since the last row."""
        elapsed, shares = self.fleet.stopwatch.lap()
        heard = self._steps_in_row * self.config.train.batch * self.config.data.segment_seconds
        speed = throughput.speed(heard, elapsed, shares)
        self._steps_in_row = 0
        losses, rows, memory = {}, {}, peak_memory(self.device)
        joules = self._energy.lap()
        for student in self._well:
            row: dict[str, Any] = {
                **student.meter.take_row(),
                "lr": now.lr * student.progress.lr_factor,
                "gradient_norm": student.engine.gradient_norm,
                "skipped": student.progress.skipped,
                "audio_seconds_per_second": speed,
                "memory": memory,
                "time": throughput.of_student(student.name, shares),
            }
            if joules is not None:
                row["joules"] = joules
            if self._intake.damaged is not None:
                row["damaged"] = self._intake.damaged
            losses[student.name.removeprefix("manner-")] = f"{row['loss']:.3f}"
            rows[student.name] = row
        bar.set_description(f"training ({throughput.in_words(shares)})", refresh=False)
        bar.set_postfix(losses, refresh=False)

        def write() -> None:
            if self.record:
                self.record.trained(self.step, rows)
            self._status("running", at_once=False, audio_seconds_per_second=speed, time_shares=shares)

        run_on_all_ranks(write)

    @property
    def _well(self) -> list[Student]:
        """Students that made the last step and were not given up after it."""
        return [student for student in self.fleet.stepped if not student.progress.given_up]

    def _validate(self, learning: list[Student]) -> None:
        """Score students on the held-out clips; keep the weights of the best score of each."""
        began = time.monotonic()
        self.guard.progress("validating", self.step)
        weights = {student.name: student.engine.weights() for student in learning}
        networks = {student.name: self._plain_copy(student, weights[student.name]) for student in learning}
        scored = validate(
            networks,
            self.inputs.clips,
            VALIDATION_METRICS,
            device=self.device,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            gather=collectives.all_gather_object,
        )
        means = statistics_by_model(scored, VALIDATION_METRICS)
        rows = {student.name: validation_row(means[student.name]) for student in learning}
        improved: list[Student] = []
        for student in learning:
            student.progress.validated = self.step
            score, best = means[student.name][self.config.valid.best].mean, student.progress.best
            if score is not None and (best is None or score > best):
                student.progress.best = score
                improved.append(student)

        def write() -> None:
            if self.record is None:
                return
            self.record.validated(self.step, rows, networks, self.device)
            for student in improved:
                file = self._write_weights(student, "best", weights[student.name])
                self.record.improved(student, file)

        run_on_all_ranks(write)
        self._done("validation", began)

    def _plain_copy(self, student: Student, weights: dict[str, Tensor]) -> Manner:
        """The student outside its engine: under ZeRO stage 3 an engine's forward is collective, and ranks
        score different numbers of clips. It is also what a user would load."""
        network = Manner(student.size)
        network.load_state_dict(weights)
        return network.to(self.device).eval()

    def _save(self) -> None:
        """A checkpoint of all students, and the weights that users take away."""
        began = time.monotonic()
        self.guard.progress("saving", self.step)
        states = {student.name: student.state() for student in self.fleet.students}

        def write() -> None:
            kept = self._left_out | states
            checkpoint.save(self.run.checkpoints, self.step, kept, self.config.train.keep)
            if self.state:
                self.state.saved(self.step)
                self._status("running")
            for student in self.fleet.students:
                self._write_weights(student, "last", states[student.name].weights)

        run_on_all_ranks(lambda: write() if self.ranks.rank == 0 else None)
        self._done("save", began)

    def _write_weights(
        self, student: Student, which: Literal["best", "last"], weights: dict[str, Tensor]
    ) -> Path:
        file = self.run.weights(student.name, which)
        modelfile.save(file, weights, name=student.name, size=student.size, step=student.progress.steps)
        return file

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

    def _status(self, state: State, *, at_once: bool = True, **more: Any) -> None:
        if self.state:
            progress = {student.name: asdict(student.progress) for student in self.fleet.students}
            self.state.write(state, self.step, at_once=at_once, students=progress, **more)

    def close(self, exit_code: int, reason: str) -> None:
        """Leave a truthful status and close the record, also after an error."""
        self.guard.progress("ending", self.step)
        if self.state and self.guard.intact() and self.run.read_status().get("state") == "running":
            try:
                self._status("failed", exit_code=exit_code, reason=reason)
            except OSError as error:
                logger.warning("the status of %s cannot be written: %s", self.run.path, error)
        if self.record:
            self.record.finish(exit_code)
