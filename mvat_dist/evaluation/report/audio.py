"""Collect the sounds of a report: the examples of the validations, the same clip by every network."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from mvat_dist.errors import UserError
from mvat_dist.evaluation.report.study import Study
from mvat_dist.evaluation.spectrogram import spectrogram_png
from mvat_dist.io import read_record, sha256
from mvat_dist.runs.folder import RunDir

_COMPARE = "To compare with"


@dataclass(frozen=True)
class Sound:
    """A player and a picture of what it plays."""

    label: str
    flac: bytes
    spectrogram: bytes
    """PNG."""


@dataclass(frozen=True)
class Example:
    """One clip as several networks enhance it."""

    key: str
    groups: dict[str, list[Sound]]
    """By student, or under `_COMPARE` the noisy, the clean and the teacher's."""


@dataclass(frozen=True)
class ExampleKeys:
    """What a report reads of ``examples/examples.json``."""

    keys: list[str]


@dataclass
class _Files:
    """The files of one example."""

    key: str
    groups: dict[str, dict[str, Path]] = field(default_factory=dict)
    """By group and label."""

    def add(self, group: str, label: str, file: Path) -> None:
        """Add a file that is there; an earlier one of the same label stays, as seeds come in order."""
        if file.is_file():
            self.groups.setdefault(group, {}).setdefault(label, file)


def load_examples(study: Study, most_bytes: int, problems: list[str]) -> tuple[list[Example], int]:
    """Every example as far as `most_bytes` of FLAC and pictures go, and how many sounds did not fit.

    A file that cannot be played is left out and named in `problems`.
    """
    examples, bytes_left, omitted = [], most_bytes, 0
    for files in _example_files(study, problems):
        groups: dict[str, list[Sound]] = {}
        for group in (_COMPARE, *study.sizes):
            for label, file in files.groups.get(group, {}).items():
                sound = _sound(label, file, problems)
                if sound is None:
                    continue
                size = len(sound.flac) + len(sound.spectrogram)
                if size > bytes_left:
                    omitted += 1
                else:
                    bytes_left -= size
                    groups.setdefault(group, []).append(sound)
        if groups:
            examples.append(Example(files.key, groups))
    return examples, omitted


def _example_files(study: Study, problems: list[str]) -> list[_Files]:
    """The examples of all runs, those of the lowest seed first; the same clip is one example."""
    examples: dict[str, _Files] = {}
    for _, method in study.main:
        for run in method.runs:
            for place, key in _example_keys(run.folder, problems):
                folder = run.folder.examples / place
                noisy = folder / "noisy.flac"
                if not noisy.is_file():
                    continue
                files = examples.setdefault(sha256(noisy), _Files(key))
                files.add(_COMPARE, "noisy input", noisy)
                files.add(_COMPARE, "clean", folder / "clean.flac")
                files.add(_COMPARE, run.teacher_label, folder / "teacher.flac")
                for student in run.sizes:
                    enhanced = run.folder.student(student) / "examples" / f"{place}.flac"
                    files.add(student, method.label, enhanced)
    return list(examples.values())


def _example_keys(run: RunDir, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Folder name and clip key of each example."""
    record = run.examples / "examples.json"
    try:
        keys = read_record(record, ExampleKeys).keys
    except FileNotFoundError:
        return
    except (OSError, UserError) as error:
        problems.append(f"{record} is damaged: its sounds are left out ({error})")
        return
    for place, key in enumerate(keys):
        yield f"{place:02d}", key


def _sound(label: str, file: Path, problems: list[str]) -> Sound | None:
    try:
        flac = file.read_bytes()
        samples, _ = soundfile.read(io.BytesIO(flac), dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        problems.append(f"{file} cannot be played and is left out ({error})")
        return None
    return Sound(label, flac, spectrogram_png(samples[:, 0]))
