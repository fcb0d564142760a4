"""Fetch single files from s3://, gs:// and http:// through fsspec: tried again, checked, in bounded time.

fsspec and its back ends are imported where they are first needed: a login node and a run on local shards
pay nothing for them. Each back end's own retries are switched off as far as it allows, so that tries do
not multiply.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mvat_dist.data.shards.format import ShardError
from mvat_dist.errors import UserError
from mvat_dist.io import sha256 as sha256_of

Result = TypeVar("Result")

TRIES = 6
"""For a shard in the middle of a run; with the pauses between them about 12 s if each fails at once."""
TRIES_AT_START = 3
"""For a manifest, where somebody waits for the answer."""
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
"""Longest silence of a connection."""
ATTEMPT_SECONDS = 30.0
SLOWEST = 200_000
"""Bytes a second: a try that takes longer than its size at this rate and `ATTEMPT_SECONDS` is broken off."""
FIRST_PAUSE = 0.5
"""Seconds before the second try; doubles, up to `LONGEST_PAUSE`, and is shortened by chance by up to half."""
LONGEST_PAUSE = 8.0

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_jitter = random.SystemRandom()
"""Not the generator that a run seeds."""


class RemoteError(UserError):
    """A URL that cannot be read now. Not a `ShardError`: nobody knows whether the data there is damaged."""


class NotThereError(ShardError):
    """There is no such file at the URL."""


class _Problem(NamedTuple):
    """Why one try failed."""

    text: str
    final: bool
    """Whether another try would end in the same way."""
    kind: type[UserError] = RemoteError


class _WrongContentError(Exception):
    """What was fetched is not what the manifest promises."""


def download(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    most: int | None = None,
    sha256: str | None = None,
    tries: int | None = None,
) -> None:
    """Fetch `url` into the file `path`, and check it.

    Args:
        url: of one file.
        path: written anew by every try.
        size: bytes that it must have; None where nothing promises that.
        most: bytes after which it is broken off where `size` is None; None for any number.
        sha256: that it must have; None where nothing promises that.
        tries: most tries, with growing pauses between them; None for `TRIES`.

    Raises:
        NotThereError: nothing there.
        ShardError: it came to its end every time, and never with the right content.
        RemoteError: anything else: no network, no permission, no credentials, no room on the disk, a
            server that fails or is too slow; also a missing package.
        OSError: `path` cannot be made.
    """
    filesystem = _filesystem(url)
    seconds = ATTEMPT_SECONDS + (size or 0) / SLOWEST
    path.touch()  # a place that cannot be written is no trouble of the network

    def once() -> None:
        _bounded(filesystem, "_get_file", url, str(path), callback=_Watch(size, most), seconds=seconds)
        _check(path, size, sha256)

    _persist(url, once, tries or TRIES, path)


def glob(pattern: str) -> list[str]:
    """URLs of the folders that match `pattern`, sorted.

    Raises:
        RemoteError: as for `download`.
    """
    filesystem = _filesystem(pattern)

    def once() -> dict[str, Any]:
        found: dict[str, Any] = _bounded(filesystem, "_glob", pattern, detail=True, seconds=ATTEMPT_SECONDS)
        return found

    found = _persist(pattern, once, TRIES_AT_START)
    scheme = pattern.partition("://")[0]
    folders = [name for name, about in found.items() if about["type"] == "directory"]
    return sorted(f"{scheme}://{name.rstrip('/')}" for name in folders)


def _persist(url: str, once: Callable[[], Result], tries: int, path: Path | None = None) -> Result:
    """The result of `once`, which is called again after a passing trouble."""
    begun = time.monotonic()
    for attempt in range(1, tries + 1):
        try:
            return once()
        except Exception as error:  # each back end has its own, and aiohttp's and botocore's shine through
            problem = _diagnose(error, path)
        if problem.final:
            break
        if attempt < tries:
            time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.0))
    often = f" ({attempt} tries in {time.monotonic() - begun:.0f} s)" if attempt > 1 else ""
    raise problem.kind(f"{url}: {problem.text}{often}")


def _filesystem(url: str) -> Any:
    scheme = url.partition("://")[0]
    package = _PACKAGES[scheme]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise RemoteError(
            f"{url}: reading {scheme}:// needs the package {package}: install it with "
            "`pip install -c constraints.txt -e '.[remote]'`"
        ) from error
    import fsspec

    for name in ("botocore", "aiobotocore"):  # which tell how they sign requests
        logging.getLogger(name).setLevel(logging.WARNING)
    filesystem: Any = fsspec.filesystem(scheme, **_options(scheme))
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem


def _options(scheme: str) -> dict[str, Any]:
    """Time limits in each back end's own words."""
    if scheme == "s3":
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        config = {**limits, "retries": {"max_attempts": 0}}
        # Parts of one shard side by side would cost memory; several readers fetch at once anyway.
        return {"config_kwargs": config, "max_concurrency": 1, "use_listings_cache": False}
    if scheme == "gs":
        return {"requests_timeout": READ_SECONDS, "use_listings_cache": False}
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, connect=CONNECT_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
    )
    # trust_env: the proxy of http_proxy and the password of ~/.netrc, as curl has them.
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "use_listings_cache": False}


def _bounded(filesystem: Any, method: str, *arguments: Any, seconds: float, **options: Any) -> Any:
    """Call a coroutine of an fsspec back end in fsspec's own thread, and cancel it after `seconds`.

    The back ends' time limits are for one request; what they do around it (finding credentials, trying
    again) may take any time.
    """
    from fsspec.asyn import sync

    async def call() -> Any:
        return await asyncio.wait_for(getattr(filesystem, method)(*arguments, **options), seconds)

    return sync(filesystem.loop, call)


class _Watch:
    """fsspec callback that aborts a download with more bytes than it may have."""

    def __init__(self, size: int | None, most: int | None) -> None:
        self._most = most if size is None else size
        self._more = f"{most} bytes" if size is None else f"the {size} bytes that the manifest says"
        self._there = 0

    def set_size(self, size: int | None) -> None:
        """Ignore the size that the server reports; only received bytes count."""

    def relative_update(self, inc: int = 1) -> None:
        """Count `inc` more bytes received.

        Raises:
            _WrongContentError: more bytes than the file may have.
        """
        self._there += inc
        if self._most is not None and self._there > self._most:
            raise _WrongContentError(f"it has more than {self._more}")


def _check(path: Path, size: int | None, sha256: str | None) -> None:
    there = path.stat().st_size
    if size is not None and there != size:
        raise _WrongContentError(f"it has {there} bytes, the manifest says {size}")
    if sha256 is not None and sha256_of(path) != sha256:
        raise _WrongContentError("its SHA-256 is not the manifest's")


def _diagnose(error: BaseException, path: Path | None) -> _Problem:
    """What to tell the user of a failed try, from the error and from what caused it."""
    chain = list(_causes(error))
    names = " ".join(type(cause).__name__ for cause in chain)
    status = next(filter(None, map(_status, chain)), None)
    if isinstance(error, _WrongContentError):
        return _Problem(f"{error}: copy it there again", final=False, kind=ShardError)
    if "Checksum" in names:  # the provider's own, over what it sent
        return _Problem(f"damaged there or on the way ({_words(error)})", final=False, kind=ShardError)
    if isinstance(error, OSError) and error.errno in _FULL:
        return _Problem(
            f"no room for it at {path} ({error.strerror}): free space, or choose another --data.cache_dir",
            final=True,
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return _Problem("there is no such file (404)", final=True, kind=NotThereError)
    if re.search("Credential|ProfileNotFound|SSOToken|TokenRetrieval", names):
        return _Problem(f"no usable credentials ({_words(error)}): {_CREDENTIALS}", final=True)
    if isinstance(error, PermissionError) or status in (401, 403):
        return _Problem(f"access denied ({status or 403}): {_CREDENTIALS}", final=True)
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return _Problem(f"the server refuses ({status}): {_words(error)}", final=True)
    if status is not None:
        return _Problem(f"the server fails ({status}): {_words(error)}", final=False)
    if re.search("Timeout", names):
        return _Problem(f"timed out ({_words(error)})", final=False)
    return _Problem(f"no answer ({_words(error)}): is the network up, and the address right?", final=False)


_CREDENTIALS = "set them as for the provider's own tool; for a public S3 bucket set FSSPEC_S3_ANON=true"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, the latest first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status in an exception of aiohttp, gcsfs or botocore."""
    response = getattr(error, "response", None)
    botocore = (
        response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    )
    # By the type's name, because aiohttp gives a truncated body the code 400.
    code = getattr(error, "code", None) if type(error).__name__ == "HttpError" else None
    for value in (botocore, getattr(error, "status", None), code):
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _words(error: BaseException) -> str:
    """The error in one short line, without the queries of URLs: a library may quote a URL that it signed."""
    line = re.sub(r"\s+", " ", re.sub(r"\?\S+", "?...", str(error))).strip()
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
