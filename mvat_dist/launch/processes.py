"""Start, signal and wait for processes of this machine: the one module that does.

`run_ranks` runs the ranks of a training where no cluster starts them. It does much less than torchrun, on
purpose: a user's mistake stays one line, the exit code is the trainer's, rank 0 keeps the terminal.

Everything else that runs a command and passes signals on to it is built of three pieces::

    with StopSignals() as signals:
        child = start(command, environment)
        code = wait_for(child, signals)
    if signals.received:  # somebody asked this process to stop
        ...

`run_with_descendants` is for a command that leaves processes behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from mvat_dist.data.pool import available_cores
from mvat_dist.distributed.ranks import LOCAL_LAUNCHER, Ranks, export, free_port, without_ranks
from mvat_dist.errors import EXIT_PORT

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 20.0
"""After one rank has failed, the others get this long to notice, write their records and end."""

_KILL_SECONDS = 5.0
"""What a killed process gets to end."""

_PORTS = 3
"""Ports to try: between the choice of a free one and its use another program may take it."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None)


# --------------------------------------------------------------------------------------------- signals


@dataclass(frozen=True)
class StopSignal:
    """A signal that asked this process to stop."""

    number: int
    """SIGINT, SIGTERM or SIGUSR2. SIGHUP (the terminal was closed) is reported as SIGTERM, which the trainer
    knows."""
    sender: int | None
    """Process that sent it; None in the rare case that another thread of this process took it."""


class StopSignals:
    """Queue the signals that ask this process to stop, for as long as the ``with`` block runs.

    They are blocked and read one by one, so none arrives at a bad moment or before there is a child to pass
    it on to, and the sender is known. Children of `start` hear signals as usual. What nobody has read when
    the block ends is added to `received` and has no other effect. Only for the main thread.
    """

    def __init__(self) -> None:
        self.received: list[StopSignal] = []
        """All signals so far, in order."""
        self._unread: list[StopSignal] = []

    def __enter__(self) -> StopSignals:
        # What nohup has made this process ignore stays ignored.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._numbers = set(_STOP_SIGNALS) - ignored
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        # A thread that a library has started does not block them, and may be chosen to receive one.
        self._handlers = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        while self.wait(0.0):
            pass
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def wait(self, seconds: float) -> StopSignal | None:
        """The next signal that has not been read, or None after `seconds` without one."""
        if not self._unread and (info := signal.sigtimedwait(self._numbers, seconds)):
            self._add(info.si_signo, info.si_pid)
        return self._unread.pop(0) if self._unread else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._add(number, None)

    def _add(self, number: int, sender: int | None) -> None:
        received = StopSignal(signal.SIGTERM if number == signal.SIGHUP else number, sender)
        self.received.append(received)
        self._unread.append(received)


# -------------------------------------------------------------------------------------------- children


@dataclass(frozen=True)
class Child:
    """A process that `start` has started."""

    process: subprocess.Popen[bytes]
    log: Path | None
    """File that gets its output; None for this process's own output."""

    def exit_code(self) -> int | None:
        """Exit code as a shell says it, 128 + s for a process ended by signal s; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Send the signal `number`; without effect once the process has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def tell(self, line: str) -> None:
        """Write a short line to the standard input of a child of `start_in_background`, if it still runs."""
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def kill(self) -> None:
        """End it and all that it has started, unless it ended well.

        Only for a child with a session of its own. Once it has failed, only what is left of its process
        group is ended: descendants with sessions of their own can no longer be found.
        """
        code = self.exit_code()
        if code == 0:
            return
        descendants: list[psutil.Process] = []  # those with sessions of their own too
        if code is None:  # else its number may be another process's by now
            with contextlib.suppress(psutil.NoSuchProcess):
                descendants = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        # In the kernel's hands (state D), on a dead network disk for example, it may stay for hours.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_KILL_SECONDS)


def start(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    log: Path | None = None,
    own_session: bool = True,
    on_parent_death: int = signal.SIGKILL,
) -> Child:
    """Start a command as a child of this process.

    Args:
        command: program and arguments.
        environment: all of its variables; None for those of this process.
        log: file to append its output to, after a line with time and command; its input is then empty. None:
            it has this process's input and output.
        own_session: whether it leads a session of its own: Ctrl-C in this terminal then reaches this process
            alone, which passes it on once, and `Child.kill` ends all that the child has started.
        on_parent_death: signal that the kernel sends to the child when this process ends in whatever way; 0
            for none.
    """
    parent = os.getpid()

    def prepare() -> None:
        # Before the program is loaded no handler of this process may run in the child.
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        _LIBC.prctl(_PR_SET_PDEATHSIG, on_parent_death)
        if on_parent_death and os.getppid() != parent:  # it ended before prctl was called
            os.kill(os.getpid(), on_parent_death)

    with _opened(log, command) as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL if output else None,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=own_session,
            preexec_fn=prepare,
        )
    return Child(process, log)


def start_in_background(command: Sequence[str], log: Path) -> Child:
    """Start a command that serves this process: `Child.tell` writes to its standard input.

    Its standard output is this process's standard error; its own standard error goes to `log`. It has a
    session of its own and has to end by itself when its standard input ends. No Python runs between fork and
    exec: this process may be a training, with threads, a GPU and a network in use.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=2, stderr=errors, start_new_session=True
        )
    return Child(process, log)


@contextlib.contextmanager
def _opened(log: Path | None, command: Sequence[str]) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
        output.flush()
        yield output


def _send(child: Child, received: StopSignal) -> None:
    child.send(received.number)


def wait_for(child: Child, signals: StopSignals, pass_on: Callable[[Child, StopSignal], None] = _send) -> int:
    """Wait for a child to end and return its exit code, as `Child.exit_code` says it.

    Args:
        child: from `start`, within the block of `signals`.
        signals: those not read yet are handed to `pass_on`.
        pass_on: what to do with each; by default the child gets it too.
    """
    while (code := child.exit_code()) is None:
        if received := signals.wait(_POLL_SECONDS):
            pass_on(child, received)
    return code


def run_with_descendants(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command; wait until it and all that it has left behind have ended; return its exit code.

    Signals that ask to stop are ignored here and not passed on: this is for the shell of a job, where Slurm
    signals the command and its descendants itself. The command may die of the signal while a training that
    it has started still saves, and the job must not end before.
    """
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with StopSignals() as signals:
        child = start(command, environment, own_session=False, on_parent_death=0)
        code = wait_for(child, signals, pass_on=lambda *_: None)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
    return code


# ----------------------------------------------------------------------------------------------- ranks


def run_ranks(command: Sequence[str], processes: int, logs: Path) -> int:
    """Run `command` as ranks 0 to `processes` - 1 and return the exit code of the first that fails.

    Rank 0 has this terminal; rank N > 0 appends to ``logs/rank-N.log``. Signals that ask to stop are passed
    on to every rank, once each time. Where the ranks' port is taken, all start again with another. No rank
    outlives this process.

    Args:
        command: program and arguments, the same for all.
        processes: number of ranks.
        logs: folder, made where it is missing.
    """
    with StopSignals() as signals:
        for attempt in range(1, _PORTS + 1):
            code = _run_once(command, processes, logs, signals)
            if code != EXIT_PORT or attempt == _PORTS or signals.received:
                break
            print("another program was faster to take the port of the ranks: starting again", file=sys.stderr)
    if code == EXIT_PORT and signals.received:  # not started again, because somebody asked to stop
        return 128 + signals.received[0].number
    return code


def _run_once(command: Sequence[str], processes: int, logs: Path, signals: StopSignals) -> int:
    port = free_port()
    members: list[Child] = []
    try:
        for rank in range(processes):
            variables = rank_environment(rank, processes, port, os.environ)
            log = logs / f"rank-{rank}.log" if rank else None
            members.append(start(command, variables, log=log))
        return _wait_for_all(members, signals)
    finally:
        for member in members:
            member.kill()


def _wait_for_all(members: Sequence[Child], signals: StopSignals) -> int:
    """Wait until all ranks have ended well or as asked, or one has failed and the rest had time to end."""
    deadline = math.inf
    failed: int | None = None
    while running := [member for member in members if member.exit_code() is None]:
        if failed is None and (failed := _failed(members, signals)) is not None:
            grace = 0.0 if members[failed].exit_code() == EXIT_PORT else _GRACE_SECONDS
            deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            break
        if received := signals.wait(_POLL_SECONDS):
            for member in running:
                member.send(received.number)
    if failed is None:
        failed = _failed(members, signals)
    if failed is None:
        return max(member.exit_code() or 0 for member in members)
    code = members[failed].exit_code() or 0
    if code != EXIT_PORT:
        _explain(members, failed)
    return code


def _failed(members: Sequence[Child], signals: StopSignals) -> int | None:
    """The first rank that has ended otherwise than well or by a signal that was passed on."""
    expected = {None, 0, *(128 + received.number for received in signals.received)}
    return next((rank for rank, member in enumerate(members) if member.exit_code() not in expected), None)


def _explain(members: Sequence[Child], rank: int) -> None:
    """Print which rank failed first and why, unless rank 0 has said it in this terminal."""
    code, log = members[rank].process.returncode, members[rank].log
    if code > 0 and members[0].process.returncode == code:
        return
    how = f"failed with exit code {code}" if code > 0 else f"was ended: {signal.strsignal(-code)}"
    if code == -signal.SIGKILL:
        how += " (out of memory?)"
    print(f"rank {rank} {how}", file=sys.stderr)
    if log:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"the end of {log}:", *lines[-15:], sep="\n", file=sys.stderr)


# ------------------------------------------------------------------------------------------ environment


def rank_environment(rank: int, processes: int, port: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables of one local process: its rank, and its part of the cores unless OMP_NUM_THREADS is set."""
    variables = without_ranks(inherited)
    if processes == 1:
        return variables
    # One machine, whatever number of nodes was asked for: the local rank is the number of a GPU here.
    export(Ranks(rank, processes, rank, processes, 0, 1, "127.0.0.1", port, "local"), variables)
    variables[LOCAL_LAUNCHER] = "1"
    variables.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    return variables
