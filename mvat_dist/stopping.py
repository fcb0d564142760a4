"""Signals only set a flag; ranks agree on it at a step boundary, save together and leave."""

from __future__ import annotations

import signal
from types import FrameType

# SIGTERM: preemption, scancel, Ctrl-C of a launcher. SIGUSR2: submitit's and our warning of a time limit.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Remembers that somebody asked this process to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it; 0 where nobody asked."""
        return 0 if self.signal is None else 128 + self.signal

    def listen(self) -> None:
        """Take over the signals. A second one of the same kind ends the process at once."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
