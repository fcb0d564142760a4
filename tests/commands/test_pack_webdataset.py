"""Corpora that come as WebDataset tars: packed as the same files in folders are."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.data.shards.reader import ShardSet
from tests.dns_corpus import write, write_dns
from tests.packing_command import left_out, manifest, metas, run, write_pair


def to_tars(folder: Path, tar: Path, per_tar: int = 5, **extra: bytes) -> None:
    """Store the audio files below a folder in tars of `per_tar` samples, each with the extra members."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac"))
    tar.parent.mkdir(parents=True, exist_ok=True)
    for number in range(0, len(files), per_tar):
        with tarfile.open(f"{tar}-{number // per_tar:03d}.tar", "w") as out:
            for path in files[number : number + per_tar]:
                out.add(path, path.name)
                for extension, content in extra.items():
                    member = tarfile.TarInfo(f"{path.stem}.{extension}")
                    member.size = len(content)
                    out.addfile(member, io.BytesIO(content))


def signals(out: Path, subset: str) -> dict[str, str]:
    """Name of the recording and its first sample -> hash of the stored audio."""
    opened = ShardSet.open(out / subset)
    hashes = {}
    for index, meta in enumerate(metas(out, subset)):
        source = meta["source"]["audio"]
        name = f"{source['path'].rpartition('/')[2]} {source['start']}"
        hashes[name] = hashlib.sha256(opened.read(index).tobytes()).hexdigest()
    return hashes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in DNS-Challenge layout below ``files``, and the same recordings in tars below ``tars``."""
    root = tmp_path_factory.mktemp("webdataset") / "a corpus"
    files = write_dns(root / "files", readers=3, noises=2)
    folders = {"speech": "clean_fullband", "noise": "noise_fullband", "rooms": "impulse_responses"}
    for role, folder in folders.items():
        to_tars(files / "datasets_fullband" / folder, root / "tars" / role / role, json=b"{}", txt=b"hello")
    return root


SOURCES = ("--speech", "speech/*-{000,001}.tar", "--noise", "noise/*.tar", "--rooms", "rooms/*.tar")


def test_recordings_in_tars_are_packed_as_files_are(corpus: Path, tmp_path: Path) -> None:
    packed = {"files": tmp_path / "files", "tars": tmp_path / "tars"}
    without_valid = ("--valid-clips", "0", "--piece-seconds", "2")
    assert run("dns", "--corpus", corpus / "files", "--out", packed["files"], *without_valid) == 0
    options = ("--corpus", corpus / "tars", *SOURCES, "--out", packed["tars"], *without_valid)
    assert run("webdataset", *options) == 0
    assert set(manifest(packed["tars"])["subsets"]) == {"train_clean", "train_noise", "train_rir"}
    for subset in manifest(packed["tars"])["subsets"]:
        assert signals(packed["tars"], subset) == signals(packed["files"], subset)
    assert run("verify", packed["tars"]) == 0
    groups = {meta["group"] for meta in metas(packed["tars"], "train_clean")}
    assert groups == {meta["group"] for meta in metas(packed["files"], "train_clean")}


def test_validation_is_held_out_and_workers_change_nothing(corpus: Path, tmp_path: Path) -> None:
    options = ("--corpus", corpus / "tars", "--speech", "speech/*.tar", "--noise", "noise/*.tar")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert run("webdataset", *options, "--out", out, "--valid-clips", "3", workers=workers) == 0
    assert set(manifest(out)["subsets"]) == {"train_clean", "train_noise", "valid"}
    assert signals(tmp_path / "1", "train_clean") == signals(out, "train_clean")
    assert manifest(tmp_path / "1")["subsets"] == manifest(out)["subsets"]


def test_pairs_are_told_by_their_extensions(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    folder = tmp_path / "loose"
    for number in range(4):
        clean = 0.1 * random.standard_normal(32_000)
        write(folder / f"utt_{number}.speech.wav", clean)
        write(folder / f"utt_{number}.mix.wav", clean + 0.05 * random.standard_normal(32_000))
    write(folder / "alone.mix.wav", 0.1 * random.standard_normal(32_000))
    write(folder / "other.music.wav", 0.1 * random.standard_normal(32_000))
    to_tars(folder, tmp_path / "tars" / "pairs", per_tar=100)
    to_tars(folder, tmp_path / "tars" / "again", per_tar=100)
    names = ("--clean", "speech", "--noisy", "mix", "--valid-clips", "1")
    options = ("--corpus", tmp_path / "tars", "--pairs", "pairs-*.tar", "--out", tmp_path / "out")
    assert run("webdataset", *options, *names) == 0
    assert set(manifest(tmp_path / "out")["subsets"]) == {"train_pairs", "valid"}
    assert left_out(tmp_path / "out") == {
        "pairs-000.tar/alone.mix.wav": "unmatched",
        "pairs-000.tar/other.music.wav": "not-used",
    }
    files = manifest(tmp_path / "out")["files"]
    assert files["found"] == files["packed"] + files["held_out"] + files["rejected"] == 10
    test = ("--test-pairs", "again-*.tar", "--out", tmp_path / "test")
    assert run("webdataset", *options[:2], *test, *names) == 0
    assert manifest(tmp_path / "test")["subsets"]["test_webdataset"]["utterances"] == 4


def test_an_interrupted_packing_reads_changed_tars_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--corpus", corpus / "tars", "--speech", "speech/*.tar", "--noise", "noise/*.tar")
    out = tmp_path / "out"
    assert run("webdataset", *options, "--out", out) == 0
    capsys.readouterr()
    assert run("webdataset", *options, "--out", out) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "which tars of"),
        (("--speech", "spech/*.tar"), "has no tar called spech/"),
        (("--speech", "speech/*.tar", "--noise", "speech/*.tar"), "named for two purposes"),
        (("--speech", "/speech/*.tar"), "below the corpus"),
        (("--speech", "../*.tar"), "below the corpus"),
        (("--speech", "speech/{a.tar"), "braces"),
        (("--noise", "torn.tar"), "torn.tar"),
    ],
)
def test_mistakes_are_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    (corpus / "tars/torn.tar").write_bytes(os.urandom(2000))
    assert run("webdataset", "--corpus", corpus / "tars", *options, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_damaged_recordings_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(3):
        write(tmp_path / f"loose/utt_{number}.wav", 0.1 * random.standard_normal(32_000))
        write_pair(tmp_path / "unused", number, np.zeros(10), np.zeros(10))
    intact = (tmp_path / "loose/utt_0.wav").read_bytes()
    (tmp_path / "loose/cut.wav").write_bytes(intact[:5000])
    (tmp_path / "loose/empty.wav").write_bytes(b"")
    (tmp_path / "loose/pointer.wav").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    to_tars(tmp_path / "loose", tmp_path / "tars" / "speech", per_tar=100)
    options = ("--corpus", tmp_path / "tars", "--speech", "*.tar", "--out", tmp_path / "out")
    assert run("webdataset", *options) == 0
    assert left_out(tmp_path / "out") == {
        "speech-000.tar/cut.wav": "unreadable",
        "speech-000.tar/empty.wav": "empty",
        "speech-000.tar/pointer.wav": "git-lfs-pointer",
    }
