"""Shards at URLs: the data of the disk whatever the network does, or one clear line in bounded time."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mvat_dist.data.clips import ValidationClips
from mvat_dist.data.loader import TrainingData
from mvat_dist.data.mixing.checks import check_readers
from mvat_dist.data.shards import remote
from mvat_dist.data.shards.corpus import Corpus, fingerprints
from mvat_dist.data.shards.format import ShardError
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.remote import RemoteError
from mvat_dist.data.shards.remote_cache import MANIFEST, Cache, RemoteFolder
from mvat_dist.data.test_sets import held_out
from mvat_dist.errors import UserError
from tests.conftest import REPOSITORY
from tests.data.remote.conftest import clean, copies
from tests.faulty_server import Fault, serving
from tests.training_corpus import pairs, same, sources, taken

# --- the same data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [sources, pairs])
def test_training_on_a_url_equals_training_on_a_folder(corpus, server, tmp_path, config):
    local = TrainingData(config(corpus), seed=3)
    far = TrainingData(config(server.address, cache_dir=str(tmp_path / "my cache")), seed=3)
    assert len(far) == len(local)
    for position in range(len(local)):
        assert same(far.item(1, position), local.item(1, position))
    assert far.fingerprint() == local.fingerprint()
    for name in copies(tmp_path / "my cache"):
        assert server.count(f"/{far.iterated.name}/{name}") == 1  # fetched once, however often it is read


TAKE = """
import hashlib, sys
from tests.training_corpus import TrainingData, sources, taken
data = TrainingData(sources(sys.argv[1], cache_dir=sys.argv[2]), seed=3)
steps = taken(data, world_size=2, first_step=0, steps=1, workers=2)
print(hashlib.sha256(repr(steps).encode()).hexdigest())
"""


def test_reader_processes_share_the_copies(corpus, store, tmp_path):
    # In a fresh process: the fork server of this one may have been started without the test's credentials.
    command = [sys.executable, "-c", TAKE, store.address, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    place = {"world_size": 2, "first_step": 0, "steps": 1, "workers": 0}
    local = taken(TrainingData(sources(corpus), seed=3), **place)
    assert done.stdout.strip() == hashlib.sha256(repr(local).encode()).hexdigest()
    for number in range(5):
        assert store.count(f"/train_clean/audio-{number:06d}.tar") == 1


def test_held_out_clips_at_a_url(corpus, server):
    local = ValidationClips(corpus / "train_pairs")
    far = ValidationClips(RemoteFolder(f"{server.address}/train_pairs", Cache()))
    assert far.keys == local.keys
    for one, other in zip(far, local, strict=True):
        assert np.array_equal(one.noisy, other.noisy)
        assert np.array_equal(one.clean, other.clean)
    (section,) = held_out(f"{server.address}/train_pairs", 0, 0.0).items()
    assert (section[0], section[1].keys) == ("train_pairs", local.keys)


def test_the_identity_of_data_is_that_of_its_manifests(corpus, server):
    far = Corpus("--data.train", server.address, Cache()).all_folders()
    local = Corpus("--data.train", corpus, Cache()).all_folders()
    assert list(fingerprints(far).values()) == list(fingerprints(local).values())
    assert len(set(fingerprints(far).values())) == 5  # the corpus and its four subsets


# --- passing troubles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unavailable", "reset", "truncated", "longer", "flipped", "hung"])
def test_a_passing_trouble_changes_nothing(corpus, server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(remote, "READ_SECONDS", 0.4)
    server.faults = [Fault(r"train_clean/(audio-000001|manifest)", kind, times=2)]
    if kind in ("flipped", "longer"):  # nothing tells what a manifest should be but its form
        server.faults[0].path = r"train_clean/audio-000001\.tar"
    far, local = clean(server, tmp_path), ShardSet.open(corpus / "train_clean")
    server.faults.append(Fault(r"train_clean/audio-000001\.tar", kind, times=2))
    for index in range(len(local)):
        assert np.array_equal(far.read(index), local.read(index))
    assert server.count("train_clean/audio-000001.tar") >= 3
    assert len(copies(tmp_path)) == 5
    assert not list(tmp_path.rglob("*.tmp"))


# --- lasting troubles: one line that names the URL and the cause ------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error", "words", "most"),
    [
        ("unavailable", RemoteError, "503", remote.TRIES),
        ("hung", RemoteError, "timed out", remote.TRIES),
        ("flipped", ShardError, "SHA-256 is not the manifest's|damaged there", remote.TRIES),
        ("longer", ShardError, "manifest says", remote.TRIES),
        ("missing", ShardError, "404", 1),
        ("forbidden", RemoteError, "403", 1),
    ],
)
def test_a_lasting_trouble_is_one_line(server, tmp_path, monkeypatch, kind, error, words, most):
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    far = clean(server, tmp_path)
    server.faults = [Fault(r"audio-000000\.tar", kind)]
    for _ in range(2 if error is ShardError else 1):  # a damaged one is not fetched again and again
        with pytest.raises(error, match=words) as refusal:
            far.read(0)
    message = str(refusal.value)
    assert f"{server.address}/train_clean/audio-000000.tar" in message
    assert "\n" not in message
    assert type(refusal.value) is error or error is ShardError
    assert 1 <= server.count("audio-000000.tar") <= most
    assert not copies(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    server.faults = []
    assert clean(server, tmp_path).read(0).size  # nothing of it stays


def test_an_outage_is_no_damage_that_a_run_may_skip(web, tmp_path):
    config = sources(web.address, cache_dir=str(tmp_path), on_bad_sample="skip", max_bad_samples=1.0)
    data = TrainingData(config, seed=0)
    web.faults = [Fault(r"train_clean/audio-000000\.tar", "flipped")]
    damaged = [data.item(0, at).recipe["bad_samples"] for at in range(len(data))]
    assert any(damaged)
    assert not all(damaged)
    assert web.count("train_clean/audio-000000.tar") == remote.TRIES
    again = TrainingData(config, seed=0)
    web.faults = [Fault(r"train_clean/audio-000000\.tar", "unavailable")]
    with pytest.raises(RemoteError, match="503"):
        [again.item(0, at) for at in range(len(again))]


def test_no_network_is_said_soon(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/dns"
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r"dns/manifest\.json: no answer .*network"):
        check_readers(sources(address, cache_dir=str(tmp_path)), 1)
    assert time.monotonic() - begun < 10


def test_missing_credentials_are_said(store, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match="no usable credentials"):
        clean(store, tmp_path)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}: .*\[remote\]"):
        Corpus("--data.train", f"{scheme}://somewhere/dns", Cache())


def test_what_is_no_packed_folder_is_said(server, tmp_path):
    for name in ("nothing", "train_clean"):
        with pytest.raises(UserError, match=rf"{name}.* (is not a packed corpus|is one packed subset)"):
            Corpus("--data.train", f"{server.address}/{name}", Cache(str(tmp_path)))


@pytest.mark.parametrize(
    "change", [{"name": "../audio-000000.tar"}, {"name": "/etc/passwd"}, {"sha256": "../x"}, {"bytes": None}]
)
def test_an_untrusted_manifest_names_nothing_but_its_shards(corpus, tmp_path, change):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    manifest = json.loads((folder / "train_clean" / MANIFEST).read_text())
    manifest["shards"][0] |= change
    (folder / "train_clean" / MANIFEST).write_text(json.dumps(manifest))
    with serving(folder=folder) as served:
        served.address = served.url
        with pytest.raises(ShardError, match=r"train_clean/manifest\.json is damaged"):
            clean(served, tmp_path / "cache")
        assert served.gets == ["/train_clean/manifest.json"]


def test_a_manifest_or_an_index_without_end_is_broken_off(web, tmp_path):
    web.faults = [Fault(r"train_clean/manifest\.json", "endless")]
    with pytest.raises(ShardError, match=r"manifest\.json: it has more than 64000000 bytes"):
        clean(web, tmp_path)
    most = remote.TRIES_AT_START * (64_000_000 + (16 << 20))  # what the kernel had taken, too
    assert web.sent < most
    web.faults = [Fault(r"train_clean/audio-000000\.npy", "endless")]
    with pytest.raises(ShardError, match=r"audio-000000\.npy: it has more than \d+ bytes"):
        clean(web, tmp_path)
    assert not list(tmp_path.rglob("audio-000000.npy"))


def test_a_manifest_that_changes_does_not_change_a_run(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    with serving(folder=folder) as served:
        served.address = served.url
        opened = clean(served, tmp_path / "cache")
        shutil.rmtree(folder / "train_clean")
        shutil.copytree(folder / "train_noise", folder / "train_clean")
        later = copy.deepcopy(opened)  # as pickling does: a reader process that starts later
        assert later.keys == ShardSet.open(corpus / "train_clean").keys
        with pytest.raises(
            ShardError, match=r"audio-000000\.tar: it has"
        ):  # what is there now is another one
            later.read(0)


def test_looking_at_data_writes_nothing(web, tmp_path):
    """A login node may lack the disk that the nodes have for copies."""
    check_readers(sources(web.address, cache_dir=str(tmp_path / "cache"), workers=1), 5)
    assert not (tmp_path / "cache").exists()
