"""Where packed data lies: a folder, a URL, or a pattern over either. Only the words; nothing is opened here.

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
    """Whether `location` has ``*``, ``?`` or ``[``; a folder that is really called so is none."""
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
        for one in braceexpand.braceexpand(location, escape=False):
            alternatives.append(one.rstrip("/") or one)
            if len(alternatives) > _MOST:
                raise UserError(f"{_shown(location)}: more than {_MOST} alternatives")
    except ValueError as error:
        raise UserError(f"{_shown(location)}: the braces do not match") from error
    return alternatives


def check(option: str, location: str) -> None:
    """Refuse what is no location of packed data, or one that holds a secret.

    Raises:
        UserError: an empty path, another protocol, a user name, a password or a signature in a URL, a glob
            over http.
    """
    for one in expand(location):
        if not one:
            raise UserError(
                f"{option} {location!r}: the path is empty (a variable of the shell that is not set?)"
            )
        if is_url(one):
            _check_url(option, one)


def _check_url(option: str, url: str) -> None:
    scheme = url.partition(":")[0]
    if scheme not in PROTOCOLS:
        raise UserError(
            f"{option} {scheme}:... is not read: give a folder, or a URL with "
            f"{', '.join(one + '://' for one in PROTOCOLS)}; commands (pipe:) and other protocols never run"
        )
    try:
        parts = urlsplit(url.replace("[", "%5B"))
    except ValueError as error:
        raise UserError(f"{option} {_shown(url)}: not a URL ({error})") from error
    if "@" in url:  # anywhere, for a secret key may hold a slash
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
    """`location` without what may be secret in it."""
    return re.sub(r"//.*@", "//...@", re.split(r"[?#]", location, maxsplit=1)[0])


def absolute(location: str) -> str:
    """`location` as it is found from any folder; a URL as it is."""
    if is_url(location):
        return location.rstrip("/")
    if location.startswith("{") and not Path(location).exists():
        # Its alternatives may be absolute, or URLs.
        return "{" + ",".join(map(absolute, expand(location))) + "}"
    return str(Path(location).absolute())


def name(location: str) -> str:
    """A plain file name for it: that of its folder, with what no file should be called left out."""
    last = location.rstrip("/") if is_url(location) else str(Path(location).resolve())
    return re.sub(r"[^\w.-]+", "-", last.rpartition("/")[2]).strip("-") or "data"


def labels(locations: Sequence[str]) -> list[str]:
    """What tells distinct locations apart: the parts of their paths that are not common to all of them.

    ``["a/en/dns", "a/de/dns"]`` gives ``["en", "de"]``.
    """
    paths = [location.split("/") for location in locations]
    room = min(map(len, paths)) - 1
    first = _common(paths, room)
    last = _common([path[:first:-1] for path in paths], room - first)
    return ["/".join(path[first : len(path) - last]) for path in paths]


def _common(paths: Sequence[Sequence[str]], most: int) -> int:
    """How many first parts, at most `most`, all paths share."""
    count = 0
    while count < most and len({path[count] for path in paths}) == 1:
        count += 1
    return count
