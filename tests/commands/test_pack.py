"""`mvat_dist.pack`: nothing lost, nothing invented, the same bytes every time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from mvat_dist.data.shards.manifest import subset_names
from mvat_dist.data.shards.reader import ShardSet
from tests.conftest import REPOSITORY
from tests.dns_corpus import write_dns
from tests.packing_command import digests, manifest, metas, run, source_paths


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


def test_recipes_are_valid(corpus: Path, tmp_path: Path) -> None:
    recipe = REPOSITORY / "shards/dns.yaml"
    assert run("dns", "--config", recipe, "--corpus", corpus, "--out", tmp_path / "out", "--seed", 4) == 0
    assert manifest(tmp_path / "out")["recipe"] == {
        "seed": 4,
        "max_shard_size": 256.0,
        "min_shards": 32,
        "min_seconds": 1.0,
        "piece_seconds": 31.0,
        "codec": "flac",
        "valid_fraction": 0.05,
        "valid_clips": 256,
        "valid_seconds": 10.0,
    }


def test_both_codecs_and_an_older_manifest(corpus: Path, packed: Path, tmp_path: Path) -> None:
    """`codec` is younger than the format: what was packed without it was FLAC."""
    command = ("dns", "--corpus", corpus, "--max-shard-size", "0.4")
    older = tmp_path / "older"
    shutil.copytree(packed, older)
    kept = manifest(older)
    del kept["recipe"]["codec"]
    (older / "manifest.json").write_text(json.dumps(kept))
    assert run(*command, "--out", older) == 0
    assert run(*command, "--out", older, "--codec", "int16") == 2
    assert run(*command, "--out", tmp_path / "int16", "--codec", "int16") == 0
    for name in subset_names(packed):
        flac, int16 = ShardSet.open(packed / name), ShardSet.open(tmp_path / "int16" / name)
        assert (flac.codec, int16.codec) == ("flac", "int16")
        assert flac.keys == int16.keys
        for index in range(len(flac)):
            assert flac.meta(index) == int16.meta(index)
            for field in ("audio",) if flac.kind == "sources" else ("clean", "noisy"):
                np.testing.assert_array_equal(flac.read(index, field), int16.read(index, field))


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
    runnable = [snippet for snippet in snippets if "shards/sample" in snippet]
    assert len(runnable) == 2
    for snippet in runnable:
        exec(snippet, {})
    assert "train_clean_0000000 16000" in capsys.readouterr().out
