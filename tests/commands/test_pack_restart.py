"""Packing that is refused, killed or started twice: nothing half made, nothing done again."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mvat_dist.data.pool import parallel_map
from mvat_dist.data.prepare import write as packing
from mvat_dist.data.prepare.corpora import list_dns
from mvat_dist.data.prepare.inspection import inspect_all
from mvat_dist.data.prepare.recipes import DnsRecipe
from tests.dns_corpus import speech, write, write_dns
from tests.packing_command import digests, run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dns(tmp_path_factory.mktemp("dns") / "a corpus")


@pytest.fixture(scope="module")
def packed(corpus: Path) -> Path:
    out = corpus.parent / "packed"
    assert run("dns", "--corpus", corpus, "--out", out, "--max-shard-size", "0.4") == 0
    return out


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


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_gives_the_same_shards(
    corpus: Path, packed: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at random moments with other numbers of workers; what is finished is not done again."""
    random = np.random.default_rng(seed)
    command = ["dns", "--corpus", str(corpus), "--max-shard-size", "0.4", "--out", str(tmp_path / "out")]
    kept: dict[Path, int] = {}
    for moment in sorted(random.uniform(0, 1, 4)):
        _run_until(command, tmp_path / "out", moment, workers=int(random.integers(1, 4)))
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("audio-*.npy")}
        assert {path: stamps.get(path) for path in kept} == kept
        kept = stamps
    if (tmp_path / "out/packing.json").exists():  # as good as always: the kill came before the end
        (tmp_path / "out/train_clean").mkdir(exist_ok=True)
        (tmp_path / "out/train_clean/.audio-000001.tar.1.tmp").write_bytes(b"torn")
        assert run(*command, workers=2) == 0
        assert "went on from an interrupted run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert digests(tmp_path / "out") == digests(packed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in packed.iterdir()}
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run("verify", tmp_path / "out") == 0


def _run_until(command: list[str], out: Path, share: float, workers: int) -> None:
    """Start packing and kill -9 it once this share of its files (inspected or written) is done."""
    argv = [sys.executable, "-m", "mvat_dist.pack", *command, "--workers", str(workers)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and _done(out) < 1 + share * 40:
            os.sched_yield()
        process.kill()


def _done(out: Path) -> int:
    """Inspections (25 in all), and indices of finished shards (15 in all)."""
    log = out / "inspections.jsonl"
    return len(list(out.rglob("audio-*.npy"))) + (log.read_bytes().count(b"\n") if log.exists() else 0)


def test_two_do_not_pack_into_one_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dns", "--corpus", str(corpus), "--out", str(tmp_path / "out")]
    argv = [sys.executable, "-m", "mvat_dist.pack", *command, "--workers", "1"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not _done(tmp_path / "out"):
            os.sched_yield()
        os.kill(process.pid, signal.SIGSTOP)
        assert run(*command) == 2
        assert "another process is packing into" in capsys.readouterr().err
        process.kill()
    assert run(*command) == 0


def test_an_interrupted_run_reads_no_file_twice(corpus: Path, tmp_path: Path) -> None:
    """Files that changed meanwhile are read again, a torn line of the log is not believed."""
    out, copy = tmp_path / "out", tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    listing, recipe = list_dns(copy), DnsRecipe()
    log = tmp_path / "inspections.jsonl"
    with parallel_map(1) as here:
        first, known = inspect_all(listing, recipe, log, here)
        assert (len(first), known) == (25, 0)
        assert inspect_all(listing, recipe, log, here) == (first, 25)
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:20]) + lines[20][:-9])
        assert inspect_all(listing, recipe, log, here) == (first, 20)
        changed = listing.sources[3].path
        write(copy / changed, speech(99))
        os.utime(copy / changed, ns=(0, 1))
        again, known = inspect_all(listing, recipe, log, here)
        assert known == 24
        assert [path for path in first if again[path] != first[path]] == [changed]
        assert inspect_all(listing, dataclasses.replace(recipe, min_seconds=1.2), log, here)[1] == 2
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: object) -> None:
        raise AssertionError("a file was inspected")

    monkeypatch.setattr(packing, "inspect_all", unread)
    for out in ("/proc/shards", "/dev/null/shards", tmp_path / ("long" * 100)):
        assert run("dns", "--corpus", corpus, "--out", out) == 2
        assert capsys.readouterr().err.startswith("error: ")
