"""Write to a temporary name, flush to disk, rename: a reader sees the whole file or none of it."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mvat_dist.errors import UserError, machine_refusal

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

TEMPORARY_SUFFIX = ".tmp"
_LOCK = ".lock"
"""In a folder of a file system that locks only files."""
_LONGEST_NAME = 240
"""Bytes: file systems take 255, and a directory that is replaced has a few more."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE_BYTES = 1 << 20


def fsync(path: Path) -> None:
    """Flush one file, or the entries of one directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # Host and process keep writers apart, on a shared file system too; a crash leaves a name that no
    # reader takes for real.
    name = f".{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY_SUFFIX}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}{TEMPORARY_SUFFIX}"
    return path.with_name(name)


@contextmanager
def _naming_a_full_disk(path: Path, temporary: Path) -> Iterator[None]:
    """Raise a write that failed for lack of space as an `OSError` that says so and names `path`.

    Python's own writes do not name the file, and libraries hide the cause: safetensors reports it in
    the text of its own exception, numpy and libsndfile do not report it at all.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = _no_space(error, temporary)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def _no_space(error: Exception, temporary: Path) -> int | None:
    """The code in `_NO_SPACE` that explains `error`, or None."""
    if isinstance(error, OSError) and error.errno is not None:
        code: int | None = error.errno
    elif match := re.search(r"\(os error (\d+)\)", str(error)):
        code = int(match[1])
    else:
        code = _refusal_to_grow(temporary)
    return code if code in _NO_SPACE else None


def _refusal_to_grow(temporary: Path) -> int | None:
    """The code with which the disk refuses more of what was being written; None where it takes it."""
    grown = temporary
    if temporary.is_dir():
        files = [entry for entry in temporary.rglob("*") if entry.is_file()]
        # A limit of the file size stops the largest; a full disk stops any.
        grown = max(files, key=lambda file: file.stat().st_size, default=temporary / "probe")
    try:
        with grown.open("ab") as stream:
            stream.write(bytes(_PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as refusal:
        return refusal.errno
    return None


def make_folder(path: Path) -> None:
    """Make `path` and what is missing above it.

    Raises:
        UserError: the place cannot hold a folder: a file is in the way, or the file system has none.
        OSError: a full, read-only or forbidden disk.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if machine_refusal(error):
            raise
        raise UserError(f"cannot make the folder {path} ({error.strerror}): choose another place") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure it is removed.

    Raises:
        OSError: also where a library's write failed for lack of space with an exception of its own.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        with _naming_a_full_disk(path, temporary):
            yield temporary
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; on success it replaces `path` whole, on failure it is removed.

    Raises:
        OSError: also where a library's write failed for lack of space with an exception of its own.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    replaced = temporary.with_suffix(f".old{TEMPORARY_SUFFIX}")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    make_folder(temporary)
    try:
        with _naming_a_full_disk(path, temporary):
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                fsync(entry)
            if path.exists():
                # Removing takes long, and a kill meanwhile would leave neither; renaming is brief.
                path.replace(replaced)
            temporary.replace(path)
            fsync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_directory(folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty directory in `folder` under a temporary name made of `name`; it is removed at the end.

    Those of the same name that killed processes of this host left are removed first.
    """
    for left, target in list(abandoned(folder)):
        if target == name:
            shutil.rmtree(left, ignore_errors=True)
    scratch = _temporary(folder / name)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def only_writer(path: Path, doing: str, *, wait: bool = False) -> Iterator[None]:
    """Keep a second writer out; the lock ends with the process, however that ends.

    Args:
        path: a folder or a file that is there, to hold the lock.
        doing: what the first process is doing, for the message to a second one.
        wait: wait for the first process, which needs only a moment, instead of refusing.

    Raises:
        UserError: another process has the lock.
    """
    with ExitStack() as held:
        try:
            _lock(path, held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process is {doing}: wait for it or end it") from None
        yield


def _lock(path: Path, held: ExitStack, how: int) -> None:
    """Lock a file or a folder until `held` is left, where the file system has locks."""
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError as error:
        # NFS gives an exclusive lock to writers alone, and nobody can open a folder to write.
        if folder and error.errno == errno.EBADF:
            (path / _LOCK).touch()
            _lock(path / _LOCK, held, how)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed writers left below `folder` under temporary names; the caller is its only writer."""
    left = [path for path in folder.rglob(f".*{TEMPORARY_SUFFIX}") if not path.is_symlink()]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return left


def remove_temporary(path: Path) -> None:
    """Remove what this process has half written of `path`."""
    _temporary(path).unlink(missing_ok=True)


def abandoned(folder: Path) -> Iterator[tuple[Path, str]]:
    """Temporary files in `folder` of processes of this host that are no more, each with its target's name.

    Left out are a name too long to hold host and process, and one whose process's number is taken again.
    """
    ours = re.compile(rf"\.(.+)\.{re.escape(socket.gethostname())}\.(\d+){re.escape(TEMPORARY_SUFFIX)}")
    for entry in folder.iterdir():
        if (match := ours.fullmatch(entry.name)) and not _runs(int(match[2])):
            yield entry, match[1]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_record(path: Path, record: type[T]) -> T:
    """Read a JSON file into its record: a dataclass, or a container of dataclasses.

    A record with a field ``format``, whose default is the format's version, is read from files of that
    version only. Keys that the record does not have are passed over.

    Raises:
        UserError: the file is of another format, or not JSON, or a value is missing or of another type; the
            message names the file and the key.
        OSError: the file is not there or cannot be read.
    """
    return parse_record(path.read_bytes(), record, path)


def parse_record(text: str | bytes, record: type[T], source: object) -> T:
    """Read a record from JSON text; `source` says in error messages where the text comes from.

    Raises:
        UserError: as `read_record`.
    """
    from pydantic import ValidationError

    _check_format(text, record, source)
    try:
        value: T = _adapter(record).validate_json(text, strict=True)  # type: ignore[arg-type]
        return value
    except ValidationError as error:
        problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    where = f"{key}: " if key else ""
    raise UserError(f"{source} is damaged ({where}{problem['msg']}): copy it again or remove it")


def _check_format(text: str | bytes, record: type[Any], source: object) -> None:
    """Refuse a file of another format version than the default of the record's field ``format``."""
    fields = dataclasses.fields(record) if dataclasses.is_dataclass(record) else ()
    version = next((field.default for field in fields if field.name == "format"), None)
    if version is None:
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return
    stored = content.get("format") if isinstance(content, dict) else None
    if stored != version:
        raise UserError(
            f"{source} has the format {stored!r}, but this version of mvat_dist reads {version!r}: "
            "make the file again, or use the version that wrote it"
        )


def write_record(path: Path, record: Any) -> None:
    """Write a record, which is a dataclass, atomically as indented JSON."""
    write_json(path, dataclasses.asdict(record))


@functools.cache
def _adapter(record: Any) -> TypeAdapter[Any]:
    """The reader of a record; building one takes milliseconds, and so does importing pydantic."""
    from pydantic import TypeAdapter

    return TypeAdapter(record)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def existing_folder(path: Path) -> Path:
    """The nearest folder at or above `path` that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_space(folder: Path, needed: float, what: str, choice: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where it will be written; it need not exist yet.
        needed: bytes.
        what: in words, as the subject of the refusal.
        choice: what the user can choose instead.

    Raises:
        UserError: with the space needed and the space there.
    """
    place = existing_folder(folder)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{what} needs about {needed / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free: "
            f"free space or {choice}"
        )
