"""Sound and spectrograms of a few validation clips, the same ones at every validation.

In the run's folder: ``examples/NN/{noisy,clean,teacher}.flac`` and, in each student's, ``examples/NN.flac``
as of its last validation; beside each its spectrogram, ``.png``. ``examples/examples.json`` names the clips.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import nn

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.clips import UnusableClipError
from mvat_dist.evaluation.report.spectrogram import picture
from mvat_dist.evaluation.validate import Audio, Clips, enhance
from mvat_dist.io import atomic_file, make_folder, write_json
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.wandb_rows import Extras
from mvat_dist.training.teacher import Teacher

logger = logging.getLogger(__name__)

SECONDS = 4.0
"""Of each clip that is heard and kept, from its start."""

_SOUND, _PICTURE = ".flac", ".png"


class Examples:
    """The chosen clips and what the teacher makes of them; made on one rank."""

    def __init__(self, run: RunDir, clips: Clips, count: int, teacher: Teacher | None) -> None:
        """Choose at most `count` clips, spread over all; reads nothing yet."""
        self._run, self._clips, self._teacher = run, clips, teacher
        # As many as are asked for, at equal distances.
        self._chosen = sorted({place * len(clips) // count for place in range(count)}) if len(clips) else []
        self._sounds: list[dict[str, Audio]] | None = None
        self._keys: list[str] = []
        self._sent: set[str] = set()

    def of(self, name: str, network: nn.Module, device: torch.device) -> Extras:
        """Have the student's `network`, in eval mode, enhance the clips; writes and names the files."""
        if self._sounds is None:
            self._sounds = self._open(device)
        files: dict[str, Path] = {}
        for place, sounds in enumerate(self._sounds):
            own = self._run.student(name) / "examples" / f"{place:02d}"
            _write(own, enhance(network, sounds["noisy"], device))
            stems = {"student": own}
            if name not in self._sent:  # these stay what they are
                stems |= {which: self._stem(place, which) for which in sounds}
            for which, stem in stems.items():
                files[f"examples/{place:02d}/{which}"] = stem.with_suffix(_SOUND)
                files[f"examples/{place:02d}/{which}-spectrogram"] = stem.with_suffix(_PICTURE)
        self._sent.add(name)
        return Extras(files, {key: self._keys[int(key.split("/")[1])] for key in files})

    def _open(self, device: torch.device) -> list[dict[str, Audio]]:
        """Read the clips and ask the teacher; one that cannot be read is left out, as in scoring."""
        found: list[dict[str, Audio]] = []
        for index in self._chosen:
            try:
                key, noisy, clean = self._clips[index]
            except UnusableClipError as error:
                logger.warning("no example: %s", error)
                continue
            length = round(SECONDS * SAMPLE_RATE)
            sounds = {"noisy": noisy[:length], "clean": clean[:length]}
            if self._teacher:
                told = self._teacher.enhance(torch.from_numpy(sounds["noisy"])[None].to(device))
                if told is not None:
                    sounds["teacher"] = told[0].float().cpu().numpy()
            for which, sound in sounds.items():
                _write(self._stem(len(found), which), sound)
            self._keys.append(key)
            found.append(sounds)
        write_json(self._run.examples / "examples.json", {"keys": self._keys, "seconds": SECONDS})
        return found

    def _stem(self, place: int, which: str) -> Path:
        return self._run.examples / f"{place:02d}" / which


def _write(stem: Path, sound: Audio) -> None:
    """FLAC of 16 bits, in which what exceeds full scale is clipped, and the sound's spectrogram."""
    make_folder(stem.parent)
    with atomic_file(stem.with_suffix(_SOUND)) as temporary:
        soundfile.write(temporary, np.clip(sound, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    with atomic_file(stem.with_suffix(_PICTURE)) as temporary:
        temporary.write_bytes(picture(sound))
