"""What a teacher cache refuses, notices and mends: other segments, damage, forgery, two at once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mvat_dist import cache
from mvat_dist.config import parser
from mvat_dist.data.shards.format import TARGETS, index_path
from mvat_dist.data.shards.remote_cache import Cache
from mvat_dist.data.shards.targets import TeacherCache, cache_folder, target_shard
from mvat_dist.errors import UserError, exit_code
from mvat_dist.training import setup
from tests.cache_corpus import (
    VARIANTS,
    compact,  # noqa: F401 (a fixture, as the next ones)
    compact_maps,  # noqa: F401
    content,
    corpus,  # noqa: F401
    exact,  # noqa: F401
    from_cache,
    opened,
    options,
    teacher,  # noqa: F401
    write_teacher,
)
from tests.commands.test_train import COMMON
from tests.faulty_server import serving

# ruff: noqa: F811 (fixtures are imported and then asked for by name)


def refusal(corpus: Path, *arguments: str) -> str:
    """What opening a run's inputs says; nothing has been written then."""
    fixed = (f"--data.train={corpus}", *COMMON, "--student=mini", f"--data.variants={VARIANTS}")
    config = parser.parse([*fixed, "--data.tempo_probability=0.2", "--distil.method=mvat", *arguments])
    with pytest.raises(UserError) as refused:
        setup.open_inputs(config, 1, torch.device("cpu"), "fp32")
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--data.variants=3"], "variants 2, not 3"),
        (["--data.snr_db=[0,10]"], "snr_db"),
        (["--seed=4"], "seed 0, not 4"),
        (["--data.segment_seconds=0.3"], "segment_seconds 0.25, not 0.3"),
        (["--data.variants=0"], "segments that return"),
        (["--teacher={other}"], "weights"),
        (["--distil.method=mvat+output"], "does not hold output"),
        (["--data.train={elsewhere}"], "another corpus"),
    ],
)
def test_what_does_not_belong_is_refused(
    corpus: Path, compact_maps: Path, tmp_path: Path, changes: list[str], said: str
) -> None:
    other = write_teacher(tmp_path / "other.safetensors", seed=4)
    elsewhere = tmp_path / "corpus"
    shutil.copytree(corpus, elsewhere)
    manifest = elsewhere / "train_noise" / "manifest.json"
    manifest.write_text(re.sub(r'"sha256": "..', '"sha256": "00', manifest.read_text()))
    given = [change.format(other=other, elsewhere=elsewhere) for change in changes]
    assert said in refusal(corpus, *from_cache(compact_maps), *given)


def test_a_cache_of_a_version_that_knew_fewer_choices_is_one_with_their_defaults(
    corpus: Path, teacher: Path, compact_maps: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(compact_maps, older)
    header = json.loads((older / "teacher.json").read_text())
    del header["data"]["choices"]["synthetic_rooms"]
    (older / "teacher.json").write_text(json.dumps(header))

    def shards() -> dict[str, bytes]:
        return {name: one for name, one in content(older).items() if name.endswith((".tar", ".npy"))}

    before = shards()
    opened(corpus, teacher_cache=TeacherCache(older))
    cache.main(options(corpus, teacher, older))
    assert before
    assert shards() == before
    with pytest.raises(UserError, match=r"other segments \(.*synthetic_rooms 0\.0, not 0\.5\)"):
        opened(corpus, "--data.synthetic_rooms=0.5", teacher_cache=TeacherCache(older))
    with pytest.raises(UserError, match=r"another teacher cache \(.*synthetic_rooms 0\.0, not 0\.5\)"):
        cache.main(options(corpus, teacher, older, "--data.synthetic_rooms=0.5"))


def test_an_unfinished_or_torn_cache_is_refused(compact: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(compact, torn)
    index = index_path(target_shard(torn, 1))
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"teacher-000001\.npy"):
        TeacherCache(torn)
    (torn / "teacher.json").unlink()
    with pytest.raises(UserError, match="not a finished teacher cache"):
        TeacherCache(torn)
    with pytest.raises(UserError, match="not a finished"):
        TeacherCache(tmp_path)


def test_another_waveform_is_noticed(corpus: Path, exact: Path) -> None:
    targets = TeacherCache(exact)
    data = opened(corpus)
    targets.select([("encoder", 1, "channel")], output=False)
    targets.read(0, data.segment(0).noisy)
    for wrong in (data.segment(1).noisy, data.segment(0).noisy * np.float32(1.01), data.segment(0).clean):
        with pytest.raises(UserError, match="stale"):
            targets.read(0, wrong)


def flip(file: Path, at: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 0x10
    file.write_bytes(damaged)


def test_a_flipped_byte_is_found_by_verifying_and_by_training(
    corpus: Path, teacher: Path, compact: Path, tmp_path: Path
) -> None:
    torn = tmp_path / "flipped"
    shutil.copytree(compact, torn)
    flip(target_shard(torn, 0), 700)
    assert exit_code(cache.main, options(corpus, teacher, torn, "--output", "--verify")) == 2
    targets = TeacherCache(torn)
    targets.select([("encoder", 1, "channel")], output=False)
    number = int(np.load(index_path(target_shard(torn, 0)), allow_pickle=False)["segment"][0])
    with pytest.raises(UserError, match=rf"teacher-000000\.tar, segment {number}: the checksum of its"):
        opened(corpus, teacher_cache=targets).segment(number)
    substitute = opened(corpus, "--data.on_bad_sample=skip", teacher_cache=targets).segment(number)
    other = substitute.recipe["segment"]
    assert other != number
    assert "teacher-000000.tar" in substitute.recipe["bad_samples"][0]
    assert np.array_equal(substitute.noisy, opened(corpus).segment(other).noisy)
    assert substitute.teacher_targets is not None


def test_a_malicious_member_is_not_run(corpus: Path, exact: Path, tmp_path: Path) -> None:
    """A pickle in place of teacher targets, with a checksum that fits."""

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path}/pwned",)

    torn = tmp_path / "cache"
    shutil.copytree(exact, torn)
    path = target_shard(torn, 0)
    rows = np.load(index_path(path), allow_pickle=False)
    bomb = pickle.dumps(Bomb())
    with path.open("r+b") as stream:
        stream.seek(int(rows[TARGETS]["offset"][0]))
        stream.write(bomb)
    rows[TARGETS]["size"][0], rows[TARGETS]["crc32"][0] = len(bomb), zlib.crc32(bomb)
    np.save(index_path(path), rows)
    header = json.loads((torn / "teacher.json").read_text())
    header["shards"][0]["index_sha256"] = hashlib.sha256(index_path(path).read_bytes()).hexdigest()
    (torn / "teacher.json").write_text(json.dumps(header))
    targets = TeacherCache(torn)
    targets.select([("encoder", 1, "channel")], output=False)
    number = int(rows["segment"][0])
    with pytest.raises(UserError, match="no encoded teacher targets"):
        targets.read(number, opened(corpus).segment(number).noisy)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("harm", ["removed", "tar removed", "truncated", "index truncated"])
@pytest.mark.parametrize("finished", [True, False])
def test_the_same_command_mends_what_is_not_whole(
    corpus: Path, teacher: Path, compact: Path, tmp_path: Path, harm: str, finished: bool
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(compact, torn)
    tar, index = target_shard(torn, 1), index_path(target_shard(torn, 1))
    if harm == "truncated":
        os.truncate(tar, tar.stat().st_size // 2)
    elif harm == "index truncated":
        os.truncate(index, index.stat().st_size - 4)
    else:
        tar.unlink()
    if harm == "removed":
        index.unlink()
    if not finished:
        (torn / "teacher.json").unlink()
    kept = target_shard(torn, 0).stat().st_mtime_ns
    cache.main(options(corpus, teacher, torn, "--output"))
    assert content(torn) == content(compact)
    assert target_shard(torn, 0).stat().st_mtime_ns == kept


@pytest.mark.parametrize(("held", "asked"), [("0-of-2", "0/2"), ("1-of-2", "0/3"), ("0-of-1", "1/2")])
def test_two_at_the_same_shards_are_kept_apart(
    corpus: Path, teacher: Path, tmp_path: Path, held: str, asked: str
) -> None:
    """Another process holds a part's lock, as it does while it fills it."""
    out = tmp_path / "cache"
    out.mkdir()
    with (out / f".part-{held}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is filling"):
            cache.main(options(corpus, teacher, out, f"--part={asked}"))
    assert not list(out.glob("teacher*"))


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"name": "../../etc/passwd", "sha256": "0" * 64, "index_sha256": "0" * 64}]},
        {"shards": [{"name": "/dev/zero", "sha256": "0" * 64, "index_sha256": "0" * 64}]},
        {"shards": [{}]},
        {"segments": 0, "shards": []},
        {"codec": "pickle"},
        {"maps": {"encoder/1/channel": -1}},
        {"teacher": {"name": "x", "sha256": "0" * 64, "size": {"__class__": 1}}},
        {"teacher": {"name": "x", "sha256": "0" * 64, "size": {"kind": "base"}}},
        {"teacher": {"name": "x", "sha256": "0" * 64, "size": {"kind": "base", "hidden": "12"}}},
        {"teacher": {"name": "x", "sha256": "0" * 64, "size": {"kind": "base", "hidden": 12, "chunk": [64]}}},
        {"teacher": {"name": "x", "sha256": "0" * 64, "size": {"kind": "large", "hidden": 12}}},
        {"samples": None},
        {"format": 99},
    ],
)
def test_a_forged_header_is_refused(compact: Path, tmp_path: Path, change: dict) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(compact, forged)
    header = json.loads((forged / "teacher.json").read_text())
    (forged / "teacher.json").write_text(json.dumps(header | change))
    with pytest.raises(UserError, match=r"is damaged|has the format|names no shards|must be at least"):
        TeacherCache(forged)


def test_foreign_files_and_places(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "caching.json").write_text("[]")
    with pytest.raises(UserError, match="holds no cache of this version"):
        cache.main(options(corpus, teacher, foreign))
    with pytest.raises(UserError, match="is a file"):
        cache.main(options(corpus, teacher, teacher))
    with pytest.raises(UserError, match="a cache is made in a folder"):
        cache.main(options(corpus, teacher, Path("s3:/bucket/cache")))


def test_a_teacher_without_an_answer_is_refused(corpus: Path, tmp_path: Path) -> None:
    ill = write_teacher(tmp_path / "ill.safetensors", seed=1, scale=1e30)
    with pytest.raises(UserError, match="no finite output"):
        cache.main(options(corpus, ill, tmp_path / "cache"))


def test_half_precision_does_not_serve_full_precision(compact: Path, tmp_path: Path) -> None:
    other = tmp_path / "bf16"
    shutil.copytree(compact, other)
    header = json.loads((other / "teacher.json").read_text())
    (other / "teacher.json").write_text(json.dumps(header | {"precision": "bf16"}))
    TeacherCache(other).check_precision("bf16")
    with pytest.raises(UserError, match="was made in bf16"):
        TeacherCache(other).check_precision("fp32")
    TeacherCache(compact).check_precision("bf16")


def test_a_pickled_cache_is_small_and_reads_the_same(corpus: Path, exact: Path) -> None:
    """Readers get it through a pipe at every start."""
    targets = TeacherCache(exact, [("encoder", 1, "channel")], output=True)
    again = pickle.loads(pickle.dumps(targets))  # noqa: S301 (our own)
    assert len(pickle.dumps(targets)) < 1000
    noisy = opened(corpus).segment(3).noisy
    one, other = targets.read(3, noisy), again.read(3, noisy)
    assert np.array_equal(one.output, other.output)
    assert all(np.array_equal(one.maps[key], other.maps[key]) for key in one.maps)


def test_a_cache_at_a_url_reads_the_same(corpus: Path, exact: Path, tmp_path: Path) -> None:
    """By the same copies and checksums as audio; a pickle of it goes on with what was fetched."""
    key = ("encoder", 1, "channel")
    noisy = opened(corpus).segment(3).noisy
    expected = TeacherCache(exact, [key], output=True).read(3, noisy)
    with serving(folder=exact) as server:
        folder = cache_folder(server.url, Cache(str(tmp_path / "copies")))
        cached = TeacherCache(folder, [key], output=True)
        opened(corpus, teacher_cache=cached)
        first = cached.read(3, noisy)
    again = pickle.loads(pickle.dumps(cached)).read(3, noisy)  # noqa: S301 (our own)
    for targets in (first, again):
        assert np.array_equal(targets.output, expected.output)
        assert np.array_equal(targets.maps[key], expected.maps[key])
    assert list((tmp_path / "copies").glob("*/teacher-*.tar"))
