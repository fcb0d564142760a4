"""What an export is made from: a run's folder, and clips to check on."""

from __future__ import annotations

from pathlib import Path

import soundfile

from mvat_dist.io import write_json
from mvat_dist.models import weights
from mvat_dist.runs.folder import RunDir
from tests.networks import TINY, loud
from tests.score_records import score, write_scores
from tests.signals import noise_at, syllables


def a_run(path: Path) -> Path:
    """A run's folder with one student, a record of its teacher and data, and scores."""
    folder = RunDir(path)
    made = loud(TINY)
    weights.save(folder.weights("tiny", "best"), made.state_dict(), name="tiny", size=TINY, step=70)
    folder.config.write_text(
        "seed: 5\ndata: {train: '{/secret/en,/secret/de}', valid: 's3://ours/valid', segment_seconds: 4.0}\n"
        "distil: {method: mvat}\ntrain: {steps: 90, batch: 8}\nloss: {waveform: 1.0, pesq: 0.0}\n"
        "teacher: {file: /secret/models/b.pth}\n"
        "runs: /secret/runs\n"
    )
    teacher = {"name": "manner-b", "sha256": "abc123", "file": "/secret/models/b.pth"}
    data = {"/secret/en/train": "11", "/secret/de/train": "22", "s3://ours/valid": "33"}
    init = {"tiny": {"name": "old-tiny", "sha256": "def456"}, "other": {"name": "x", "sha256": "0"}}
    write_json(folder.inputs, {"teacher": teacher, "data": data, "init": init})
    write_json(folder.environment, {"commit": "c0ffee", "host": "secret-host", "packages": {"torch": "2"}})
    scores = {
        "noisy": {"pesq_wb": score(1.5, 0.25)},
        "tiny": {"pesq_wb": score(2.5, 0.25)},
        "log-mmse": {"pesq_wb": score(2.3, 0.25)},
        "other": {"pesq_wb": score(3.9, 0.25)},
    }
    file = folder.path / "evaluate" / "shards-best" / "scores.json"
    file.parent.mkdir(parents=True)
    write_scores(file, {"test_a": scores}, {"tiny": weights.fingerprint(made)}, "/secret/shards")
    return folder.path


def a_test_set(folder: Path) -> Path:
    """Four pairs of clips, of different lengths."""
    for at in range(4):
        clean = syllables(2.0 + 0.3 * at, seed=at)
        for side, audio in (("clean", clean), ("noisy", clean + noise_at(clean, 5.0))):
            (folder / side).mkdir(exist_ok=True)
            soundfile.write(folder / side / f"{at}.wav", audio, 16000)
    return folder
