"""What corpora hold: broken files, any rate, long recordings, pairs, and the layouts."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mvat_dist.data.shards.manifest import subset_names
from mvat_dist.data.shards.reader import ShardSet
from tests.conftest import REPOSITORY
from tests.dns_corpus import RATE, noise, speech, write, write_dns
from tests.packing_command import left_out, manifest, metas, run, source_paths, write_pair
from tests.signals import noise_at, streamed


def tone(hertz: float, rate: int, seconds: float = 2.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def _break(corpus: Path) -> dict[str, str]:
    """One file for every reason; returns path -> reason."""
    clean = corpus / "datasets_fullband/clean_fullband/zz_broken"
    samples = speech(50, 3.0)
    write(clean / "zz_copy.flac", soundfile.read(next(corpus.rglob("*reader_00001_1.wav")))[0])
    whole = write(clean / "whole.wav", samples)
    (clean / "cut.wav").write_bytes(whole.read_bytes()[:20_000])
    flac = write(clean / "whole.flac", speech(51)).read_bytes()
    (clean / "cut.flac").write_bytes(flac[: len(flac) // 2])
    (clean / "flipped.flac").write_bytes(flac[:9000] + bytes([flac[9000] ^ 1]) + flac[9001:])
    (clean / "text.wav").write_text("no audio at all")
    (clean / "pointer.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    (clean / "empty.WAV").write_bytes(b"")
    write(clean / "no_samples.wav", np.zeros(0))
    write(clean / "silent.wav", np.full(30_000, 0.25))
    write(clean / "clipped.wav", np.clip(20 * samples, -1, 1))
    write(clean / "short.wav", samples[:15_000])
    nan = samples.copy()
    nan[1000] = np.nan
    write(clean / "nan.wav", nan, subtype="FLOAT")
    (clean / "dangling.wav").symlink_to(corpus / "nowhere.wav")
    write(clean / "latin.wav", speech(52)).rename(clean / os.fsdecode(b"caf\xe9 1.wav"))
    write(corpus / "docs/example.wav", samples)
    broken = {
        "zz_copy.flac": "duplicate",
        "cut.wav": "unreadable",
        "cut.flac": "unreadable",
        "flipped.flac": "unreadable",
        "text.wav": "unreadable",
        "dangling.wav": "unreadable",
        "pointer.wav": "git-lfs-pointer",
        "empty.WAV": "empty",
        "no_samples.wav": "empty",
        "silent.wav": "silent",
        "clipped.wav": "clipped",
        "short.wav": "too-short",
        "nan.wav": "non-finite",
    }
    prefix = "datasets_fullband/clean_fullband/zz_broken/"
    return {prefix + name: reason for name, reason in broken.items()} | {"docs/example.wav": "not-used"}


def test_broken_files_are_left_out_with_their_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_dns(tmp_path / "corpus")
    expected = _break(corpus)
    assert run("dns", "--corpus", corpus, "--out", tmp_path / "out") == 0
    assert left_out(tmp_path / "out") == expected
    found = manifest(tmp_path / "out")
    assert found["rejected"] == dict(Counter(expected.values()))
    files = found["files"]
    assert files["found"] == 25 + len(expected) + 3 == sum(files.values()) - files["found"]
    kept = {Path(path).name for path in source_paths(tmp_path / "out", "train_clean")}
    held = {Path(path).name for path in source_paths(tmp_path / "out", "valid")}
    assert {"whole.wav", "whole.flac", os.fsdecode(b"caf\xe9 1.wav")} <= kept | held
    assert "42 audio files found" in capsys.readouterr().out


def test_any_rate_and_any_channels_become_16_khz_mono(tmp_path: Path) -> None:
    corpus = write_dns(tmp_path / "corpus", noises=1)
    folder = corpus / "datasets_fullband/noise_fullband"
    write(folder / "low.wav", tone(1000, 48_000), 48_000, "PCM_24")
    write(folder / "both.wav", tone(1000, 44_100) + tone(11_000, 44_100), 44_100)
    write(folder / "stereo.flac", np.stack([tone(500, RATE), tone(1500, RATE)], axis=1))
    response = np.stack([np.eye(1, 400, 3)[0], np.eye(1, 400, 9)[0]], axis=1)
    write(corpus / "datasets_fullband/impulse_responses/stereo.wav", 0.5 * response)
    assert run("dns", "--corpus", corpus, "--out", tmp_path / "out", "--valid-clips", 0) == 0
    read = {}
    for subset in ("train_noise", "train_rir"):
        opened = ShardSet.open(tmp_path / "out" / subset)
        for index in range(len(opened)):
            read[Path(opened.meta(index)["source"]["audio"]["path"]).name] = opened.read(index)
    inner = slice(500, -500)  # a resampler's ends ring
    expected = tone(1000, RATE)
    for name in ("low.wav", "both.wav"):
        assert abs(len(read[name]) - len(expected)) <= 1
        np.testing.assert_allclose(read[name][inner], expected[: len(read[name])][inner], atol=1e-4)
    mean = (tone(500, RATE) + tone(1500, RATE)) / 2
    np.testing.assert_allclose(read["stereo.flac"], mean, atol=2 / 32768)
    assert np.flatnonzero(read["stereo.wav"]).tolist() == [3]
    rates = json.loads((tmp_path / "out/train_noise/manifest.json").read_text())["source_rates"]
    assert rates == {"16000": 3, "44100": 1, "48000": 1}


@pytest.mark.parametrize("open_end", [False, True], ids=["its length known", "streamed"])
def test_long_recordings_are_cut_without_loss(tmp_path: Path, open_end: bool) -> None:
    corpus = write_dns(tmp_path / "corpus", noises=2)
    long = np.concatenate([noise(7, 25.0), np.zeros(5 * RATE)])
    file = write(corpus / "datasets_fullband/noise_fullband/long.flac", long)
    if open_end:
        file.write_bytes(streamed(file.read_bytes()))
        assert soundfile.info(file).frames > 2**60
    command = ("dns", "--corpus", corpus, "--out", tmp_path / "out", "--valid-clips", 0)
    assert run(*command, "--piece-seconds", 10, "--max-shard-size", 1) == 0
    opened = ShardSet.open(tmp_path / "out/train_noise")
    pieces = {}
    for index in range(len(opened)):
        origin = opened.meta(index)["source"]["audio"]
        if origin["path"].endswith("long.flac"):
            pieces[origin["start"]] = opened.read(index)
    joined = np.concatenate([pieces[start] for start in sorted(pieces)])
    np.testing.assert_allclose(joined, long, atol=1.01 / 32768)  # the file itself is rounded
    assert max(piece.size for piece in pieces.values()) <= 10 * RATE


def test_float_files_beyond_full_scale_are_scaled_not_clipped(tmp_path: Path) -> None:
    clean = speech(1)
    noisy = clean + noise(2, 1.5)
    for number in range(3):
        folder = tmp_path / "corpus/training"
        gain = 4.0 / np.abs(noisy).max()
        write(folder / f"clean/clean_fileid_{number}.wav", gain * np.roll(clean, number), subtype="FLOAT")
        write(folder / f"noisy/x_fileid_{number}.wav", gain * np.roll(noisy, number), subtype="FLOAT")
    assert run("dns", "--corpus", tmp_path / "corpus", "--out", tmp_path / "out") == 0
    opened = ShardSet.open(tmp_path / "out/train_pairs")
    for index in range(len(opened)):
        kept, mixed = opened.read(index, "clean"), opened.read(index, "noisy")
        assert 0.999 < np.abs(mixed).max() <= 1
        assert opened.meta(index)["gain"] == pytest.approx(0.25, rel=1e-3)
        ratio = np.sum(kept.astype(np.float64) ** 2) / np.sum(clean.astype(np.float64) ** 2)
        assert ratio == pytest.approx((1 / np.abs(noisy).max()) ** 2, rel=1e-3)


def test_pairs_are_matched_by_number_and_tests_stay_whole(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for number in range(12):
        clean = speech(number)
        write_pair(corpus / "training", number, clean, clean + noise_at(clean, 5, number))
        write_pair(
            corpus / "datasets/test_set/synthetic/no_reverb",
            number,
            clean,
            clean + noise_at(clean, 9, number),
        )
    clipped = np.clip(30 * speech(30), -1, 1)
    write_pair(corpus / "training", 20, clipped, clipped + noise(1, 1.5))
    write_pair(corpus / "datasets/test_set/synthetic/no_reverb", 20, clipped, clipped + noise(1, 1.5))
    write_pair(corpus / "training", 21, speech(21), noise(5, 1.4))
    write_pair(corpus / "training", 22, speech(22), speech(22)[:-100] + noise(6, 1.5)[:-100])
    write(corpus / "training/clean/clean_fileid_23.wav", speech(23))
    write(corpus / "training/noise/noise_fileid_0.wav", noise(77))
    write(corpus / "datasets/test_set/real_recordings/phone.wav", noise(78))
    assert run("dns", "--corpus", corpus, "--out", tmp_path / "out") == 0
    assert subset_names(tmp_path / "out") == ["train_pairs", "valid", "test_no_reverb"]
    assert Counter(left_out(tmp_path / "out").values()) == {
        "clipped": 2,
        "length-mismatch": 2,
        "unmatched": 1,
        "not-used": 2,
    }
    for name, count in (("train_pairs", 12), ("valid", 1), ("test_no_reverb", 13)):
        found = metas(tmp_path / "out", name)
        assert len(found) == count
        for meta in found:
            numbers = {Path(one["path"]).stem.rsplit("_", 1)[1] for one in meta["source"].values()}
            assert len(numbers) == 1
            if numbers == {"22"}:
                assert meta["samples"] == 1.5 * RATE - 100


def test_a_corpus_with_both_keeps_held_out_readers_out_of_the_pairs(tmp_path: Path) -> None:
    corpus = write_dns(tmp_path / "corpus")
    for reader in range(5):
        clean = speech(60 + reader)
        write_pair(corpus / "training", reader, clean, clean + noise_at(clean, 5, reader))
    assert run("dns", "--corpus", corpus, "--out", tmp_path / "out") == 0
    held = {meta["group"] for meta in metas(tmp_path / "out", "valid")}
    assert held
    assert not held & {meta["group"] for meta in metas(tmp_path / "out", "train_pairs")}
    assert Counter(left_out(tmp_path / "out").values()) == {"held-out-speaker": 2 * len(held)}


def _write_valentini(corpus: Path) -> Path:
    members = {
        "trainset_28spk": ("p226", "p282", "p287"),
        "trainset_56spk": ("p234",),
        "testset": ("p232", "p257"),
    }
    for name, speakers in members.items():
        for speaker in speakers:
            for number in range(2):
                clean = np.repeat(speech(10 * int(speaker[1:]) + number), 3)
                for side, audio in (("clean", clean), ("noisy", clean + np.repeat(noise(number, 1.5), 3))):
                    nested = f"{side}_{name}_wav/" * (2 if side == "clean" else 1)
                    write(corpus / nested / f"{speaker}_{number:03d}.wav", audio, 48_000)
    return corpus


def test_valentini(tmp_path: Path) -> None:
    corpus = _write_valentini(tmp_path / "corpus")
    recipe = REPOSITORY / "shards/valentini.yaml"
    command = ("valentini", "--config", recipe, "--corpus", corpus)
    assert run(*command, "--out", tmp_path / "28") == 0
    speakers = {
        name: {meta["group"] for meta in metas(tmp_path / "28", name)}
        for name in subset_names(tmp_path / "28")
    }
    assert speakers == {
        "train_pairs": {"p226"},
        "valid": {"p282", "p287"},
        "test_valentini": {"p232", "p257"},
    }
    assert set(left_out(tmp_path / "28").values()) == {"not-used"}
    assert run(*command, "--out", tmp_path / "84", "--trainset", "both") == 0
    assert {meta["group"] for meta in metas(tmp_path / "84", "train_pairs")} == {"p226", "p234"}
    opened = ShardSet.open(tmp_path / "84/train_pairs")
    assert set(opened.samples.tolist()) == {int(1.5 * RATE)}
    assert opened.meta(0)["source"]["noisy"]["sample_rate"] == 48_000


def test_one_noise_recording_is_shared_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    for number in range(4):
        write(corpus / f"clean_fullband/{number}.wav", speech(number))
    write(corpus / "noise_fullband/street.wav", noise(1))
    assert run("dns", "--corpus", corpus, "--out", tmp_path / "out") == 0
    assert "only one noise recording" in capsys.readouterr().out
    assert len(ShardSet.open(tmp_path / "out/train_noise")) == 1
    assert len(ShardSet.open(tmp_path / "out/valid")) == 4


def test_the_shared_test_set_has_the_ratios_that_its_makers_noted(
    shared_folder: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    source = shared_folder / "corpus/test_set"
    if not source.is_dir():
        pytest.skip("the shared folder has no corpus")
    (corpus / "test_set").symlink_to(source)
    assert run("dns", "--corpus", corpus, "--out", tmp_path / "out", workers=2) == 0
    assert subset_names(tmp_path / "out") == ["test_no_reverb", "test_with_reverb"]
    for name in subset_names(tmp_path / "out"):
        with (shared_folder / f"corpus/manifests/{name}.csv").open() as table:
            noted = {row["clean"]: float(row["snr_db"]) for row in csv.DictReader(table)}
        measured = {
            Path(meta["source"]["clean"]["path"]).name: meta["snr_db"]
            for meta in metas(tmp_path / "out", name)
        }
        assert measured.keys() == noted.keys()
        assert max(abs(measured[name] - noted[name]) for name in noted) < 0.01
