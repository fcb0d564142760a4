"""Tar files of constant bytes: time stamps, owners and modes are the same for ever."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mvat_dist.io import atomic_file

TAR_BLOCK = 512
"""Bytes of a ustar header; the content follows it."""


class Place(NamedTuple):
    """Where a member's content lies in its tar, and what it sums to."""

    offset: int
    size: int
    crc32: int


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> list[Place]:
    """Write (name, content) members, consumed one at a time, as one ustar file, atomically.

    Equal members give equal bytes.
    """
    places = []
    with atomic_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            places.append(Place(tar.offset + TAR_BLOCK, len(content), zlib.crc32(content)))
            tar.addfile(_member(name, len(content)), io.BytesIO(content))
    return places


def tar_header(name: str, size: int) -> bytes:
    """The header that `write_tar` puts before a member."""
    return _member(name, size).tobuf(tarfile.USTAR_FORMAT)


def padded(size: int) -> int:
    """Bytes that a content takes in a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def tar_size(end: int) -> int:
    """Bytes of a whole tar whose last member's content ends at `end`, padding included."""
    return -(-(end + 2 * TAR_BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member
