"""Packed folders at URLs, read through a folder of local copies that all processes of a node share.

A shard is fetched whole when it is first read. It gets its name in the cache once it is complete and
has the manifest's checksum, so whatever lies there under that name is right, also after a kill. Copies
lie in a folder named by the hash of their manifest: what is packed anew at the same URL is other data.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from mvat_dist.data.shards import remote
from mvat_dist.errors import UserError, machine_refusal
from mvat_dist.io import TEMPORARY_SUFFIX, atomic_file, make_folder

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64_000_000
"""Bytes; one of 100,000 shards has half of it."""
DEFAULT_GB = 200.0
LOCK_SECONDS = 3600.0
"""Longest wait for another process's fetch; its own time limits end it long before, unless it is stopped."""
STALE_SECONDS = 86_400.0
"""Age at which an unfinished file is what a killed process left."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Cache:
    """Where copies lie and how much room they get.

    What is open is never removed, so the files that are being read and fetched may pass the limit.
    """

    folder: str = ""
    """Empty: ``$XDG_CACHE_HOME/mvat_dist``, by default ``~/.cache/mvat_dist``."""
    limit_gb: float = DEFAULT_GB

    @property
    def path(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.folder).absolute() if self.folder else Path(home) / "mvat_dist"

    def make_room(self, size: int) -> None:
        """Remove the copies opened the longest time ago until `size` more bytes fit, both below the limit
        and on the disk, or all that is left is open."""
        with _locked(self.path / ".lock"):
            files = []
            for path in self.path.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):  # a temporary that became a copy
                    about = path.stat()
                    files.append((about.st_mtime, about.st_size, path))
            excess = sum(length for _, length, _ in files) + size - self.limit_gb * 1e9
            excess = max(excess, size - shutil.disk_usage(self.path).free)
            stale = time.time() - STALE_SECONDS
            for used, length, path in sorted(files):
                if excess <= 0:
                    return
                torn = path.suffix == TEMPORARY_SUFFIX and used < stale
                if (torn or path.suffix in (".tar", ".npy")) and _removed(path):
                    excess -= length


@dataclass(frozen=True)
class RemoteFolder:
    """A packed corpus or subset, or a teacher cache, at a URL. Picklable."""

    url: str
    cache: Cache
    manifest: bytes = field(default=b"", repr=False)
    """Its manifest, once that was read: it stays the one of this object and of its pickles."""
    manifest_name: str = MANIFEST

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.url}/{name}", self.cache)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemoteFolder:
        return RemoteFolder(self.url.rpartition("/")[0], self.cache)

    @property
    def mirror(self) -> Path:
        """Where the copies of a `pinned` folder lie."""
        return self.cache.path / hashlib.sha256(self.manifest).hexdigest()[:32]

    def pinned(self) -> RemoteFolder:
        """This folder with its manifest read. Nothing is written into the cache.

        Raises:
            NotThereError: it has no manifest.
            RemoteError: as for `remote.download`.
        """
        if self.manifest:
            return self
        with tempfile.TemporaryDirectory() as temporary:
            fetched = Path(temporary, self.manifest_name)
            url = f"{self.url}/{self.manifest_name}"
            remote.download(url, fetched, most=LARGEST_MANIFEST, tries=remote.TRIES_AT_START)
            return replace(self, manifest=fetched.read_bytes())

    def open(self, name: str, size: int | None, digest: str, most: int | None = None) -> io.FileIO:
        """One file of a `pinned` folder, from its copy; fetched by the first of the processes that ask.

        Args:
            name: plain name of the file.
            size: in bytes, as far as the manifest says it.
            digest: its SHA-256 by the manifest.
            most: bytes after which fetching it is broken off, where its size is not known.

        Raises:
            ShardError: not there, or damaged at its source.
            RemoteError: it cannot be fetched now, or the cache's place cannot hold it.
        """
        path = self.mirror / name
        with self._writing():
            make_folder(self.mirror)
            stream = _opened(path, size)
            if stream is None:
                with _locked(path.with_name(f".{name}.lock")):
                    stream = _opened(path, size) or self._fetched(path, size, digest, most)
        return stream

    def _fetched(self, path: Path, size: int | None, digest: str, most: int | None) -> io.FileIO:
        # Under the lock, so what another fetch left behind was left by a killed one.
        for torn in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            torn.unlink(missing_ok=True)
        self.cache.make_room(size or 0)
        with atomic_file(path) as temporary:
            remote.download(f"{self.url}/{path.name}", temporary, size=size, most=most, sha256=digest)
            stream = _opened(temporary, size)
        if stream is None:
            raise UserError(f"{path} went while it was fetched: does something else clean that folder?")
        self.cache.make_room(0)
        return stream

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say that it is the cache's place that is full, read-only or without locks."""
        try:
            yield
        except OSError as error:
            unlockable = error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
            if not unlockable and machine_refusal(error) is None:
                raise
            raise UserError(
                f"the cache {self.cache.path} cannot hold copies ({error.strerror}): choose a local disk "
                "with room, --data.cache_dir"
            ) from error


def _opened(path: Path, size: int | None) -> io.FileIO | None:
    """The copy, marked as being read and as just used; None where there is none."""
    try:
        stream = io.FileIO(path)
    except FileNotFoundError:
        return None
    try:
        # A shared lock on the copy itself, which filelock does not have, says that it is being read.
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # about to be removed
        stream.close()
        return None
    if size is not None and os.fstat(stream.fileno()).st_size != size:
        stream.close()
        return None
    os.utime(stream.fileno())
    return stream


def _removed(path: Path) -> bool:
    """Remove a copy, unless it is being read; whether it is gone."""
    try:
        with path.open("r+b") as stream:  # NFS gives an exclusive lock to writers alone
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep out the other processes that ask for this file; a dead holder's lock ends with it."""
    make_folder(path.parent)
    lock = FileLock(path, timeout=LOCK_SECONDS, poll_interval=_POLL_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        waited = f"{path} has been locked for {LOCK_SECONDS:.0f} s"
        raise UserError(f"{waited}: end the process that holds it") from None
    try:
        yield
    finally:
        lock.release()
