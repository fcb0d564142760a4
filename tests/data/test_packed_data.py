"""How packed data is named: refusals that tell no secret, and several corpora joined to one."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
import s3fs
import webdataset
from moto.server import ThreadedMotoServer

from mvat_dist.config import locations, parser
from mvat_dist.data.loader import TrainingData
from mvat_dist.data.mixing import checks
from mvat_dist.data.mixing.checks import check_readers, training_mode
from mvat_dist.data.shards import corpus as packed
from mvat_dist.data.shards.corpus import Corpus, fingerprints, locate, open_subset
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.remote_cache import MANIFEST, Cache, RemoteFolder
from mvat_dist.data.test_sets import held_out
from mvat_dist.errors import UserError
from tests.conftest import REPOSITORY
from tests.tiny_corpus import write_pairs, write_sources
from tests.training_corpus import pairs, same, sources, taken, tone, write_corpus

CACHE = Cache()


def write_more(folder: Path) -> Path:
    """Another corpus: some of the same keys, other audio, another codec, no rooms, a test set."""
    random = np.random.default_rng(8)
    write_sources(folder, "train_clean", {f"s{n:03d}": tone(random, 5000) for n in range(4)}, 2, "int16")
    write_sources(folder, "train_noise", {"n0": tone(random, 9000)})
    clean = tone(random, 9000)
    write_pairs(folder, "train_pairs", {"p00": (clean + 0.01 * tone(random, 9000), clean)})
    write_pairs(folder, "test_more", {"t0": (clean, clean)})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("all") / "my shards"
    write_more(folder / "dns-de")
    write_corpus(folder / "dns-en")
    return folder


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat secret",
        "pipe: curl https://host/x",
        "file:///data/dns",
        "simplecache::s3://bucket/dns",
        "ftp://host/dns",
        "S3://bucket/dns",
        "s3:/bucket/dns",
        "s3:///dns",
        "s3://AKIA:se/cret@bucket/dns",
        "{s3://AKIA:secret@bucket/dns,shards/a}",
        "https://user:secret@host/dns",
        "https://host/dns?X-Amz-Signature=secret",
        "https://host/dns#secret",
        "http://host/dns-*",
        "s3://bucket/{dns",
        "s3://bucket/{dns?secret,",
    ],
)
def test_what_is_no_location_is_refused_before_anything_is_opened(location):
    with pytest.raises(UserError) as refusal:
        parser.parse(["--distil.method=none", "--data.train", location])
    assert "--data.train" in str(refusal.value) or "braces" in str(refusal.value)
    assert "secret" not in str(refusal.value).replace("is a secret", "")
    with pytest.raises(UserError):
        locate("--data", location, CACHE)
    with pytest.raises(UserError):
        held_out(location, 0, 0.0)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://bucket/shards/dns/", "s3://bucket/shards/dns"),
        ("gs://bucket/{en,de}/dns", "gs://bucket/{en,de}/dns"),
        ("https://host:8080/a b", "https://host:8080/a b"),
        ("shards/{dns-en,dns-de}", "{here}/shards/{dns-en,dns-de}"),
        ("shards/dns-*", "{here}/shards/dns-*"),
        ("{shards/a,/data/b,s3://bucket/c}", "{{here}/shards/a,/data/b,s3://bucket/c}"),
    ],
)
def test_a_run_names_its_data_the_same_from_every_folder(given, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parser.parse(["--distil.method=none", "--data.train", given, "--data.valid", given])
    assert config.data.train == config.data.valid == kept.replace("{here}", str(tmp_path))
    (tmp_path / "config.yaml").write_text(parser.to_yaml(config))
    monkeypatch.chdir("/")
    again = parser.parse(["--config", str(tmp_path / "config.yaml")])
    assert parser.fingerprint(again) == parser.fingerprint(config)
    again.data.cache_dir, again.data.cache_gb = "/local", 1.0
    assert parser.fingerprint(again) == parser.fingerprint(config)


def test_the_cache_needs_room():
    with pytest.raises(UserError, match=r"--data\.cache_gb 0: must be"):
        parser.parse(["--distil.method=none", "--data.cache_gb=0"])


def test_a_folder_with_the_name_of_a_pattern_is_that_folder(tmp_path):
    write_more(tmp_path / "{a,b}[1]")
    assert Corpus("--data", tmp_path / "{a,b}[1]", CACHE).names[0] == "train_clean"


def test_labels_tell_apart():
    assert locations.labels(["s/dns-en", "s/dns-de"]) == ["dns-en", "dns-de"]
    assert locations.labels(["s3://b/en/v1/dns", "s3://b/de/v1/dns"]) == ["en", "de"]
    assert len(set(locations.labels(["a", "a/a", "a/a/a"]))) == 3


# --- joined -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "order"), [("{dns-en,dns-de}", ("en", "de")), ("dns-*", ("de", "en"))])
def test_joined_subsets_are_concatenated_in_order(shards, pattern, order):
    corpus = Corpus("--data", shards / pattern, CACHE)
    joined = open_subset(corpus.subset("train_clean"))
    parts = [ShardSet.open(shards / f"dns-{name}" / "train_clean") for name in order]
    expected = [(name, part, at) for name, part in zip(order, parts, strict=True) for at in range(len(part))]
    assert len(joined) == len(expected) == 33
    assert joined.keys == [f"dns-{name}/{part.key(at)}" for name, part, at in expected]
    assert len(set(joined.keys)) == 33
    for index, (name, part, at) in enumerate(expected):
        assert joined.key(index) == f"dns-{name}/{part.key(at)}"
        assert joined.samples[index] == part.samples[at]
        assert np.array_equal(joined.read(index, start=100, frames=700), part.read(at, start=100, frames=700))
        assert joined.meta(index) == part.meta(at)
    assert np.array_equal(joined.read(-1), parts[-1].read(-1))
    assert corpus.subset("train_rir") == [shards / "dns-en" / "train_rir"]


@pytest.mark.parametrize("config", [sources, pairs])
def test_training_on_joined_corpora(shards, config):
    data = TrainingData(config(shards / "dns-{en,de}"), seed=1)
    assert len(data) == {"dynamic": 33, "premixed": 14}[data.mode]
    recipes = [data.item(0, position).recipe for position in range(len(data))]
    visited = [recipe["speech"][0] if data.mode == "dynamic" else recipe for recipe in recipes]
    assert {first["key"] for first in visited} == set(data.iterated.keys)
    lengths = dict(zip(data.iterated.keys, data.iterated.samples, strict=True))
    assert all(first["start"] + first["frames"] <= lengths[first["key"]] for first in visited)


def test_joined_corpora_are_the_same_in_reader_processes(shards):
    place = {"world_size": 2, "first_step": 1, "steps": 1}
    data = TrainingData(sources(shards / "dns-{en,de}"), seed=1)
    assert taken(data, **place, workers=2) == taken(data, **place, workers=0)


def test_joined_corpora_are_the_same_wherever_they_lie(shards, tmp_path):
    shutil.copytree(shards / "dns-en", tmp_path / "one" / "a")
    shutil.copytree(shards / "dns-de", tmp_path / "other" / "b" / "c")
    here = TrainingData(sources(shards / "dns-{en,de}"), seed=1)
    there = TrainingData(sources(tmp_path / "{one/a,other/b/c}"), seed=1)
    assert there.fingerprint() == here.fingerprint()
    assert np.array_equal(there.item(0, 30).noisy, here.item(0, 30).noisy)
    turned = TrainingData(sources(tmp_path / "{other/b/c,one/a}"), seed=1)
    assert turned.fingerprint() != here.fingerprint()
    assert TrainingData(sources(shards / "dns-en"), seed=1).fingerprint() != here.fingerprint()


def test_joined_keys_name_no_other_folder(shards, monkeypatch):
    """They become names of files in a teacher cache."""
    monkeypatch.chdir(shards / "dns-en")
    folders = [Path("train_clean"), Path("../dns-de/train_clean")]
    assert {key.rpartition("/")[0] for key in open_subset(folders).keys} == {"dns-en", "dns-de"}
    labels = packed.labels_of([Path("/data/en"), RemoteFolder("s3://bucket/en", CACHE)])
    assert labels == ["data", "s3:/bucket"]
    with pytest.raises(UserError, match=r"s3://bucket/\.\./de: .*\.\."):
        locate("--data", "s3://bucket/{en,../de}", CACHE)


def test_joined_held_out_sets(shards):
    sections = held_out(shards / "{dns-en,dns-de}", 0, 0.0)
    assert {name: clips.keys for name, clips in sections.items()} == {"test_more": ["t0"]}
    (clips,) = held_out(shards / "dns-{en,de}" / "train_pairs", 0, 0.0).values()
    assert len(clips) == 14


def test_readers_are_counted_over_all_corpora(shards):
    check_readers(sources(shards / "dns-{en,de}", workers=1), 7)
    with pytest.raises(UserError, match=r"dns-en/train_clean and .*dns-de/train_clean has 7 shards for 8"):
        check_readers(sources(shards / "dns-{en,de}", workers=1), 8)


def test_the_fingerprint_covers_every_manifest(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")

    def current() -> list[str | None]:
        return list(fingerprints(Corpus("--data", copy / "dns-*", CACHE).all_folders()).values())

    before = current()
    for manifest in sorted(copy.rglob(MANIFEST)):
        kept = manifest.read_text()
        manifest.write_text(kept + " ")
        assert current() != before
        manifest.write_text(kept)
    assert current() == before


def test_joins_that_make_no_sense_are_refused(shards, tmp_path):
    for pattern, words in (
        ("{dns-en,dns-en}", "names .* twice"),
        ("nothing-*", "no folder is called so"),
        ("dns-{en,fr}", "no such folder"),
        ("{dns-en,dns-en/train_clean}", "is one packed subset"),
    ):
        with pytest.raises(UserError, match=words):
            Corpus("--data.train", shards / pattern, CACHE)
    shutil.copytree(shards / "dns-en", tmp_path / "a")
    shutil.copytree(shards / "dns-en", tmp_path / "b")
    with pytest.raises(UserError, match="hold the same shard"):
        TrainingData(sources(tmp_path / "{a,b}"), seed=0)
    with pytest.raises(UserError, match="give subsets of one name and kind"):
        open_subset([shards / "dns-en" / "train_pairs", shards / "dns-en" / "train_clean"])


def test_no_joined_corpus_is_left_out_without_a_word(shards, tmp_path):
    (tmp_path / "en").symlink_to(shards / "dns-en")
    clean = tone(np.random.default_rng(0), 9000)
    write_pairs(tmp_path / "only-pairs", "train_pairs", {"p": (clean, clean)})
    with pytest.raises(UserError, match=r"only-pairs has nothing for --data.mode dynamic"):
        training_mode(sources(tmp_path / "{en,only-pairs}"))
    assert training_mode(pairs(tmp_path / "{en,only-pairs}")) == "premixed"


@pytest.mark.parametrize("changes", [{"synthetic_rooms": 1.0}, {"reverb_probability": 0.0}])
def test_rooms_count_only_where_they_are_read(shards, tmp_path, monkeypatch, changes):
    (tmp_path / "en").symlink_to(shards / "dns-en")
    write_sources(tmp_path / "only-rooms", "train_rir", {"r": tone(np.random.default_rng(0), 900)})
    joined = sources(tmp_path / "{en,only-rooms}", workers=1)
    read: list[str] = []
    monkeypatch.setattr(checks, "remote_bytes", lambda folders: read.extend(one.name for one in folders) or 0)
    check_readers(replace(joined, synthetic_rooms=0.5), world_size=1)
    assert read == ["train_clean", "train_noise", "train_rir", "train_rir"]
    with pytest.raises(
        UserError, match=r"only-rooms has nothing for --data.mode dynamic, which reads train_c"
    ):
        training_mode(replace(joined, **changes))
    read.clear()
    check_readers(replace(joined, train=str(tmp_path / "en"), **changes), world_size=1)
    assert read == ["train_clean", "train_noise"]


def test_globs_and_braces_over_s3(shards, tmp_path, monkeypatch):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    for name, value in (
        ("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port())),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="many")
        for file in shards.rglob("*.*"):
            client.upload_file(str(file), "many", f"shards/{file.relative_to(shards)}")
        client.put_object(Bucket="many", Key="shards/dns-notes.txt", Body=b"a file is no corpus")
        s3fs.S3FileSystem.clear_instance_cache()
        local = TrainingData(sources(shards / "dns-*"), seed=0)
        for pattern in ("s3://many/shards/dns-*", "s3://many/shards/{dns-de,dns-en}"):
            far = TrainingData(sources(pattern, cache_dir=str(tmp_path)), seed=0)
            assert far.fingerprint() == local.fingerprint()
            assert all(same(far.item(0, at), local.item(0, at)) for at in range(len(local)))
        with pytest.raises(UserError, match="no folder is called so"):
            training_mode(sources("s3://many/none-*"))
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


# --- the format stays plain -------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", sorted((REPOSITORY / "shards" / "sample").rglob("*.tar")), ids=str)
def test_tar_and_plain_webdataset_read_the_sample(shard, tmp_path):
    subset = ShardSet.open(shard.parent)
    subprocess.run(["tar", "-xf", shard, "-C", tmp_path], check=True, timeout=30)
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(str(shard), shardshuffle=False)}
    assert list(read) == subset.keys
    for key, sample in read.items():
        members = {name: content for name, content in sample.items() if not name.startswith("__")}
        assert json.loads(members["json"])["key"] == key
        assert all((tmp_path / f"{key}.{name}").read_bytes() == content for name, content in members.items())
