"""Shards are written by WebDataset's own writer, and one scan makes the index of any WebDataset tar."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mvat_dist.data.shards.codecs import encode
from mvat_dist.data.shards.format import (
    FILE_MODE,
    ShardError,
    audio_layout,
    finished_rows,
    index_path,
    load_index,
    scan_tar,
)
from mvat_dist.data.shards.writer import Sample, index_tar, write_shard

CLIP = (np.arange(9000) % 100 * 50).astype(np.int16)


def samples(count: int = 3) -> list[Sample]:
    clip = encode(CLIP, "flac")
    return [
        Sample(f"utt_{number}", {"json": b"{}", "flac": clip}, CLIP.size, -20.0, float("nan"))
        for number in range(count)
    ]


def write_foreign(path: Path, names: list[str], form: int = tarfile.PAX_FORMAT) -> None:
    """A tar as anybody's tools write it."""
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            content = name.encode() * 40
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_equal_samples_give_equal_bytes_without_a_trace_of_the_writer(tmp_path: Path) -> None:
    first, second = tmp_path / "a.tar", tmp_path / "b.tar"
    for path in (first, second):
        write_shard(path, audio_layout("sources"), samples())
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()
    with tarfile.open(first) as tar:
        about = {
            (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) for member in tar
        }
    assert about == {(0, 0, 0, "", "", FILE_MODE)}


def test_a_shard_is_finished_only_with_its_index_and_its_whole_tar(tmp_path: Path) -> None:
    path, layout = tmp_path / "a.tar", audio_layout("sources")
    assert finished_rows(path, layout) is None
    write_shard(path, layout, samples())
    assert len(finished_rows(path, layout)) == 3
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    assert finished_rows(path, layout) is None
    path.write_bytes(content)
    index_path(path).unlink()
    assert finished_rows(path, layout) is None


def test_an_empty_shard_has_an_empty_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", audio_layout("sources"), [])
    assert len(finished_rows(tmp_path / "a.tar", audio_layout("sources"))) == 0


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_scan_finds_what_webdataset_finds(tmp_path: Path, form: int) -> None:
    """Of a foreign tar, with folders, long names and names that WebDataset passes over."""
    path = tmp_path / "foreign.tar"
    long = "folder/" + "x" * 90
    names = [
        "a/b_1.clean.flac",
        "a/b_1.json",
        "v1.0/c.wav",
        "__skipped__/x.json",
        "__skipped__",
        "no_dot",
        "d.FLAC",
        f"{long}.flac",
    ]
    write_foreign(path, names, form)
    expected = {
        sample["__key__"]: {name: content for name, content in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    content = path.read_bytes()
    found = {
        key: {member.extension: content[member.offset : member.offset + member.size] for member in members}
        for key, members in itertools.groupby(scan_tar(path), key=lambda member: member.key)
    }
    assert found == expected
    assert set(found) == {"a/b_1", "v1.0/c", "d", long}


def test_links_and_folders_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in (
            (tarfile.DIRTYPE, "a.d"),
            (tarfile.SYMTYPE, "b.flac"),
            (tarfile.LNKTYPE, "c.flac"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert list(scan_tar(path)) == []


@pytest.mark.parametrize("cut", ["boundary", "header", "content"])
def test_a_cut_tar_is_an_error(tmp_path: Path, cut: str) -> None:
    """WebDataset takes one that was cut between two members, or in a header, for a whole one."""
    path = tmp_path / "cut.tar"
    write_foreign(path, ["a.flac", "b.flac", "c.flac"], tarfile.USTAR_FORMAT)
    last = list(scan_tar(path))[-1]
    end = {"boundary": last.offset - 512, "header": last.offset - 300, "content": last.offset + 10}[cut]
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ShardError, match=r"cut\.tar (ends too soon|is no uncompressed tar)"):
        list(scan_tar(path))


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{suffix}") as tar:
        tar.addfile(tarfile.TarInfo("a.flac"))
    with pytest.raises(ShardError, match="no uncompressed tar"):
        list(scan_tar(path))


def test_an_index_is_of_the_members_that_were_written(tmp_path: Path) -> None:
    path, layout = tmp_path / "a.tar", audio_layout("sources")
    write_shard(path, layout, samples())
    heads = [(sample.key, *sample.columns) for sample in samples()]
    assert index_tar(path, layout, heads).rows.tobytes() == load_index(path, layout).rows.tobytes()
    for wrong in (heads[:2], [*heads, heads[0]], heads[::-1]):
        with pytest.raises(ShardError, match="holds"):
            index_tar(path, layout, wrong)
