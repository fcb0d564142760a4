"""`pack stats`: the figures are those of the shards, the picture is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mvat_dist import pack
from mvat_dist.data.prepare.corpora import collection
from mvat_dist.data.prepare.statistics import collect, longest
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.errors import exit_code
from tests.dns_corpus import write_dns

TYPES = {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    out = folder / "packed corpus"
    argv = ["dns", "--corpus", str(write_dns(folder / "corpus")), "--out", str(out), "--workers", "1"]
    assert exit_code(pack.main, [*argv, "--min-shards", "3"]) == 0
    return out


def test_the_figures_are_those_of_the_stored_audio(packed: Path) -> None:
    for one in collect(packed, 1):
        subset = ShardSet.open(packed / one.name)
        field = "audio" if subset.kind == "sources" else "noisy"
        signals = [subset.read(index, field).astype(np.float64) for index in range(len(subset))]
        np.testing.assert_allclose(one.seconds, [signal.size / 16_000 for signal in signals])
        levels = [10 * np.log10(np.mean(signal**2)) for signal in signals]
        np.testing.assert_allclose(one.level_dbfs, levels, atol=2e-3)
        assert one.hours == pytest.approx(sum(signal.size for signal in signals) / 16_000 / 3600)
        assert sum(part.utterances for part in one.sources.values()) == len(subset)
        assert sum(part.hours for part in one.sources.values()) == pytest.approx(one.hours)
        assert one.groups == len({subset.meta(index)["group"] for index in range(len(subset))})
        assert one.snr_db.size == (len(subset) if subset.kind == "pairs" else 0)


def test_workers_change_nothing_and_few_sources_are_listed(packed: Path) -> None:
    one, two = collect(packed, 1), collect(packed, 2)
    assert [(a.name, a.sources) for a in one] == [(a.name, a.sources) for a in two]
    clean = one[0]
    assert list(clean.sources) == ["clean_fullband/read_speech"]
    many = type(clean)(
        **{
            **vars(clean),
            "sources": {str(at): clean.sources["clean_fullband/read_speech"] for at in range(5)},
        }
    )
    assert list(longest(many, 3)) == ["0", "1", "2", "2 others"]
    assert list(longest(many, 4)) == ["0", "1", "2", "3", "4"]
    assert (
        longest(many, 3)["2 others"].utterances == 2 * clean.sources["clean_fullband/read_speech"].utterances
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("datasets_fullband/clean_fullband/vctk/p225/p225_001.wav", "clean_fullband/vctk"),
        ("datasets_fullband/noise_fullband/door_1.wav", "datasets_fullband/noise_fullband"),
        ("synthetic/no_reverb/clean/clean_fileid_1.wav", "no_reverb/clean"),
        ("clean_trainset_28spk_wav/p226_001.wav", "clean_trainset_28spk_wav"),
        ("a.wav", "."),
    ],
)
def test_the_collection_of_a_file(path: str, name: str) -> None:
    assert collection(path) == name


@pytest.mark.parametrize("suffix", TYPES)
def test_the_picture_is_what_its_name_says(
    packed: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / f"a picture{suffix}"
    assert exit_code(pack.main, ["stats", str(packed), "--out", str(picture), "--workers", "1"]) == 0
    assert picture.read_bytes().startswith(TYPES[suffix])
    printed = capsys.readouterr().out
    assert "clean_fullband/read_speech" in printed
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]


def test_refusals_come_before_the_reading(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(pack.main, ["stats", str(packed), "--out", str(tmp_path / "x.jpeg")]) == 2
    assert "a picture ends in .png, .svg, .pdf" in capsys.readouterr().err
    assert exit_code(pack.main, ["stats", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []
