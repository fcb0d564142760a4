"""What protects a run while it trains: one writer for its folder, a sign of life, an end to a hang."""

from __future__ import annotations

import logging

from mvat_dist import io
from mvat_dist.distributed.collectives import broadcast_object, run_on_all_ranks
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import BusyError, UserError
from mvat_dist.runs import status
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.heartbeat import Heart
from mvat_dist.runs.lock import RunLock
from mvat_dist.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 30.0
"""A job may start while its submission still holds the lock."""


class Guard:
    """Lock and heartbeat on rank 0, a watchdog on every rank."""

    def __init__(self, run: RunDir, ranks: Ranks, limit: float) -> None:
        """The watchdog, with a limit of `limit` seconds, watches from here on; :meth:`leave` ends it."""
        self._run = run
        self._rank = ranks.rank
        self._lock = RunLock(run.path, "train")
        self._watchdog = Watchdog(limit, run.logs / f"stacks-rank-{ranks.rank}.txt", self._last_words)
        self._heart: Heart | None = None
        self.progress = self._watchdog.progress
        """``progress(phase, step)``: something is done, the next thing begins."""
        self._watchdog.start()

    def enter(self) -> None:
        """Become the only writer of the run's folder, all ranks together.

        Raises:
            BusyError: another living process has it.
        """
        self.progress("starting", 0)
        owner = broadcast_object(run_on_all_ranks(lambda: self._enter() if self._rank == 0 else None))
        if owner:
            raise BusyError(
                f"{self._run.path} is being started or trained by {owner}: nothing new was started",
                say=self._rank == 0,
            )

    def _enter(self) -> str | None:
        """`enter` on rank 0; the owner where there is one."""
        if owner := self._lock.acquire(patience=_PATIENCE_SECONDS):
            return str(owner)
        for left in io.remove_leftovers(self._run.path):
            logger.info("removed %s, which a killed process had left half written", left)
        self._heart = Heart(self._run.path, self._lock.token, self._watchdog.describe)
        self._heart.start()
        return None

    def intact(self) -> bool:
        """On rank 0: whether the folder is still there and still ours."""
        return self._lock.held()

    def is_lost(self) -> bool:
        """Whether this rank has had the folder, and has it no more."""
        return self._heart is not None and not self._lock.held()

    def lost(self) -> UserError:
        """What to raise where it is not intact."""
        return UserError(
            f"{self._run.path} was removed or taken over while it was being trained: nothing more is "
            "written there",
            say=self._rank == 0,
        )

    def leave(self) -> None:
        """No more watching, no more beats; the next one may have the folder."""
        self._watchdog.stop()
        if self._heart:
            self._heart.stop()
        if self._rank:
            return  # the launcher's token, which all ranks have, would free the lock that rank 0 still needs
        try:
            self._lock.release()
        except OSError as error:
            # Full or gone. Whoever starts next finds that this process is no more.
            logger.warning("the lock of %s could not be given back: %s", self._run.path, error)

    def _last_words(self, reason: str) -> None:
        if self._rank == 0 and self._lock.held():
            status.record_end(self._run, f"hung: {reason}")
            self._lock.release()
