"""W&B's service on this machine, and what it has left on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)

END_SECONDS = 5
"""For the service to end before it is killed; what was logged is on disk."""
_BLOCK, _HEADER = 32768, 7
_WHOLE, _LAST = 1, 4


def segments(folder: Path, run_id: str, but_for: Path) -> list[Path]:
    """The logs that earlier starts of a run have left on disk, the newest first."""
    found = folder.glob(f"wandb/*run-*/run-{run_id}.wandb")
    earlier = [file for file in found if file.parent.resolve() != but_for.resolve()]
    return sorted(earlier, key=lambda file: file.parent.name.partition("run-")[2], reverse=True)


def newest_values(logs: Sequence[Path], keys: Collection[str]) -> dict[str, Any]:
    """The last value of each of `keys` in the newest log that has any, also where its writer was killed."""
    return next((found for log in logs if (found := _last_values(log, keys))), {})


def _last_values(log: Path, keys: Collection[str]) -> dict[str, Any]:
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found: dict[str, Any] = {}
    try:
        for message in _messages(log.read_bytes()):
            for item in Record.FromString(message).history.item:
                key = item.key or "/".join(item.nested_key)
                if key in keys:
                    found[key] = json.loads(item.value_json)
    except DecodeError:  # cut short by a kill
        pass
    return found


def _messages(content: bytes) -> Iterator[bytes]:
    """The messages in a log: LevelDB's format (doc/log_format.md there), behind 7 bytes of W&B's own."""
    message, place = b"", _HEADER
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # the rest of a block that could not hold a header
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        message += content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in {_WHOLE, _LAST}:
            yield message
            message = b""


def end_service(*, kill: bool = False) -> None:
    """End W&B's service, if it still lives.

    With open runs, `kill` it: else threads of the SDK still ask it, and fail on the terminal.
    """
    if kill:
        kill_service()

    def teardown() -> None:
        try:
            import wandb

            wandb.teardown()
        except (Exception, SystemExit) as error:  # it exits with the service's code where that is not 0
            logger.debug("W&B's service did not end well: %r", error)

    at_once([teardown], END_SECONDS)
    kill_service()


def contents(own: Path) -> dict[Path, Path | None]:
    """What is in W&B's folder of a run; of links, such as ``latest-run``, where they lead."""
    entries = own.iterdir() if own.is_dir() else ()
    return {entry: entry.readlink() if entry.is_symlink() else None for entry in entries}


def restore(own: Path, before: Mapping[Path, Path | None]) -> None:
    """Remove what has come into W&B's folder since it had these `contents`, and lead its links back."""
    for entry, target in contents(own).items():
        if target:
            entry.unlink()
        elif entry not in before:
            shutil.rmtree(entry, ignore_errors=True)
    for entry, target in before.items():
        if target:
            entry.symlink_to(target)
    if not before:
        shutil.rmtree(own, ignore_errors=True)


def kill_service() -> None:
    """What was logged is on disk: that it hangs is no reason to wait."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if child.name() == "wandb-core":
                child.kill()


def at_once(actions: Sequence[Callable[[], None]], seconds: float) -> bool:
    """Run all `actions` at once; whether they have ended within `seconds`, for no longer is waited."""
    deadline = time.monotonic() + seconds
    threads = [threading.Thread(target=action, daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
