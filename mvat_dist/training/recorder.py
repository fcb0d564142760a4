"""Records of a run: rows of training and validation, examples to hear and see, a table of the students.

In the run's folder: ``examples/NN/{noisy,clean,teacher}.flac`` and, in each student's, ``examples/NN.flac``
as of its last validation; beside each its spectrogram, ``.png``. ``examples/examples.json`` names the clips.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn

from mvat_dist.config.schema import SAMPLE_RATE, TrackConfig
from mvat_dist.data.clips import UnusableClipError
from mvat_dist.evaluation.spectrogram import spectrogram_png
from mvat_dist.evaluation.statistics import Statistics
from mvat_dist.evaluation.validate import Audio, Clips, enhance
from mvat_dist.io import atomic_file, make_folder, write_json
from mvat_dist.launch.uploader import Uploader
from mvat_dist.runs import uploads
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History, Row, is_validation
from mvat_dist.runs.uploads import Attachment, cost
from mvat_dist.training import throughput
from mvat_dist.training.students import Student
from mvat_dist.training.teacher import Teacher

logger = logging.getLogger(__name__)

EXAMPLE_SECONDS = 4.0
"""How much of each example clip is kept, from its start."""

_AUDIO, _SPECTROGRAM = ".flac", ".png"


class Recorder:
    """The histories of one start of a run and W&B's copy of them; made on rank 0 only."""

    def __init__(
        self,
        config: TrackConfig,
        run: RunDir,
        students: Sequence[Student],
        examples: Examples | None,
    ) -> None:
        """Go on with the histories from where each student is.

        Args:
            config: of W&B.
            run: the run's folder.
            students: in the order of the run.
            examples: clips that every validated student enhances, if any.
        """
        self._config, self._run = config, run
        self._sizes = {student.name: student.size for student in students}
        for name in self._sizes:
            run.student(name).mkdir(parents=True, exist_ok=True)
        self._histories = {name: History(run.history(name)) for name in self._sizes}
        for student in students:
            # A student may have been validated before its first step: it is validated again.
            self._histories[student.name].rewind(student.progress.steps or -1)
        self._scores = {name: _last_validation(history.rows()) for name, history in self._histories.items()}
        self._uploader = _start_uploader(config, run)
        self._examples = examples

    def log_training(self, step: int, rows: Mapping[str, Row]) -> None:
        """Append one row of training per student."""
        for name, row in rows.items():
            self._histories[name].append({"step": step, **row})

    def log_validation(
        self, step: int, rows: Mapping[str, Row], networks: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        """Append one row of validation per student, with the examples as the `networks` enhance them."""
        for name, row in rows.items():
            self._scores[name] = {"step": step, **row}
        for name, row in rows.items():
            attachment = Attachment(step)
            if self._examples:
                attachment = self._examples.enhance(name, step, networks[name], device)
            if name == next(iter(rows)):
                attachment = replace(attachment, tables={"students": self.table()})
            if self._uploader:
                uploads.attach(self._run.student(name), attachment)
            self._histories[name].append({"step": step, **row})

    def log_best_weights(self, student: Student, file: Path, metric: str) -> None:
        """Hand the student's best weights to W&B, where that is asked for."""
        if self._config.artifacts and self._uploader:
            about = {
                "step": student.progress.steps,
                "student": student.name,
                "size": asdict(student.size),
                metric: student.progress.best,
                **cost(student.size),
            }
            uploads.attach_weights(self._run.student(student.name), file, student.progress.steps, about)

    def table(self) -> list[Row]:
        """What each student costs, and its scores at its last validation."""
        keys = list(dict.fromkeys(key for scores in self._scores.values() for key in scores))
        return [
            {"student": name, **cost(size), **{key: self._scores[name].get(key) for key in keys}}
            for name, size in self._sizes.items()
        ]

    def close(self, exit_code: int) -> None:
        """End W&B's copy of a training that ends with `exit_code`."""
        if self._uploader:
            self._uploader.finish(exit_code)


def _start_uploader(config: TrackConfig, run: RunDir) -> Uploader | None:
    """Start the copy at W&B; None where it is not asked for, or no process can be started.

    Raises:
        UserError: WANDB_MODE is no mode of W&B.
    """
    if uploads.mode(config) == "disabled":
        return None
    try:
        return Uploader(run)
    except OSError as error:  # too many processes, no memory, a full disk: no reason to end a training
        logger.warning("no W&B: its process cannot be started (%s). %s", error, uploads.advice(run.path))
        return None


def _last_validation(rows: Sequence[Row]) -> Row:
    return next((row for row in reversed(rows) if is_validation(row)), {})


def training_row(student: Student, lr: float, speed: float | None, shares: Mapping[str, float]) -> Row:
    """One student's row: means over all ranks and over the steps since the last row.

    Args:
        student: its metrics start a new row.
        lr: learning rate of the last step, before the student's own factor.
        speed: seconds of audio per second of training, of all students together.
        shares: of the time, by section.
    """
    return {
        **student.metrics.compute_and_reset(),
        "lr": lr * student.progress.lr_factor,
        "gradient_norm": student.engine.gradient_norm,
        "skipped": student.progress.skipped,
        "audio_seconds_per_second": speed,
        "memory": peak_memory(student.engine.device),
        "time": throughput.of_student(student.name, shares),
    }


def validation_row(scores: Mapping[str, Statistics]) -> Row:
    """Mean, ends of its 95 % interval and failures, by metric; higher is better but for the failures."""
    row: Row = {}
    for metric, statistics in scores.items():
        row[f"valid/{metric}"] = statistics.mean
        row |= {f"valid/{metric}_low": statistics.low, f"valid/{metric}_high": statistics.high}
        row[f"valid/{metric}_failed"] = sum(statistics.failed.values())
    return row


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has had at once so far, in GB: RAM, and tensors on the GPU."""
    peak = {"rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        peak["cuda_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak


class Examples:
    """A few validation clips, the same at every validation, and the teacher's output for them."""

    def __init__(self, run: RunDir, clips: Clips, count: int, teacher: Teacher | None) -> None:
        """Choose at most `count` clips, spread over all; reads nothing yet."""
        self._run, self._clips, self._teacher = run, clips, teacher
        self._chosen = sorted({place * len(clips) // count for place in range(count)}) if len(clips) else []
        self._audio: list[dict[str, Audio]] | None = None
        self._keys: list[str] = []
        self._sent: set[str] = set()

    def enhance(self, name: str, step: int, network: nn.Module, device: torch.device) -> Attachment:
        """Have the student's `network`, in eval mode, enhance the clips; writes and names the files."""
        if self._audio is None:
            self._audio = self._open(device)
        files: dict[str, str] = {}
        for place, audio in enumerate(self._audio):
            stem = self._run.student(name) / "examples" / f"{place:02d}"
            _write(stem, enhance(network, audio["noisy"], device))
            stems = {"student": stem}
            if name not in self._sent:  # the others stay what they are
                stems |= {kind: self._stem(place, kind) for kind in audio}
            for kind, stem in stems.items():
                files[f"examples/{place:02d}/{kind}"] = str(stem.with_suffix(_AUDIO))
                files[f"examples/{place:02d}/{kind}-spectrogram"] = str(stem.with_suffix(_SPECTROGRAM))
        self._sent.add(name)
        return Attachment(step, files, {key: self._keys[int(key.split("/")[1])] for key in files})

    def _open(self, device: torch.device) -> list[dict[str, Audio]]:
        """Read the clips and run the teacher; a clip that cannot be read is left out, as in scoring."""
        examples: list[dict[str, Audio]] = []
        for index in self._chosen:
            try:
                key, noisy, clean = self._clips[index]
            except UnusableClipError as error:
                logger.warning("no example: %s", error)
                continue
            length = round(EXAMPLE_SECONDS * SAMPLE_RATE)
            audio = {"noisy": noisy[:length], "clean": clean[:length]}
            if self._teacher:
                enhanced = self._teacher.enhance(torch.from_numpy(audio["noisy"])[None].to(device))
                if enhanced is not None:
                    audio["teacher"] = enhanced[0].float().cpu().numpy()
            for kind, signal in audio.items():
                _write(self._stem(len(examples), kind), signal)
            self._keys.append(key)
            examples.append(audio)
        write_json(self._run.examples / "examples.json", {"keys": self._keys, "seconds": EXAMPLE_SECONDS})
        return examples

    def _stem(self, place: int, kind: str) -> Path:
        return self._run.examples / f"{place:02d}" / kind


def _write(stem: Path, audio: Audio) -> None:
    """Write FLAC of 16 bits, in which what exceeds full scale is clipped, and the spectrogram."""
    make_folder(stem.parent)
    with atomic_file(stem.with_suffix(_AUDIO)) as temporary:
        soundfile.write(temporary, np.clip(audio, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    with atomic_file(stem.with_suffix(_SPECTROGRAM)) as temporary:
        temporary.write_bytes(spectrogram_png(audio))
