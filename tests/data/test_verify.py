"""Damage of every sort: `verify` finds it, and reading never returns anything but what was packed."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvat_dist import pack
from mvat_dist.data.prepare.verify import verify
from mvat_dist.data.shards.format import ShardError, index_path, shard_name
from mvat_dist.data.shards.manifest import subset_names
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.errors import UserError, exit_code
from tests.dns_corpus import write_dns

CODECS = ("flac", "int16")
Content = dict[tuple[str, str, str], bytes]
"""(subset, key, field) -> samples or JSON."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Codec -> the same corpus packed with it."""
    folder = tmp_path_factory.mktemp("verified corpora")
    corpus = write_dns(folder / "corpus", readers=3, noises=2)
    packed = {codec: folder / codec for codec in CODECS}
    for codec, out in packed.items():
        argv = ["dns", "--corpus", str(corpus), "--out", str(out), "--min-shards", "2", "--workers", "1"]
        assert exit_code(pack.main, [*argv, "--codec", codec, "--valid-clips", "3"]) == 0
    return packed


@pytest.fixture
def broken(corpora: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the FLAC corpus to do harm to."""
    return Path(shutil.copytree(corpora["flac"], tmp_path / "a corpus"))


def content(corpus: Path) -> Content:
    """All that can be read; what raises as it should is left out."""
    found: Content = {}
    try:
        names = subset_names(corpus)
    except UserError:
        return found
    for name in names:
        try:
            subset = ShardSet.open(corpus / name, strict=False)
        except UserError:
            continue
        fields = ("audio",) if subset.kind == "sources" else ("clean", "noisy")
        for index in range(len(subset)):
            for field in fields:
                try:
                    found[name, subset.key(index), field] = subset.read(index, field).tobytes()
                    found[name, subset.key(index), "meta"] = repr(subset.meta(index)).encode()
                except ShardError:
                    pass
    return found


def test_both_codecs_hold_the_same_samples(corpora: dict[str, Path]) -> None:
    flac, int16 = (content(corpora[codec]) for codec in CODECS)
    assert flac == int16
    assert len(flac) > 20
    for corpus in corpora.values():
        assert verify(corpus, 1).problems == []
    sizes = [sum(path.stat().st_size for path in corpora[codec].rglob("*.tar")) for codec in CODECS]
    assert sizes[0] < sizes[1]


def _flip(data: bytes, place: int, amount: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << amount % 8)]) + data[place + 1 :]


def _cut(data: bytes, place: int, _amount: int) -> bytes:
    return data[:place]


def _remove(data: bytes, place: int, amount: int) -> bytes:
    return data[:place] + data[place + 1 + amount :]


def _insert(data: bytes, place: int, amount: int) -> bytes:
    return data[:place] + os.urandom(1 + amount) + data[place:]


def _invert(data: bytes, place: int, amount: int) -> bytes:
    # Turned over, because zeroing a zero harms nothing.
    return (
        data[:place]
        + bytes(255 - byte for byte in data[place : place + 1 + amount])
        + data[place + 1 + amount :]
    )


HARMS: tuple[Callable[[bytes, int, int], bytes], ...] = (_flip, _cut, _remove, _insert, _invert)


@pytest.fixture(scope="module")
def expected(corpora: dict[str, Path]) -> Content:
    """What both codecs hold."""
    return content(corpora["flac"])


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    codec=st.sampled_from(CODECS),
    suffix=st.sampled_from((".tar", ".npy", ".json")),
    file=st.integers(0, 10**6),
    place=st.floats(0, 1, exclude_max=True),
    amount=st.integers(0, 600),
    harm=st.sampled_from(HARMS),
)
def test_any_harm_is_found_and_nothing_wrong_is_read(
    corpora: dict[str, Path],
    expected: Content,
    codec: str,
    suffix: str,
    file: int,
    place: float,
    amount: int,
    harm: Callable[[bytes, int, int], bytes],
) -> None:
    corpus = corpora[codec]
    files = sorted(corpus.rglob(f"*{suffix}"))
    path = files[file % len(files)]
    before = path.read_bytes()
    path.write_bytes(harm(before, int(place * len(before)), amount))
    try:
        for at, found in content(corpus).items():
            assert found == expected[at]
        try:
            problems = verify(corpus, 1).problems
        except UserError:
            return
        if path != corpus / "manifest.json":
            assert problems
    finally:
        path.write_bytes(before)


def _rewrite(
    shard: Path, change: Callable[[tarfile.TarInfo, bytes], Iterator[tuple[tarfile.TarInfo, bytes]]]
) -> None:
    """Write a tar again, each member through `change`; its index stays as it was."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member)) for member in tar]
        read = [(member, stream.read() if stream else b"") for member, stream in members]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in read:
            for info, changed in change(member, data):
                info.size = len(changed)
                tar.addfile(info, io.BytesIO(changed))


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)


def _with_pickle(member: tarfile.TarInfo, data: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    yield member, data
    if member.name.endswith("0001.json"):
        yield tarfile.TarInfo(member.name.replace("json", "pkl")), pickle.dumps(_Bomb())


def _without_member(member: tarfile.TarInfo, data: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    if not member.name.endswith("0001.flac"):
        yield member, data


def _wrong_json(member: tarfile.TarInfo, data: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    yield member, data if not member.name.endswith("0001.json") else b"{" + data[1:].replace(b"}", b"]", 1)


@pytest.mark.parametrize("change", [_with_pickle, _without_member, _wrong_json])
def test_a_tar_that_was_written_again(broken: Path, change: Callable[..., object]) -> None:
    expected = content(broken)
    shard = broken / "train_clean" / shard_name(0)
    _rewrite(shard, change)  # type: ignore[arg-type]
    problems = verify(broken, 1).problems
    assert problems[0] == f"{shard}: its SHA-256 is not the manifest's"
    assert all(problem.startswith(str(shard)) for problem in problems)
    assert any(re.search("key train_clean_000000[12]: ", problem) for problem in problems)
    found = content(broken)
    assert {at: found[at] for at in found} == {at: expected[at] for at in found}
    assert len(found) < len(expected)


def _boundaries(shard: Path) -> dict[str, int]:
    with tarfile.open(shard) as tar:
        second = tar.getmembers()[2]
    return {"boundary": second.offset, "header": second.offset + 100, "payload": second.offset_data + 50}


@pytest.mark.parametrize("place", ["boundary", "header", "payload"])
def test_a_truncated_tar(broken: Path, place: str) -> None:
    expected = content(broken)
    shard = broken / "train_clean" / shard_name(1)
    with shard.open("r+b") as stream:
        stream.truncate(_boundaries(shard)[place])
    assert any(
        re.search(r"the file ends \d+ bytes too soon", problem) for problem in verify(broken, 1).problems
    )
    found = content(broken)
    assert found == {at: expected[at] for at in found}
    subset = ShardSet.open(broken / "train_clean")
    last = len(subset) - 1
    with pytest.raises(ShardError, match=rf"audio-000001\.tar, key {subset.key(last)}: the file ends"):
        subset.read(last)


def test_missing_and_exchanged_files(broken: Path) -> None:
    subset = broken / "train_clean"
    (subset / shard_name(0)).unlink()
    assert verify(broken, 1).problems == [f"{subset / shard_name(0)}: the file is missing"]
    assert ShardSet.open(subset).read(len(ShardSet.open(subset)) - 1).size > 0
    shutil.copy(subset / shard_name(1), subset / shard_name(0))
    problems = verify(broken, 1).problems
    assert problems[0] == f"{subset / shard_name(0)}: its SHA-256 is not the manifest's"
    assert len(problems) > 1


def test_many_problems_of_a_shard_are_cut_short(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvat_dist.data.prepare.verify._MOST_PROBLEMS", 2)
    shard = broken / "train_clean" / shard_name(0)
    shard.write_bytes(bytes(shard.stat().st_size))
    problems = verify(broken, 1).problems
    assert len(problems) == 3
    assert problems[-1] == f"{shard}: and more"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kind": "pears"}, r"manifest\.json is damaged \(kind: "),
        ({"kind": []}, r"\(kind: "),
        ({"codec": "mp3"}, r"\(codec: "),
        ({"shards": None}, r"\(shards: "),
        ({"shards": [{"name": "../x.tar", "rows": 1}]}, r"\(shards\.0\.name: "),
        ({"shards": [{"name": "audio-000000.tar", "rows": "3"}]}, r"\(shards\.0\.rows: "),
        ({"codec": "int16"}, r"not the index of a shard of json, npy|not a readable index"),
        ({"kind": "pairs"}, r"not the index of a shard of clean\.flac"),
    ],
)
def test_an_edited_manifest_is_refused(broken: Path, edit: dict[str, object], message: str) -> None:
    path = broken / "train_clean/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ShardError, match=message):
        ShardSet.open(broken / "train_clean")
    assert verify(broken, 1).problems


def test_an_edited_figure_is_found(broken: Path) -> None:
    path = broken / "train_clean/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"hours": 500.0}))
    assert verify(broken, 1).problems == [f"{path}: its SHA-256 is not the manifest's"]


def test_an_index_that_is_a_pickle_or_an_archive_is_not_loaded(broken: Path) -> None:
    index = index_path(broken / "train_clean" / shard_name(0))
    whole = index.read_bytes()
    manifest = broken / "train_clean/manifest.json"
    unsigned = json.loads(manifest.read_text())
    for shard in unsigned["shards"]:
        del shard["index_sha256"]  # the checksum must not be the only guard
    manifest.write_text(json.dumps(unsigned))
    archive, objects = io.BytesIO(), io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    np.save(objects, np.array([_Bomb()], dtype=object), allow_pickle=True)
    for content_ in (pickle.dumps(_Bomb()), objects.getvalue(), archive.getvalue(), b"", whole[:100]):
        index.write_bytes(content_)
        with pytest.raises(ShardError, match=r"audio-000000\.npy: not a readable index"):
            ShardSet.open(broken / "train_clean")


@pytest.mark.parametrize(
    "manifest", ['{"format": 1, "subsets": 3}', '{"format": 1, "subsets": ["../.."]}', "[" * 99_999]
)
def test_a_corpus_manifest_that_cannot_be_is_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    for read in (subset_names, ShardSet.open):
        with pytest.raises(UserError, match=r"manifest\.json"):
            read(tmp_path)


def test_a_number_of_utterances_cannot_ask_for_all_memory(broken: Path) -> None:
    path = broken / "train_clean/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["rows"] = manifest["utterances"] = 10**12
    path.write_text(json.dumps(manifest))
    index_path(broken / "train_clean" / shard_name(0)).unlink()
    with pytest.raises(ShardError, match=r"\(shards\.0\.rows: "):
        ShardSet.open(broken / "train_clean", strict=False)
