"""The fixed examples of the validations: players and spectrograms, the same clip by every network."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from mvat_dist.evaluation.report.blocks import Block, Fold, Missing, Section, Sound, Sounds, Text
from mvat_dist.evaluation.report.results import teacher_name
from mvat_dist.evaluation.report.spectrogram import picture
from mvat_dist.evaluation.report.study import Study
from mvat_dist.io import read_json, sha256
from mvat_dist.runs.folder import RunDir

_KIND = "audio/flac"
_COMPARE = "To compare with"


@dataclass
class _Example:
    """One clip and the files of what it sounds like."""

    key: str
    groups: dict[str, dict[str, Path]] = field(default_factory=dict)
    """By student, or `_COMPARE`, and by label."""

    def add(self, group: str, label: str, file: Path) -> None:
        """What is known of a label stays: methods and seeds come in their order."""
        if file.is_file():
            self.groups.setdefault(group, {}).setdefault(label, file)


class _Budget:
    """What the page may take of sounds, and what did not fit."""

    def __init__(self, most_bytes: int) -> None:
        self.left, self.omitted = most_bytes, 0

    def fits(self, sound: Sound) -> bool:
        size = len(sound.audio) + len(sound.picture)
        if size > self.left:
            self.omitted += 1
            return False
        self.left -= size
        return True


def section(study: Study, most_bytes: int) -> Section:
    """Every example, as far as `most_bytes` of FLAC and pictures go."""
    title = "To listen to"
    examples = _examples(study)
    if not examples:
        return Section(title, [Missing("No sounds: no run kept examples (--track.examples).")])
    blocks: list[Block] = [
        Text(
            "The start of fixed validation clips; the students as of their last validation, the lowest seed "
            "of each method. Pictures: 0 to 8 kHz upwards, time to the right, equal colours for equal levels."
        )
    ]
    budget = _Budget(most_bytes)
    for number, example in enumerate(examples):
        shown = _shown(example, study, budget)
        if shown:
            inner = Section(example.key, shown)
            blocks.append(inner if number == 0 else Fold(f"Another clip: {example.key}", [inner]))
    if budget.omitted:
        blocks.append(
            Missing(
                f"{budget.omitted} sounds are left out to keep the page small: --audio-mb sets the limit."
            )
        )
    return Section(title, blocks)


def _shown(example: _Example, study: Study, budget: _Budget) -> list[Block]:
    """The groups of an example, as far as they can be played and fit."""
    blocks: list[Block] = []
    for group in (_COMPARE, *study.sizes):
        found = [_sound(label, path, study.problems) for label, path in example.groups.get(group, {}).items()]
        sounds = [sound for sound in found if sound is not None and budget.fits(sound)]
        if sounds:
            blocks.append(Sounds(group, sounds))
    return blocks


def _examples(study: Study) -> list[_Example]:
    """The examples of all runs; the same clip is one example."""
    found: dict[str, _Example] = {}
    for _, method in study.main:
        for run in method.runs:
            for name in run.sizes:
                home = RunDir(run.home_of(name))
                for place, key in _clips(home, study.problems):
                    folder = home.examples / place
                    same = _fingerprint(folder / "noisy.flac")
                    if same is None:
                        continue
                    example = found.setdefault(same, _Example(key))
                    example.add(_COMPARE, "noisy input", folder / "noisy.flac")
                    example.add(_COMPARE, "clean", folder / "clean.flac")
                    example.add(_COMPARE, teacher_name(run.teacher), folder / "teacher.flac")
                    example.add(name, method.label, home.student(name) / "examples" / f"{place}.flac")
    return list(found.values())


def _fingerprint(file: Path) -> str | None:
    return sha256(file) if file.is_file() else None


def _clips(home: RunDir, problems: list[str]) -> list[tuple[str, str]]:
    """Folder name and key of each example."""
    record = home.examples / "examples.json"
    try:
        keys = read_json(record)["keys"]
        return [(f"{place:02d}", str(key)) for place, key in enumerate(keys)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{record} is damaged: its sounds are left out ({error})"
        if problem not in problems:  # it is read once for each student
            problems.append(problem)
        return []


def _sound(label: str, path: Path, problems: list[str]) -> Sound | None:
    try:
        audio = path.read_bytes()
        samples, _ = soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        problems.append(f"{path} cannot be played and is left out ({error})")
        return None
    return Sound(label, audio, _KIND, picture(samples[:, 0]))
