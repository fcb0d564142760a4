"""Clips that cannot be scored, or only with care: each is a recorded failure, and the others are scored."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mvat_dist.config.sizes import Size
from mvat_dist.data.clips import UnusableClipError, ValidationClips
from mvat_dist.errors import UserError
from mvat_dist.evaluate import main
from mvat_dist.models import weights
from mvat_dist.models.manner import build
from tests.signals import noise_at, syllables

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Size("small", 8, depth=2)


def write_pair(folder: Path, key: str, noisy: np.ndarray, clean: np.ndarray) -> None:
    for side, audio in (("noisy", noisy), ("clean", clean)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / side / f"{key}.wav", audio, 16000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one pair that can be scored, at 12 dB."""
    clean = syllables(1.0)
    write_pair(tmp_path / "pairs", "good", clean + noise_at(clean, 12), clean)
    return tmp_path / "pairs"


def evaluate(folder: Path, *models: str) -> Path:
    out = folder.parent / "out"
    main(
        [*models, "--data", str(folder), "--metrics", "si_sdr,segsnr", "--processes", "1", "--out", str(out)]
    )
    return out


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_pair_of_no_samples_is_a_recorded_failure(folder, tmp_path):
    weights.save(tmp_path / "tiny.safetensors", build(TINY).state_dict(), name="tiny", size=TINY, step=1)
    write_pair(folder, "empty", np.zeros(0), np.zeros(0))
    rows = rows_of(evaluate(folder, str(tmp_path / "tiny.safetensors"), "log-mmse"))
    empty = [row for row in rows if row["key"] == "noisy/empty.wav"]
    assert [row["model"] for row in empty] == ["noisy", "tiny", "log-mmse"]
    for row in empty:
        assert (row["si_sdr"], row["duration_s"], row["snr_db"]) == (None, 0.0, None)
        assert row["failure"] == {"si_sdr": "no samples", "segsnr": "no samples"}
    assert all(row["failure"] is None for row in rows if row not in empty)


def test_failures_are_counted_by_reason_and_name_their_file_in_the_row(folder):
    clean = syllables(1.0)
    for number in range(2):
        write_pair(folder, f"broken_{number}", clean, clean)
        (folder / "noisy" / f"broken_{number}.wav").write_bytes(b"RIFF, but not really")
        write_pair(folder, f"short_{number}", clean, clean[: 9000 + number])
    out = evaluate(folder)
    (section,) = json.loads((out / "scores.json").read_text())["sections"].values()
    reasons = {"does not open as audio": 2, "halves of different length": 2}
    assert section["scores"]["noisy"]["si_sdr"]["failed"] == reasons
    told = [line for line in (out / "scores.md").read_text().splitlines() if line.startswith("- ")]
    assert sorted(told) == sorted(
        f"- {reason}: 2 of 5 clips without SI-SDR, SegSNR of noisy" for reason in reasons
    )
    problems = {row["key"]: row["problem"] for row in rows_of(out) if "problem" in row}
    assert len(problems) == 4
    assert all(str(folder / key) in problem for key, problem in problems.items())


def test_the_snr_of_a_silent_noisy_file_is_not_known(folder):
    write_pair(folder, "lost", np.zeros(16000), syllables(1.0))
    out = evaluate(folder)
    assert {row["key"]: row["snr_db"] for row in rows_of(out)} == {
        "noisy/good.wav": pytest.approx(12.0, abs=0.1),
        "noisy/lost.wav": None,
    }
    (section,) = json.loads((out / "scores.json").read_text())["sections"].values()
    assert list(section["buckets"]) == ["10..15 dB"]
    # A mean of one clip has no interval, in the record or in the table.
    known = section["scores"]["noisy"]["si_sdr"]
    assert (known["clips"], known["low"], known["high"]) == (1, None, None)
    assert f"| noisy | {known['mean']:.2f} n=1 |" in " ".join((out / "scores.md").read_text().split())


@pytest.mark.parametrize("told", [0, 2**36 - 1], ids=["unknown", "impossible"])
def test_a_flac_whose_length_is_not_told_is_read_to_its_end(tmp_path, told):
    stereo = 0.1 * np.random.default_rng(0).standard_normal((3 * 48000, 2))
    for side in ("noisy", "clean"):
        (tmp_path / side).mkdir()
        soundfile.write(tmp_path / side / "a.flac", stereo, 48000)
    whole = ValidationClips(tmp_path)[0].noisy
    for side in ("noisy", "clean"):
        file = tmp_path / side / "a.flac"
        content = bytearray(file.read_bytes())
        # STREAMINFO begins at byte 8; the low 36 bits of its bytes 13 to 17 are the number of samples.
        bits = int.from_bytes(content[21:26], "big") >> 36 << 36 | told
        content[21:26] = bits.to_bytes(5, "big")
        file.write_bytes(content)
        assert soundfile.info(file).frames > 2**35
    np.testing.assert_array_equal(ValidationClips(tmp_path)[0].noisy, whole)
    np.testing.assert_array_equal(ValidationClips(tmp_path, max_seconds=0.5)[0].clean, whole[:8000])


def test_a_flac_that_promises_more_than_it_has_is_not_usable(tmp_path):
    """Nor is memory taken for what it promises: here 128 GB."""
    for side in ("noisy", "clean"):
        (tmp_path / side).mkdir()
        soundfile.write(tmp_path / side / "a.flac", np.zeros(16000), 16000)
        content = bytearray((tmp_path / side / "a.flac").read_bytes())
        content[21:26] = (int.from_bytes(content[21:26], "big") >> 36 << 36 | 2**35 - 1).to_bytes(5, "big")
        (tmp_path / side / "a.flac").write_bytes(content)
    with pytest.raises(
        UnusableClipError, match=r"a\.flac is not usable \(truncated: \d+ samples are missing"
    ):
        ValidationClips(tmp_path)[0]


def test_a_file_that_the_system_does_not_give_is_no_damaged_one(folder, tmp_path, monkeypatch):
    """What is scored without it would stay so: nothing in its name, size and time says that it came back."""
    write_pair(folder, "late", np.zeros(16000), np.zeros(16000))
    noisy = folder / "noisy" / "late.wav"
    kept = noisy.rename(tmp_path / "late.wav")
    monkeypatch.chdir(noisy.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as opens_for_nobody:
        opens_for_nobody.bind(noisy.name)
        with pytest.raises(UserError, match=rf"{noisy} cannot be read \(no such device or address\)"):
            evaluate(folder)
    noisy.unlink()
    kept.rename(noisy)
    assert "noisy/late.wav" in [row["key"] for row in rows_of(evaluate(folder))]


def test_a_limit_below_one_sample_is_not_no_limit(folder):
    assert ValidationClips(folder, max_seconds=1e-5)[0].noisy.shape == (1,)
