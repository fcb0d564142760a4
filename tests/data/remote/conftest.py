"""A packed corpus behind an S3 endpoint and a web server, both of which fail as they are told."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from mvat_dist.data.shards import remote
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.remote_cache import Cache, RemoteFolder
from tests.faulty_server import Server, serving
from tests.training_corpus import write_corpus

BUCKET = "corpora"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("packed") / "shards" / "dns en")


@pytest.fixture(scope="module")
def moto():
    """(host, port) of a real S3 endpoint."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="module")
def bucket(moto, corpus):
    """Name of one with the corpus at shards/dns en."""
    client = boto3.client(
        "s3",
        endpoint_url="http://{}:{}".format(*moto),
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    client.create_bucket(Bucket=BUCKET)
    for file in corpus.rglob("*.*"):
        client.upload_file(str(file), BUCKET, f"shards/{file.relative_to(corpus.parent)}")
    return BUCKET


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short pauses, and no credentials but those of the test."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(remote, "READ_SECONDS", 2.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web(corpus):
    """A web server over the corpus's folder that can be told to fail; its `address` is the URL."""
    with serving(folder=corpus.parent) as made:
        made.address = f"{made.url}/{corpus.name}"
        yield made


@pytest.fixture
def store(moto, bucket, corpus, monkeypatch):
    """The same in front of S3."""
    with serving(upstream=moto) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        made.address = f"s3://{bucket}/shards/{corpus.name}"
        forget_connections()
        yield made
        forget_connections()


@pytest.fixture(params=["store", "web"])
def server(request):
    """One after the other."""
    return request.getfixturevalue(request.param)


def forget_connections() -> None:
    """fsspec keeps its file systems, with the endpoint and the credentials that it found first."""
    s3fs.S3FileSystem.clear_instance_cache()


def clean(server: Server, cache: Path, **limits) -> ShardSet:
    return ShardSet.open(RemoteFolder(f"{server.address}/train_clean", Cache(str(cache), **limits)))


def copies(cache: Path) -> dict[str, int]:
    """Name -> size of the shards in a cache."""
    return {path.name: path.stat().st_size for path in cache.glob("*/*.tar")}
