"""`mvat_dist.pack`: nothing lost, nothing invented, the same bytes every time."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from mvat_dist import pack
from mvat_dist.data import packing
from mvat_dist.data.shards import ShardSet, subset_names
from mvat_dist.errors import exit_code
from tests.conftest import REPOSITORY
from tests.signals import noise_at, syllables

RATE = 16_000


def write(path: Path, audio: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype=subtype)
    return path


def speech(seed: int, seconds: float = 1.5) -> np.ndarray:
    return syllables(seconds, per_second=2 + seed % 5, seed=seed)


def noise(seed: int, seconds: float = 2.0, rate: int = RATE) -> np.ndarray:
    return 0.05 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


def tone(hertz: float, rate: int, seconds: float = 2.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


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


def write_pair(folder: Path, number: int, clean: np.ndarray, noisy: np.ndarray) -> None:
    write(folder / "clean" / f"clean_fileid_{number}.wav", clean)
    write(folder / "noisy" / f"book_reader_{number:05d}_door_snr5_tl-20_fileid_{number}.wav", noisy)


def run(*argv: str | Path, workers: int = 1) -> int:
    return exit_code(pack.main, [*map(str, argv), "--workers", str(workers)])


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return found


def left_out(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {row["path"]: row["reason"] for row in rows}


def metas(out: Path, subset: str) -> list[dict[str, Any]]:
    opened = ShardSet.open(out / subset)
    return [opened.meta(index) for index in range(len(opened))]


def source_paths(out: Path, subset: str) -> set[str]:
    return {one["path"] for meta in metas(out, subset) for one in meta["source"].values()}


def digests(out: Path) -> dict[str, str]:
    files = sorted([*out.rglob("*.tar"), *out.rglob("*.npy")])
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dns(tmp_path_factory.mktemp("dns") / "a corpus")


@pytest.fixture(scope="module")
def packed(corpus: Path) -> Path:
    out = corpus.parent / "packed"
    assert run("dns", "--corpus", corpus, "--out", out, "--max-shard-size", "0.4") == 0
    return out


def test_every_file_is_packed_or_held_out(corpus: Path, packed: Path) -> None:
    assert subset_names(packed) == ["train_clean", "train_noise", "train_rir", "valid"]
    training = set().union(*(source_paths(packed, f"train_{role}") for role in ("clean", "noise", "rir")))
    valid = source_paths(packed, "valid")
    everything = {str(path.relative_to(corpus)) for path in corpus.rglob("*.wav")}
    assert training | valid <= everything
    assert not training & valid
    counts = manifest(packed)["files"]
    assert counts == {"found": 25, "packed": len(training), "held_out": 25 - len(training), "rejected": 0}


def test_validation_shares_no_reader_and_no_noise_recording(packed: Path) -> None:
    for role, field in (("clean", "speech"), ("noise", "noise")):
        training = {_recording(path) for path in source_paths(packed, f"train_{role}")}
        valid = {_recording(meta["source"][field]["path"]) for meta in metas(packed, "valid")}
        assert valid
        assert not training & valid


def _recording(path: str) -> str:
    return path.rsplit("_", 1)[0]


def test_validation_mixtures_are_what_their_metadata_says(corpus: Path, packed: Path) -> None:
    opened = ShardSet.open(packed / "valid")
    for index in range(len(opened)):
        clean, noisy = (opened.read(index, field).astype(np.float64) for field in ("clean", "noisy"))
        meta = opened.meta(index)
        snr = 10 * np.log10(np.sum(clean**2) / np.sum((noisy - clean) ** 2))
        assert 0 <= meta["mixing"]["snr_db"] <= 20
        # The shares of 16-bit rounding: a few steps of noise at 20 dB below quiet speech.
        assert snr == pytest.approx(meta["mixing"]["snr_db"], abs=0.1)
        assert snr == pytest.approx(meta["snr_db"], abs=0.001)
        spoken, _ = soundfile.read(corpus / meta["source"]["speech"]["path"])
        gain = meta["mixing"]["speech_gain"] * meta["gain"]
        np.testing.assert_allclose(clean, gain * spoken, atol=1.01 / 32768)


def test_16_bit_audio_at_16_khz_passes_unchanged(corpus: Path, packed: Path) -> None:
    opened = ShardSet.open(packed / "train_clean")
    for index in range(len(opened)):
        meta = opened.meta(index)
        original, _ = soundfile.read(corpus / meta["source"]["audio"]["path"], dtype="float32")
        np.testing.assert_array_equal(opened.read(index), original)
        assert meta["gain"] == 1.0
        rms = 10 * np.log10(np.mean(original.astype(np.float64) ** 2))
        assert meta["levels"]["audio"]["rms_dbfs"] == pytest.approx(rms, abs=0.001)


def test_shards_are_mixed_and_keep_to_their_size(packed: Path) -> None:
    opened = ShardSet.open(packed / "train_clean")
    sizes = [path.stat().st_size for path in (packed / "train_clean").glob("*.tar")]
    assert len(sizes) > 1
    assert max(sizes) <= 0.4e6
    order = [meta["source"]["audio"]["path"] for meta in metas(packed, "train_clean")]
    assert order != sorted(order)
    assert opened.keys == [f"train_clean_{number:07d}" for number in range(len(order))]


def test_workers_and_where_the_corpus_lies_change_no_byte(corpus: Path, packed: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "moved"
    shutil.copytree(corpus, elsewhere)
    assert (
        run("dns", "--corpus", elsewhere, "--out", tmp_path / "out", "--max-shard-size", 0.4, workers=3) == 0
    )
    assert digests(tmp_path / "out") == digests(packed)
    assert (
        run("dns", "--corpus", corpus, "--out", tmp_path / "other", "--max-shard-size", 0.4, "--seed", 1) == 0
    )
    assert digests(tmp_path / "other") != digests(packed)


def test_webdataset_reads_all_of_it(packed: Path) -> None:
    for name in subset_names(packed):
        shards = sorted(str(path) for path in (packed / name).glob("*.tar"))
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
        fields = {"clean.flac", "noisy.flac", "json"} if name == "valid" else {"flac", "json"}
        assert [sample["__key__"] for sample in samples] == ShardSet.open(packed / name).keys
        assert all(fields <= sample.keys() for sample in samples)


def test_a_second_run_does_nothing(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("dns", "--corpus", corpus, "--out", tmp_path / "out")
    assert run(*command) == 0
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(*command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps
    assert run(*command, "--valid-clips", 3) == 2
    assert "valid_clips 64, not 3" in capsys.readouterr().err


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


def test_long_recordings_are_cut_without_loss(tmp_path: Path) -> None:
    corpus = write_dns(tmp_path / "corpus", noises=2)
    long = np.concatenate([noise(7, 25.0), np.zeros(5 * RATE)])
    write(corpus / "datasets_fullband/noise_fullband/long.wav", long)
    command = ("dns", "--corpus", corpus, "--out", tmp_path / "out", "--valid-clips", 0)
    assert run(*command, "--piece-seconds", 10, "--max-shard-size", 1) == 0
    opened = ShardSet.open(tmp_path / "out/train_noise")
    pieces = {}
    for index in range(len(opened)):
        origin = opened.meta(index)["source"]["audio"]
        if origin["path"].endswith("long.wav"):
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


def test_recipes_are_valid(corpus: Path, tmp_path: Path) -> None:
    recipe = REPOSITORY / "shards/dns.yaml"
    assert run("dns", "--config", recipe, "--corpus", corpus, "--out", tmp_path / "out", "--seed", 4) == 0
    assert manifest(tmp_path / "out")["recipe"] == {
        "seed": 4,
        "max_shard_size": 256.0,
        "min_shards": 32,
        "min_seconds": 1.0,
        "piece_seconds": 31.0,
        "valid_fraction": 0.05,
        "valid_clips": 256,
        "valid_seconds": 10.0,
    }


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


def test_mistakes_are_one_line_and_leave_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, broken, other = (tmp_path / name for name in ("empty", "broken", "other"))
    (empty / "clean_fullband").mkdir(parents=True)
    (broken / "clean_fullband").mkdir(parents=True)
    (broken / "clean_fullband/a.wav").write_text("x")
    write(other / "music/a.wav", speech(1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("dear")
    out = tmp_path / "out"
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("dns", "--corpus", tmp_path / "none", "--out", out), "no such corpus folder"),
        (("dns", "--corpus", empty, "--out", out), "holds no WAV or FLAC file"),
        (("dns", "--corpus", other, "--out", out), r"found 1 audio files, in music (1)"),
        (("valentini", "--corpus", corpus, "--out", out), "Valentini layout"),
        (("dns", "--corpus", broken, "--out", out), "all 1 audio files are left out (1 unreadable)"),
        (("dns", "--corpus", corpus, "--out", tmp_path / "full"), "not empty"),
        (("dns", "--corpus", corpus, "--out", tmp_path / "full/letter.txt/x"), "letter.txt is a file"),
        (("dns", "--corpus", corpus, "--out", out, "--valid-clip", "3"), "did you mean 'valid_clips'"),
        (("dns", "--corpus", corpus, "--out", out, "--max-shard-size", "-1"), "must not be negative"),
        (("verify", corpus), "not a packed corpus"),
    ]
    for argv, message in cases:
        assert run(*argv) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run("dns", "--corpus", corpus, "--out", out) == 2
    assert "free space" in capsys.readouterr().err
    assert not out.exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_killed_and_run_again_gives_the_same_shards(corpus: Path, packed: Path, tmp_path: Path) -> None:
    command = ["dns", "--corpus", str(corpus), "--max-shard-size", "0.4"]
    out = next(one for one in map(_killed, [command] * 10, [tmp_path / str(at) for at in range(10)]) if one)
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    (out / "train_clean/.audio-000001.tar.1.tmp").write_bytes(b"torn")
    assert run(*command, "--out", out) == 0
    assert digests(out) == digests(packed)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert not list(out.rglob("*.tmp"))
    assert not (out / "packing.json").exists()


def _killed(command: list[str], out: Path) -> Path | None:
    """`out` after a run that was killed in the middle; None where the run was quicker than the kill."""
    argv = [sys.executable, "-m", "mvat_dist.pack", *command, "--out", str(out), "--workers", "1"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(out.rglob("*.npy")):
            pass
        process.kill()
    return None if (out / "manifest.json").exists() else out


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink])
def test_verify_finds_the_damaged_shard(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    assert run("verify", copy) == 0
    assert "is whole" in capsys.readouterr().out
    harm(copy / "train_clean/audio-000001.tar")
    assert run("verify", copy) == 2
    printed = capsys.readouterr()
    assert "train_clean/audio-000001.tar" in printed.out
    assert "train_clean/audio-000000.tar" not in printed.out


def test_the_sample_and_the_code_in_the_specification(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sample was packed by an older version perhaps: it must stay readable."""
    assert run("verify", REPOSITORY / "shards/sample") == 0
    monkeypatch.chdir(REPOSITORY)
    snippets = re.findall(r"```python\n(.*?)```", (REPOSITORY / "shards/README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    assert "train_clean_0000000 16000" in capsys.readouterr().out


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
