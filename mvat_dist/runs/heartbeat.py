"""A sign of life in the run's folder: a small file that the training writes every few seconds.

Readers on other machines compare its counter with what they saw before; neither a file's time nor
another machine's clock tells them anything. The file is written in place, at one length, so a full
disk does not silence a living run.
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
"""Without a new beat for so long, a run on another machine counts as dead: longer than a file server
may take to show one machine's writes to another (NFS: up to a minute)."""

_LENGTH = 512


@dataclass(frozen=True)
class Beat:
    """One sign of life."""

    token: str
    """Of the lock that the training holds."""
    counter: int
    time: float
    """Seconds since 1970 on the training's machine; for people, not for decisions."""
    step: int
    """Optimiser steps done."""
    phase: str
    """What the training is at: starting, training, validating, saving, ending."""
    idle: float
    """Seconds since it last got on: a step, a validation or a save done."""
    limit: float
    """Seconds of `idle` after which the training's watchdog ends it."""


def read(folder: Path) -> Beat | None:
    """The last beat of the run in `folder`; None before the first, or where it is not readable."""
    try:
        return read_record(folder / NAME, Beat)
    except (OSError, UserError):
        return None


def write(folder: Path, beat: Beat) -> None:
    """Replace the beat, without making the folder anew where somebody removed it."""
    text = json.dumps(asdict(beat)).ljust(_LENGTH - 1) + "\n"
    descriptor = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.encode(), 0)
    finally:
        os.close(descriptor)


class Heart(threading.Thread):
    """Writes a beat every few seconds, whatever the training waits for."""

    def __init__(
        self, folder: Path, token: str, describe: Callable[[], tuple[int, str, float, float]]
    ) -> None:
        """`describe` gives step, phase, idle and limit as `Beat` has them."""
        super().__init__(name="heartbeat", daemon=True)
        self._folder = folder
        self._token = token
        self._describe = describe
        self._ended = threading.Event()

    def run(self) -> None:
        """Beat until `stop`."""
        counter, complained = 0, False
        while True:
            counter += 1
            try:
                write(self._folder, Beat(self._token, counter, time.time(), *self._describe()))
            except OSError as error:
                if not complained:
                    logger.warning("the sign of life in %s cannot be written: %s", self._folder, error)
                complained = True
            if self._ended.wait(BEAT_SECONDS):
                return

    def stop(self) -> None:
        """No more beats after this."""
        self._ended.set()
        if self.is_alive():
            self.join(2 * BEAT_SECONDS)
