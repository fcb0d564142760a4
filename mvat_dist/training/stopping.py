"""Signals only set a flag; ranks agree on it at a step boundary, save together and leave.

submitit's own handler is replaced: it would call `checkpoint()` on rank 0 alone, in the middle of
whatever the rank is doing, while a save needs every rank.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from types import FrameType

# SIGTERM: preemption and scancel. SIGUSR2: Slurm's warning of the time limit. SIGINT: Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Remembers that somebody asked this process to stop, and when."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the last signal that asked; 0 where nobody did."""
        self._arrived: float | None = None

    def listen(self) -> None:
        """Take over the signals. A second Ctrl-C ends the process at once; Slurm repeats the others."""
        for number in _SIGNALS:
            signal.signal(number, self._note)
        # Python runs a handler only between two of its own instructions, so not while the main thread
        # waits in a collective. The interpreter writes to this socket at once.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), name="signals", daemon=True).start()

    def waited(self) -> float:
        """Seconds since the first signal reached this process; 0 where none has."""
        return time.monotonic() - self._arrived if self._arrived is not None else 0.0

    def _watch(self, receiver: socket.socket) -> None:
        while received := receiver.recv(1):
            if self._arrived is None and received[0] in _SIGNALS:
                self._arrived = time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
