"""The synthetic corpus: repeatable, packable, and physically sane where physics can be asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mvat_dist import pack
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.synthetic.corpus import shoebox
from mvat_dist.data.synthetic.noises import GENERATORS, RATE
from mvat_dist.errors import exit_code

pytest.importorskip(
    "espeakng_loader", reason="espeak-ng is not installed: pip install 'mvat_dist[synthetic]'"
)

TINY = ("--minutes", "0.8", "--noise-minutes", "1.3", "--rooms", "1")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(out: Path, *options: str) -> int:
    return exit_code(pack.main, ["synthetic", "--out", str(out), *TINY, *options])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "a corpus"
    assert make(out) == 0
    return out


def test_the_same_seed_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "again") == 0
    assert digests(tmp_path / "again") == digests(corpus)


def test_another_seed_gives_other_speech_and_noise(corpus: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "other", "--seed", "1") == 0
    other, first = digests(tmp_path / "other"), digests(corpus)
    assert not set(other.values()) & set(first.values())


def test_what_is_there_is_kept(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert make(corpus) == 0
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == stamps
    assert make(corpus, "--seed", "1") == 2
    assert "other settings" in capsys.readouterr().err
    (tmp_path / "letter.txt").write_text("dear")
    assert make(tmp_path) == 2
    assert "not a synthetic corpus" in capsys.readouterr().err
    assert make(tmp_path / "new", "--minutes", "0") == 2


def test_it_packs_whole(corpus: Path, tmp_path: Path) -> None:
    assert exit_code(pack.main, ["dns", "--corpus", str(corpus), "--out", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["rejected"] == {}
    assert set(manifest["subsets"]) == {"train_clean", "train_noise", "train_rir", "valid"}
    rates = json.loads((tmp_path / "out/train_clean/manifest.json").read_text())["source_rates"]
    assert set(rates) == {"16000", "22050"}
    minutes = 60 * (manifest["subsets"]["train_clean"]["hours"] + manifest["subsets"]["valid"]["hours"] / 4)
    assert 0.4 < minutes < 1.6
    valid = ShardSet.open(tmp_path / "out/valid")
    assert all(0 <= valid.meta(index)["mixing"]["snr_db"] <= 20 for index in range(len(valid)))


def test_speech_has_the_rhythm_of_speech(corpus: Path) -> None:
    """Loud syllables and quiet gaps, energy between 100 Hz and 4 kHz, no clipping."""
    for path in (corpus / "clean_fullband").rglob("*.wav"):
        audio, rate = soundfile.read(path)
        frames = np.array_split(audio, len(audio) // (rate // 50))
        levels = 10 * np.log10([np.mean(frame**2) + 1e-12 for frame in frames])
        assert np.percentile(levels, 90) - np.percentile(levels, 10) > 15
        power = np.abs(np.fft.rfft(audio)) ** 2
        band = (np.fft.rfftfreq(len(audio), 1 / rate) > 100) & (np.fft.rfftfreq(len(audio), 1 / rate) < 4000)
        assert power[band].sum() > 0.8 * power.sum()
        assert np.abs(audio).max() <= 0.91


def test_noise_recordings_differ_in_kind_and_within_a_kind() -> None:
    spectra = {}
    for kind, generator in GENERATORS.items():
        first, second = (generator(2.0, np.random.default_rng(seed)) for seed in (0, 1))
        assert first.shape == (2 * RATE,)
        assert np.isfinite(first).all()
        assert np.sqrt(np.mean(first**2)) == pytest.approx(1, rel=1e-6)
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.2
        bands = np.array_split(np.abs(np.fft.rfft(first)) ** 2, 40)
        spectra[kind] = np.log10([band.mean() for band in bands])
    names = list(spectra)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            assert np.sqrt(np.mean((spectra[one] - spectra[other]) ** 2)) > 0.15, (one, other)


def test_a_room_delays_and_decays_as_it_should() -> None:
    """Direct sound at distance / c; the floor's echo by geometry; decay near the wanted time."""
    size, talker, microphone = np.array([6.0, 5.0, 3.0]), np.array([1.5, 2.2, 1.1]), np.array([2.0, 2.2, 1.1])
    response = shoebox(size, talker, microphone, 0.4)
    first = np.flatnonzero(response)[0]
    assert first == round(0.5 / 343 * RATE)
    assert response[first] == np.abs(response).max() == pytest.approx(0.9)
    # Down 1.1 m and up again, 0.5 m to the side; one bounce turns the pressure and takes its share.
    path = np.hypot(0.5, 2.2)
    absorption = 0.161 * size.prod() / (2 * (30 + 15 + 18) * 0.4)
    echo = response[round(path / 343 * RATE)]
    assert echo == pytest.approx(-0.9 * np.sqrt(1 - absorption) * 0.5 / path, rel=1e-6)
    decay = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2))
    from_10_to_30 = np.searchsorted(-decay, [10, 30]) / RATE
    assert 3 * np.diff(from_10_to_30)[0] == pytest.approx(0.4, rel=0.35)


def test_rooms_start_with_their_loudest_sound(corpus: Path) -> None:
    for path in (corpus / "impulse_responses").rglob("*.wav"):
        response, _ = soundfile.read(path)
        assert np.abs(response).argmax() == np.flatnonzero(np.abs(response) > 0.05)[0]
