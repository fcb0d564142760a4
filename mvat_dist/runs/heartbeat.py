"""The heartbeat file in the run's folder: a small file that the training rewrites every few seconds.

Readers on other machines compare its counter with the value they read before; they trust neither file
times nor another machine's clock. The file is rewritten in place at a fixed length, so that a full disk
does not stop the heartbeat of a run that is alive.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mvat_dist.errors import UserError
from mvat_dist.io import read_record

logger = logging.getLogger(__name__)

NAME = "heartbeat"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 180.0
"""A run on another machine counts as dead after this long without a new beat: longer than a file server
may take to show one machine's writes to another (NFS: up to a minute)."""

_LENGTH = 512


@dataclass(frozen=True)
class Beat:
    """The content of the heartbeat file."""

    token: str
    """Of the lock that the training holds."""
    counter: int
    time: float
    """Seconds since 1970 on the training's machine; for people, not for decisions."""
    step: int
    """Optimiser steps done."""
    phase: str
    """What the training is doing: starting, training, validating, saving, ending."""
    idle: float
    """Seconds since the training last completed a step, a validation or a save."""
    limit: float
    """Seconds of `idle` after which the training's watchdog ends it."""


def read(folder: Path) -> Beat | None:
    """The last beat of the run in `folder`; None before the first, or where it is not readable."""
    try:
        return read_record(folder / NAME, Beat)
    except (OSError, UserError):
        return None


def write(folder: Path, beat: Beat) -> None:
    """Overwrite the beat; a folder that somebody removed is not made again."""
    text = json.dumps(asdict(beat)).ljust(_LENGTH - 1) + "\n"
    descriptor = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.encode(), 0)
    finally:
        os.close(descriptor)


class Heartbeat(threading.Thread):
    """Thread that writes a beat every few seconds, even while the training is blocked."""

    def __init__(
        self, folder: Path, token: str, describe: Callable[[], tuple[int, str, float, float]]
    ) -> None:
        """`describe` returns the fields step, phase, idle and limit of `Beat`."""
        super().__init__(name="heartbeat", daemon=True)
        self._folder = folder
        self._token = token
        self._describe = describe
        self._ended = threading.Event()

    def run(self) -> None:
        """Write beats until `stop` is called."""
        counter, warned = 0, False
        while True:
            counter += 1
            try:
                write(self._folder, Beat(self._token, counter, time.time(), *self._describe()))
            except OSError as error:
                if not warned:
                    logger.warning("cannot write the heartbeat file in %s: %s", self._folder, error)
                warned = True
            if self._ended.wait(BEAT_SECONDS):
                return

    def stop(self) -> None:
        """Stop writing beats and wait for the thread to end."""
        self._ended.set()
        if self.is_alive():
            self.join(2 * BEAT_SECONDS)
