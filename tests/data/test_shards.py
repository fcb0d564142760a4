"""The shard format: readable by plain webdataset and tar, exact by index, and never silently wrong."""

from __future__ import annotations

import copy as copying
import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.data.shards.codecs import BLOCK, Codec
from mvat_dist.data.shards.format import ShardError, audio_layout, index_path, shard_name
from mvat_dist.data.shards.manifest import subset_names
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.writer import Sample, write_shard
from mvat_dist.errors import UserError
from tests.tiny_corpus import pcm, write_pairs, write_sources

LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 20_000, 33_333]
CODECS: tuple[Codec, ...] = ("flac", "int16")


def _noise(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples)


@pytest.fixture(scope="module")
def audio() -> dict[str, np.ndarray]:
    return {f"utt_{number}": _noise(number, length) for number, length in enumerate(LENGTHS)}


@pytest.fixture(scope="module", params=CODECS)
def sources(
    request: pytest.FixtureRequest,
    audio: dict[str, np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    corpus = tmp_path_factory.mktemp("packed corpus")
    return write_sources(corpus, "train_noise", audio, shards=2, codec=request.param)


def test_every_sample_comes_back_exactly(sources: Path, audio: dict[str, np.ndarray]) -> None:
    subset = ShardSet.open(sources)
    assert (subset.kind, subset.name, len(subset)) == ("sources", "train_noise", len(audio))
    assert subset.keys == list(audio)
    assert subset.samples.tolist() == LENGTHS
    for index, signal in enumerate(audio.values()):
        read = subset.read(index)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, pcm(signal) / np.float32(32768))


@given(index=st.integers(0, len(LENGTHS) - 1), start=st.integers(0, 40_000), frames=st.integers(0, 40_000))
def test_a_part_equals_the_slice_of_the_whole(sources: Path, index: int, start: int, frames: int) -> None:
    subset = ShardSet.open(sources)
    np.testing.assert_array_equal(
        subset.read(index, start=start, frames=frames), subset.read(index)[start : start + frames]
    )


def test_plain_webdataset_reads_the_same(sources: Path) -> None:
    subset = ShardSet.open(sources)
    urls = [str(sources / shard_name(number)) for number in range(2)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == subset.keys
    for index, sample in enumerate(samples):
        if subset.codec == "flac":
            decoded, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="int16")
            assert rate == 16_000
        else:
            decoded = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
            assert decoded.dtype == np.int16
        np.testing.assert_array_equal(decoded / np.float32(32768), subset.read(index))
        assert json.loads(sample["json"]) == subset.meta(index)


@pytest.mark.parametrize("codec", CODECS)
def test_the_members_of_a_pair_are_adjacent_and_read_by_field(tmp_path: Path, codec: Codec) -> None:
    pairs = {f"pair_{number}": (_noise(number, 9000), _noise(number + 9, 9000)) for number in range(3)}
    subset = ShardSet.open(write_pairs(tmp_path, "valid", pairs, codec=codec))
    for index, (noisy, clean) in enumerate(pairs.values()):
        np.testing.assert_array_equal(subset.read(index, "noisy"), pcm(noisy) / np.float32(32768))
        np.testing.assert_array_equal(subset.read(index, "clean"), pcm(clean) / np.float32(32768))
    with tarfile.open(tmp_path / "valid" / shard_name(0)) as tar:
        names = tar.getnames()
    ends = [f"{side}.{'flac' if codec == 'flac' else 'npy'}" for side in ("clean", "noisy")]
    assert names == [f"{key}.{end}" for key in pairs for end in sorted([*ends, "json"])]


def test_a_flipped_byte_is_named_or_harmless(sources: Path, tmp_path: Path) -> None:
    """At 300 random places: every utterance either reads as before or raises with its shard and key."""
    whole = ShardSet.open(sources)
    expected = [whole.read(index) for index in range(len(whole))]
    copy = tmp_path / "train_noise"
    shutil.copytree(sources, copy)
    shard = copy / shard_name(1)
    content = bytearray(shard.read_bytes())
    in_shard = [index for index in range(len(whole)) if index >= 3]
    random = np.random.default_rng(0)
    messages = []
    for place in random.integers(len(content), size=300).tolist():
        before = content[place]
        content[place] ^= 1 << random.integers(8)
        shard.write_bytes(content)
        subset = ShardSet.open(copy)
        for index in in_shard:
            try:
                np.testing.assert_array_equal(subset.read(index), expected[index])
            except ShardError as error:
                messages.append((f"{shard}, key {subset.key(index)}: ", str(error)))
        content[place] = before
    assert len(messages) > 100
    assert all(error.startswith(place) for place, error in messages)


def test_a_truncated_shard_raises_for_what_is_missing_only(sources: Path, tmp_path: Path) -> None:
    copy = tmp_path / "train_noise"
    shutil.copytree(sources, copy)
    shard = copy / shard_name(0)
    with shard.open("r+b") as stream:
        stream.truncate(8000)
    subset = ShardSet.open(copy)
    np.testing.assert_array_equal(subset.read(0), ShardSet.open(sources).read(0))
    with pytest.raises(ShardError, match="utt_2: the file ends"):
        subset.read(2)
    shard.unlink()
    with pytest.raises(ShardError, match=r"audio-000000\.tar, key utt_0: the file is missing"):
        ShardSet.open(copy).meta(0)


@pytest.mark.parametrize("trouble", [errno.ESTALE, errno.EMFILE, errno.EIO])
def test_the_trouble_of_a_file_server_is_no_damage(
    sources: Path, monkeypatch: pytest.MonkeyPatch, trouble: int
) -> None:
    """The job then fails as one whose node failed, and comes back; a bad disk's error is damage."""

    def refused(*_: object) -> bytes:
        raise OSError(trouble, os.strerror(trouble))

    subset = ShardSet.open(sources)
    monkeypatch.setattr(os, "pread", refused)
    with pytest.raises(ShardError if trouble == errno.EIO else OSError, match=os.strerror(trouble)) as raised:
        subset.read(0)
    assert isinstance(raised.value, UserError) == (trouble == errno.EIO)


def test_it_travels_to_other_processes(sources: Path) -> None:
    subset = ShardSet.open(sources)
    subset.read(5)  # descriptors are open, and must not be shared by number
    assert len(pickle.dumps(subset)) < 1000
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(subset.read, (4,)), subset.read(4))


def test_open_files_stay_few_and_are_closed(tmp_path: Path) -> None:
    many = {f"utt_{number:03d}": _noise(number, 10) for number in range(150)}
    subset = ShardSet.open(write_sources(tmp_path, "train_clean", many, shards=150))
    before = _open_files()
    for index in range(150):
        assert subset.read(index).size == 10
    assert _open_files() <= before + 64
    del subset
    assert _open_files() == before


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_not_a_packed_subset_is_refused(sources: Path, tmp_path: Path) -> None:
    assert subset_names(sources.parent) == ["train_noise"]
    with pytest.raises(UserError, match="no such folder"):
        ShardSet.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        ShardSet.open(tmp_path)
    with pytest.raises(UserError, match="name one of its subsets: train_noise"):
        ShardSet.open(sources.parent)
    with pytest.raises(UserError, match="give the folder above"):
        subset_names(sources)
    copy = tmp_path / "train_noise"
    shutil.copytree(sources, copy)
    # A pickle that would run code when loaded, in place of the index.
    np.save(index_path(copy / shard_name(0)), np.array([_Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="not a readable index"):
        ShardSet.open(copy)
    (copy / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has the format 99, but this version of mvat_dist reads 2"):
        ShardSet.open(copy)


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)


def test_a_damaged_index_moves_no_other_utterance(sources: Path, tmp_path: Path) -> None:
    """Without `strict`, what has no index keeps its place and its key and raises when it is read."""
    copy = tmp_path / "train_noise"
    shutil.copytree(sources, copy)
    index = index_path(copy / shard_name(0))
    index.write_bytes(index.read_bytes()[:-7])
    with pytest.raises(ShardError, match=r"audio-000000\.npy: not a readable index"):
        ShardSet.open(copy)
    whole, subset = ShardSet.open(sources), ShardSet.open(copy, strict=False)
    assert len(subset) == len(whole)
    assert list(subset.damaged) == [0]
    assert subset.keys == [f"train_noise_{number:07d}" for number in range(3)] + whole.keys[3:]
    for field in ("read", "meta"):
        with pytest.raises(ShardError, match=r"audio-000000\.tar, key train_noise_0000001: its index"):
            getattr(subset, field)(1)
    for position in range(3, 6):
        np.testing.assert_array_equal(subset.read(position), whole.read(position))
    assert copying.copy(subset).keys == subset.keys


def test_a_member_that_is_no_flac_is_named(tmp_path: Path) -> None:
    """A shard whose checksums are right, made by someone who means harm or who packed something else."""
    harm = pickle.dumps(_Bomb())
    wave = io.BytesIO()
    soundfile.write(wave, np.zeros(100), 16_000, format="WAV")
    stereo = io.BytesIO()
    soundfile.write(stereo, np.zeros((100, 2)), 16_000, format="FLAC")
    deep = b"[" * 100_000
    members = [
        {"flac": harm, "json": harm},
        {"flac": wave.getvalue(), "json": b"[]"},
        {"flac": stereo.getvalue(), "json": deep},
        {"flac": b"fLaC" + bytes(100), "json": b"\xff"},
    ]
    folder = tmp_path / "train_clean"
    samples = [Sample(f"utt_{at}", one, 100, -25.0, float("nan")) for at, one in enumerate(members)]
    write_shard(folder / shard_name(0), audio_layout("sources"), samples)
    manifest = {"format": 2, "subset": "train_clean", "kind": "sources"}
    shards = [{"name": shard_name(0), "rows": len(members)}]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))
    subset = ShardSet.open(folder)
    for index in range(len(members)):
        for field in ("read", "meta"):
            with pytest.raises(ShardError, match=rf"audio-000000\.tar, key utt_{index}: its (audio|json) "):
                getattr(subset, field)(index)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("samples", -1),
        ("key", b"../../x"),
        ("key", b"/etc/x"),
        ("key", b"caf\xe9"),
        ("key", b"UTT"),
        ("key", b"a\0b"),
        ("key", b""),
    ],
)
def test_a_foreign_index_is_refused(tmp_path: Path, field: str, value: int | bytes) -> None:
    """Without samples nothing would ever fill a segment; a key becomes a file's name in many hands."""
    folder = write_sources(tmp_path, "train_noise", {f"utt_{at}": _noise(at, 100) for at in range(3)})
    index = index_path(folder / shard_name(0))
    rows = np.load(index, allow_pickle=False)
    rows[field][1] = value
    np.save(index, rows, allow_pickle=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0].pop("index_sha256")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"audio-000000\.npy: (not the index of|a key is not of)"):
        ShardSet.open(folder)


def test_a_manifest_with_fewer_samples_than_utterances_is_refused(tmp_path: Path) -> None:
    folder = write_sources(tmp_path, "train_noise", {f"utt_{at}": _noise(at, 100) for at in range(3)})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["samples"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fewer samples than utterances"):
        ShardSet.open(folder, strict=False)
