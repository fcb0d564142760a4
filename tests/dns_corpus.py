"""Write small corpora in the DNS-Challenge layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from tests.signals import syllables

RATE = 16_000


def write(path: Path, audio: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype=subtype)
    return path


def speech(seed: int, seconds: float = 1.5) -> np.ndarray:
    return syllables(seconds, per_second=2 + seed % 5, seed=seed)


def noise(seed: int, seconds: float = 2.0, rate: int = RATE) -> np.ndarray:
    return 0.05 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


def write_dns(corpus: Path, readers: int = 5, noises: int = 4) -> Path:
    """Sources in DNS layout: three utterances of each reader, two pieces of each noise, two rooms."""
    for reader in range(readers):
        for part in range(3):
            name = f"book_00001_chp_0001_reader_{reader:05d}_{part}.wav"
            write(corpus / "datasets_fullband/clean_fullband/read_speech" / name, speech(3 * reader + part))
    for recording in range(noises):
        for part in range(2):
            name = f"door_Freesound_validated_{recording}_{part}.wav"
            write(corpus / "datasets_fullband/noise_fullband" / name, noise(100 + 2 * recording + part))
    for room in range(2):
        response = np.exp(-np.arange(3000) / 500) * noise(200 + room, 3000 / RATE)
        write(corpus / "datasets_fullband/impulse_responses/SLR26" / f"room_{room}.wav", response)
    return corpus
