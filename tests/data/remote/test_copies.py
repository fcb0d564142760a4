"""The copies of remote shards on this machine: fetched once, bounded, and never half a shard."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.data.mixing.checks import check_readers
from mvat_dist.data.shards.corpus import open_subset
from mvat_dist.data.shards.files import open_shard
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.remote import RemoteError
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.errors import UserError
from tests.conftest import REPOSITORY
from tests.data.remote.conftest import clean, copies
from tests.faulty_server import Fault, Server, serving
from tests.training_corpus import sources
from tests.waiting import until

FETCH = """
import sys
from mvat_dist.data.shards.remote_cache import Cache, RemoteFolder
from mvat_dist.data.shards.reader import ShardSet
ShardSet.open(RemoteFolder(sys.argv[1], Cache(sys.argv[2]))).read(0)
"""


def fetching(server: Server, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, f"{server.address}/train_clean", str(cache)], cwd=REPOSITORY
    )


def test_processes_that_ask_at_once_fetch_once(web, tmp_path):
    web.faults = [Fault(r"audio-000000\.(tar|npy)", "slow")]  # long enough for all to ask
    processes = [fetching(web, tmp_path) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert web.count("train_clean/audio-000000.tar") == 1
    assert web.count("train_clean/audio-000000.npy") == 1


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_shard(corpus, web, tmp_path):
    web.faults = [Fault(r"audio-000000\.tar", "hung", times=1)]
    process = fetching(web, tmp_path)

    def begun() -> bool:
        assert process.poll() is None
        return any(path.stat().st_size for path in tmp_path.glob("*/.audio-000000.tar.*.tmp"))

    until(begun, 60)
    process.kill()
    process.wait()
    assert not copies(tmp_path)
    assert list(tmp_path.glob("*/.audio-000000.tar.*.tmp"))
    assert np.array_equal(clean(web, tmp_path).read(0), ShardSet.open(corpus / "train_clean").read(0))
    assert not list(tmp_path.glob("*/.audio-000000.tar.*.tmp"))


def test_the_cache_is_bounded_and_keeps_what_is_open_and_used_last(corpus, web, tmp_path):
    sizes = [
        shard["bytes"] for shard in json.loads((corpus / "train_clean" / MANIFEST).read_text())["shards"]
    ]
    extra = 40_000  # manifests and indices
    limit = 2.5 * max(sizes) + extra
    held = clean(web, tmp_path, limit_gb=limit / 1e9)
    firsts = np.cumsum([0, *(shard.rows for shard in held.shards)])
    held.read(0)
    for turn in (1, 2, 3, 4, 1, 2):
        once = clean(web, tmp_path, limit_gb=limit / 1e9)
        once.read(int(firsts[turn]))
        once.close()
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= limit
        there = copies(tmp_path)
        assert {"audio-000000.tar", f"audio-{turn:06d}.tar"} <= set(there)
    held.read(1)
    assert web.count("train_clean/audio-000000.tar") == 1
    assert web.count("train_clean/audio-000001.tar") == 2  # it had to go
    held.close()
    for turn in (3, 4):  # no longer open, and used the longest time ago
        clean(web, tmp_path, limit_gb=limit / 1e9).read(int(firsts[turn]))
    assert "audio-000000.tar" not in copies(tmp_path)


def test_a_cut_copy_is_fetched_again(corpus, web, tmp_path):
    clean(web, tmp_path).read(0)
    (cut,) = tmp_path.glob("*/audio-000000.tar")
    cut.write_bytes(cut.read_bytes()[:1000])
    assert np.array_equal(clean(web, tmp_path).read(0), ShardSet.open(corpus / "train_clean").read(0))


def test_without_the_server_what_is_open_goes_on_and_nothing_new_starts(corpus, tmp_path):
    with serving(folder=corpus.parent) as web:
        web.address = f"{web.url}/{corpus.name}"
        far = clean(web, tmp_path)
        everything = [far.read(index) for index in range(len(far))]
    worker = copy.deepcopy(far)  # as pickling does: a reader process that starts later
    assert all(np.array_equal(worker.read(index), audio) for index, audio in enumerate(everything))
    with pytest.raises(RemoteError, match="no answer"):
        clean(web, tmp_path)


def test_a_cache_that_cannot_be_is_refused(web, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot make the folder"):
        clean(web, tmp_path / "file" / "cache")


def test_a_full_disk_is_named(corpus, web, tmp_path):
    """A limit of the file size stands for the full disk: the same way out of write()."""
    size = max(shard.bytes for shard in ShardSet.open(corpus / "train_clean").shards)
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2)\n{FETCH}"
    command = [sys.executable, "-c", code, f"{web.address}/train_clean", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "UserError" in done.stderr or "RemoteError" in done.stderr
    assert "cache" in done.stderr.splitlines()[-1]
    assert not copies(tmp_path)


def test_a_cache_without_room_for_the_training_shards_is_refused_at_the_start(web, tmp_path):
    config = sources(web.address, cache_dir=str(tmp_path), workers=1)
    check_readers(config, 5)
    with pytest.raises(UserError, match=r"--data\.cache_gb is 1e-05: give them room"):
        check_readers(replace(config, cache_gb=1e-5), 5)
    with pytest.raises(UserError, match=r"dns en/train_clean has 5 shards for 6 readers"):
        check_readers(config, 6)


def test_local_data_needs_no_back_end(corpus):
    code = (
        "import sys\nfrom mvat_dist.config.schema import DataConfig\n"
        "from mvat_dist.data.mixing.checks import check_readers\n"
        f"check_readers(DataConfig(train={str(corpus)!r}, workers=1), 1)\n"
        "assert not {'torch', 'fsspec', 's3fs', 'aiohttp'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def test_the_shard_itself_is_plain(web, tmp_path):
    """What lies in the cache is the tar as it was packed."""
    far = clean(web, tmp_path)
    with open_shard(far.folder, far.shards[2]) as stream:
        content = stream.read()
    assert content == (web.folder / "dns en" / "train_clean" / "audio-000002.tar").read_bytes()
    assert open_subset([far.folder]).keys == far.keys
