"""Start the process that sends a run's rows to W&B, and wait for it no longer than it is worth."""

from __future__ import annotations

import logging
import time

from mvat_dist.launch import processes
from mvat_dist.runs import uploads
from mvat_dist.runs.folder import RunDir

logger = logging.getLogger(__name__)

_STOP_SECONDS = 10
"""What W&B gets of a run that Slurm stops: it has to be queued again before Slurm kills it."""
_CLOSE_SECONDS = 5
"""What the uploader gets beside W&B's own time for the last uploads."""
_POLL_SECONDS = 0.05


class Uploader:
    """The uploader process of a run (`mvat_dist.runs.uploader`). Only `finish` waits for it."""

    def __init__(self, run: RunDir, *, to_server: bool = False) -> None:
        """Start it. A training has written its STATUS and rewound its histories by then.

        `to_server` is for a run that has ended: what the server lacks is sent, and it is never offline.
        """
        self._run, self._to_server = run, to_server
        command = [*uploads.uploader_command(run.path), *(["--to-server"] if to_server else [])]
        self._child = processes.start_in_background(command, run.logs / "wandb.log")

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._child.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._child.exit_code() is None

    def finish(self, exit_code: int) -> bool:
        """Have it send the rest and close the runs; end it after a while rather than hold an allocation.

        Args:
            exit_code: of the training.

        Returns:
            Whether W&B has everything. Where it has not, a warning says why.
        """
        self._child.tell(str(exit_code))
        seconds = self._seconds(exit_code)
        deadline = time.monotonic() + seconds
        try:
            while self.is_running and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            code, advice = self._child.exit_code(), uploads.advice(self._run.path)
            if code is None:
                logger.warning("W&B does not answer: left after %d s. %s", seconds, advice)
            elif code > 128:  # else it has said so itself
                logger.warning("the process that sends rows to W&B ended with code %d. %s", code, advice)
            return code == 0
        finally:
            self._child.kill()

    def _seconds(self, exit_code: int) -> int:
        """How long the process may take from now on."""
        if self._to_server:
            return uploads.PATIENT_SECONDS + _CLOSE_SECONDS
        stopped = exit_code in uploads.STOPPED_BY_SLURM
        return _STOP_SECONDS if stopped else uploads.UPLOAD_SECONDS + _CLOSE_SECONDS
