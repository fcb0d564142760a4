"""The models in docs/models: they load, their cards tell of them, and they improve real recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pesq
import pytest
import soundfile

import mvat_dist
from mvat_dist.config import sizes
from mvat_dist.models import weights
from tests.conftest import REPOSITORY

RATE = 16_000
FILES = sorted((REPOSITORY / "docs" / "models").glob("*.safetensors"))
Array = npt.NDArray[np.float32]


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def si_sdr(estimate: Array, clean: Array) -> float:
    """In dB; Le Roux et al., arXiv 1811.02508."""
    scaled = clean * float(np.dot(estimate, clean) / np.dot(clean, clean))
    return float(10 * np.log10(np.sum(scaled**2) / np.sum((estimate - scaled) ** 2)))


def test_students_are_among_them() -> None:
    assert {file.name.split(".fp16")[0] for file in FILES} & set(sizes.SIZES)


def test_a_card_tells_of_the_file(file: Path) -> None:
    said = file.with_name(file.name.split(".fp16")[0] + ".md").read_text(encoding="utf-8")
    about = weights.load(file).about
    assert about["sha256"] in said
    assert about["licence"] in said
    assert f"`{file.name}`" in said
    assert "test_with_reverb" in said
    assert file.stat().st_size < 5e6


def test_it_improves_recordings_that_it_has_not_heard(file: Path, shared_folder: Path) -> None:
    folder = shared_folder / "corpus" / "test_set" / "synthetic" / "no_reverb"
    model = mvat_dist.load(file, device="cpu")
    gains = []
    for noisy_file in sorted((folder / "noisy").iterdir())[::6]:
        number = noisy_file.stem.rsplit("_", 1)[1]
        noisy, _ = soundfile.read(noisy_file, dtype="float32")
        clean, _ = soundfile.read(folder / "clean" / f"clean_fileid_{number}.flac", dtype="float32")
        enhanced = model.enhance(noisy, RATE)
        gains.append(
            [
                pesq.pesq(RATE, clean, enhanced, "wb") - pesq.pesq(RATE, clean, noisy, "wb"),
                si_sdr(enhanced, clean) - si_sdr(noisy, clean),
            ]
        )
    assert len(gains) == 10
    assert (np.mean(gains, axis=0) > [0.1, 1.0]).all()
