"""A user's mistake becomes one clear line and exit code 2; everything else keeps its traceback."""

from __future__ import annotations

import difflib
import errno
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_USER_ERROR = 2

EXIT_BUSY = 3
"""Exit code where another process starts or trains the run: it is in good hands, but not finished, so
``submit ... && evaluate ...`` must not go on."""

EXIT_HUNG = 4
"""Exit code of a training that its watchdog ended."""

EXIT_UNREAD = 141
"""Exit code where the reader of standard output has gone: 128 + SIGPIPE, as of a program that it ends."""

EXIT_PORT = 5
"""Exit code where another program listens on the port on which the ranks should meet."""

# Conditions of the machine that the user, not a developer, has to mend, and how.
_MACHINE_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free space or choose another place"),
    errno.EFBIG: ("the file-size limit is reached", "raise `ulimit -f` or choose another file system"),
    errno.EROFS: ("the file system is read-only", "choose another place"),
    errno.EACCES: ("permission denied", "allow it or choose another place"),
    errno.EPERM: ("operation not permitted", "allow it or choose another place"),
    errno.ENAMETOOLONG: ("the name is too long", "give another one"),
    errno.ELOOP: ("links lead in a circle", "mend them or choose another place"),
}


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do.

    Args:
        message: one line.
        say: whether this process prints it; of many ranks that meet the same mistake, one does.
    """

    code = EXIT_USER_ERROR
    """Exit code of a command that ends with it."""

    def __init__(self, message: str, *, say: bool = True) -> None:
        super().__init__(message)
        self.say = say


class BusyError(UserError):
    """Another process starts or trains the run."""

    code = EXIT_BUSY


class CrashedElsewhereError(UserError):
    """Another rank met a defect or a fault of its machine: this rank ends with it, and a restart may help."""

    code = 1


class PortTakenError(UserError):
    """Another program listens where the ranks should meet; a new start takes another port."""

    code = EXIT_PORT


def nearest(name: str, known: Iterable[str]) -> str:
    """``'a', 'b'``: the known names most like `name`; all of them when they are few and none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not close:
        close = known if len(known) <= 12 else difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return ", ".join(map(repr, close))


def machine_refusal(error: OSError) -> str | None:
    """What to tell the user of a full, read-only or forbidden disk; None for any other error."""
    if error.errno not in _MACHINE_ERRORS:
        return None
    what, remedy = _MACHINE_ERRORS[error.errno]
    where = f" at {error.filename}" if error.filename else ""
    return f"{what}{where}: {remedy}"


def exit_code(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run ``main(argv)`` as a command and return the process's exit code.

    0 on success, the error's code (2, with one line on stderr) for a `UserError`, 2 for a full,
    read-only or forbidden disk, 130 for Ctrl-C, 141 where the reader of its output has gone, as after
    ``| head``. Any other exception is a defect and propagates.
    """
    try:
        main(argv)
        if sys.stdout:  # a shell's >&- leaves none
            sys.stdout.flush()
    except UserError as error:
        if error.say:
            print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return EXIT_UNREAD
        refusal = machine_refusal(error)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe without a reader; if so, redirect it to the null device."""
    if not sys.stdout:
        return False
    output, poll = sys.stdout.fileno(), select.poll()
    poll.register(output, 0)  # poll always reports errors, such as a pipe whose readers have gone
    if not poll.poll(0):
        return False
    # Python flushes it once more at exit, which would print another error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


_CLEANUP_SECONDS = 5.0
"""Time in which half-written files are removed; further signals are ignored meanwhile."""


class TerminatedError(SystemExit):
    """A signal asked the process to end; the exit code is 128 + its number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def clean_end() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end a command as Ctrl-C does: half-written files are removed.

    An ignored signal, as under ``nohup``, stays ignored. systemd sends SIGHUP right after SIGTERM, so a
    second signal does not interrupt the removal. A later one does: an exception in a finaliser is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can have handlers
        return
    last_raised = -math.inf

    def end(number: int, _: FrameType | None) -> None:
        nonlocal last_raised
        if time.monotonic() - last_raised > _CLEANUP_SECONDS:
            last_raised = time.monotonic()
            raise TerminatedError(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    heeded = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, end)
        yield
    except TerminatedError as ended:
        with suppress(OSError):  # the terminal may have hung up
            print(f"ended by {signal.Signals(ended.number).name}", file=sys.stderr)
        raise
    finally:
        for number in heeded:
            signal.signal(number, handlers[number])
