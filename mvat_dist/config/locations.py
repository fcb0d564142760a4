"""Parse the location of packed data: a folder, a URL, or a pattern over either. Nothing is opened here.

``shards/dns``, ``s3://bucket/shards/dns``, ``shards/{dns-en,dns-de}``, ``s3://bucket/shards/dns-*``. A
location is written into the run's folder, so it must hold no secret.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import braceexpand

from mvat_dist.errors import UserError

PROTOCOLS = ("s3", "gs", "http", "https")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?:/|:)|(pipe):")
_MAGIC = re.compile(r"[*?\[]")
_MOST = 1000


def is_url(location: str) -> bool:
    """Whether `location` names a protocol rather than a folder."""
    return _SCHEME.match(location) is not None


def is_glob(location: str) -> bool:
    """Whether `location` has ``*``, ``?`` or ``[``, unless a folder of that very name exists."""
    return _MAGIC.search(location) is not None and (is_url(location) or not Path(location).exists())


def expand(location: str) -> list[str]:
    """The alternatives of the braces of `location` in their order, without a trailing slash.

    Raises:
        UserError: unbalanced braces, or too many alternatives.
    """
    if not is_url(location) and Path(location).exists():
        return [location]
    try:
        alternatives = []
        for alternative in braceexpand.braceexpand(location, escape=False):
            alternatives.append(alternative.rstrip("/") or alternative)
            if len(alternatives) > _MOST:
                raise UserError(f"{_shown(location)}: more than {_MOST} alternatives")
    except ValueError as error:
        raise UserError(f"{_shown(location)}: the braces do not match") from error
    return alternatives


def check(option: str, location: str) -> None:
    """Refuse a location that cannot be packed data, or that contains a secret.

    Raises:
        UserError: an empty path, another protocol, a user name, a password or a signature in a URL, a glob
            over http.
    """
    for alternative in expand(location):
        if not alternative:
            raise UserError(
                f"{option} {location!r}: the path is empty (a variable of the shell that is not set?)"
            )
        if is_url(alternative):
            _check_url(option, alternative)


def _check_url(option: str, url: str) -> None:
    scheme = url.partition(":")[0]
    if scheme not in PROTOCOLS:
        known = ", ".join(f"{protocol}://" for protocol in PROTOCOLS)
        raise UserError(
            f"{option} {scheme}:... is not read: give a folder, or a URL with {known}; commands (pipe:) and "
            "other protocols never run"
        )
    try:
        parts = urlsplit(url.replace("[", "%5B"))
    except ValueError as error:
        raise UserError(f"{option} {_shown(url)}: not a URL ({error})") from error
    if "@" in url:  # anywhere, because a secret key may contain a slash
        raise UserError(
            f"{option} {_shown(url)}: no user or password in a URL, for it is written into the run's folder; "
            "give them by the environment or a credentials file of the provider"
        )
    if not url.startswith(f"{scheme}://") or not parts.netloc:
        place = "HOST" if "http" in scheme else "BUCKET"
        raise UserError(f"{option} {_shown(url)}: give {scheme}://{place}/...")
    if "?" in url or "#" in url:
        raise UserError(
            f"{option} {_shown(url)}: a URL must end with the path of a folder. A signed URL (?...) opens "
            "one file and is a secret, which would be written into the run's folder"
        )
    if scheme in ("http", "https") and _MAGIC.search(url):
        raise UserError(
            f"{option} {_shown(url)}: http cannot list folders, so it has no globs; name them: {{one,other}}"
        )


def _shown(location: str) -> str:
    """`location` without the parts that may be secret."""
    return re.sub(r"//.*@", "//...@", re.split(r"[?#]", location, maxsplit=1)[0])


def absolute(location: str) -> str:
    """`location` as an absolute path; a URL stays as it is."""
    if is_url(location):
        return location.rstrip("/")
    if location.startswith("{") and not Path(location).exists():
        # Its alternatives may be absolute, or URLs.
        return "{" + ",".join(map(absolute, expand(location))) + "}"
    return str(Path(location).absolute())


def name(location: str) -> str:
    """A plain file name for `location`: the name of its folder, without special characters."""
    last = location.rstrip("/") if is_url(location) else str(Path(location).resolve())
    return re.sub(r"[^\w.-]+", "-", last.rpartition("/")[2]).strip("-") or "data"


def labels(locations: Sequence[str]) -> list[str]:
    """Short labels for distinct locations: the parts of their paths that are not common to all.

    ``["a/en/dns", "a/de/dns"]`` gives ``["en", "de"]``.
    """
    paths = [location.split("/") for location in locations]
    room = min(map(len, paths)) - 1
    first = _common(paths, room)
    last = _common([path[:first:-1] for path in paths], room - first)
    return ["/".join(path[first : len(path) - last]) for path in paths]


def _common(paths: Sequence[Sequence[str]], most: int) -> int:
    """Number of leading parts, at most `most`, that all paths share."""
    count = 0
    while count < most and len({path[count] for path in paths}) == 1:
        count += 1
    return count
