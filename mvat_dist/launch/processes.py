"""Several training processes on this machine, where no cluster starts them.

Much less than torchrun, on purpose: a user's mistake stays one line, the exit code is the trainer's,
rank 0 keeps the terminal, and no process outlives this one.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from mvat_dist.distributed.ranks import LOCAL_LAUNCHER, RANK_VARIABLES, Ranks, export, free_port
from mvat_dist.errors import EXIT_PORT

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 20.0
"""After one rank has failed: the others notice, note it in their records and end, or are ended."""

_PORTS = 3
"""Ports to try: between the choice of a free one and its use another program may take it."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def environment(rank: int, processes: int, port: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables of one local process: its rank, and its share of the cores unless OMP_NUM_THREADS is set."""
    clean = without_ranks(inherited)
    if processes == 1:
        return clean
    # One machine, whatever number of nodes was asked for: the local rank is the number of a GPU here.
    ranks = Ranks(rank, processes, rank, processes, 0, 1, "127.0.0.1", port, "local")
    export(ranks, clean)
    clean[LOCAL_LAUNCHER] = "1"
    clean.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    return clean


def without_ranks(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` without what another launcher left in it."""
    launchers = ("TORCHELASTIC_", "SUBMITIT_", "GROUP_", "ROLE_", "CROSS_", "LOCAL_SIZE", LOCAL_LAUNCHER)
    return {
        name: value
        for name, value in inherited.items()
        if name not in RANK_VARIABLES and not name.startswith(launchers)
    }


def run(command: Sequence[str], processes: int, logs: Path, *, apart: bool = False) -> int:
    """Run `command` as ranks 0 to `processes` - 1 and return the exit code of the first that fails.

    With `apart` the ranks belong to several runs: where one fails, the others are left to end by themselves.

    Rank 0 has this terminal; rank N > 0 appends to ``logs/rank-N.log``. Signals that ask to stop are
    passed on to every rank, once each time. A process ended by signal s counts as exit code 128 + s. Where
    the ranks' port is taken all start again with another.
    """
    for _ in range(_PORTS - 1):
        code = _run_once(command, processes, logs, apart)
        if code != EXIT_PORT:
            return code
        print("another program was faster to take the port of the ranks: starting again", file=sys.stderr)
    return _run_once(command, processes, logs, apart)


def _run_once(command: Sequence[str], processes: int, logs: Path, apart: bool) -> int:
    group = _Group(grace=math.inf if apart else _GRACE_SECONDS)
    port = free_port()
    try:
        with group.forwarding_signals():
            for rank in range(processes):
                group.add(_start(command, rank, environment(rank, processes, port, os.environ), logs))
            return group.watch()
    finally:
        for member in group.members:
            member.end()


@dataclass
class _Member:
    """One rank, leader of its own process group: its readers and helpers end with it."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None

    def code(self) -> int | None:
        """Exit code, or None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """End it and all that it started; nothing where it ended well, as W&B may still be sending."""
        if self.code() == 0:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class _Group:
    """All ranks of a run on this machine."""

    grace: float = _GRACE_SECONDS
    """Seconds that the others have to end in, after the first has failed."""
    members: list[_Member] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    """Signals that asked this process to stop."""

    def add(self, member: _Member) -> None:
        self.members.append(member)
        for number in self.received:  # somebody lost patience before this rank had started
            member.signal(number)

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Pass signals that ask to stop on to every rank."""
        before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        del frame
        # The trainer knows SIGTERM; a closed terminal means the same.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self.received.append(number)
        for member in self.members:
            member.signal(number)

    def watch(self) -> int:
        """Wait until all have ended well or as asked, or one has failed and the rest had time to end."""
        deadline: float | None = None
        first: _Member | None = None
        while running := [member for member in self.members if member.code() is None]:
            first = first or next((member for member in self.members if self._failed(member)), None)
            if first and deadline is None:
                deadline = time.monotonic() + (0.0 if first.code() == EXIT_PORT else self.grace)
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        first = first or next((member for member in self.members if self._failed(member)), None)
        if first is None:
            return max(member.code() or 0 for member in self.members)
        if first.code() == EXIT_PORT:
            return EXIT_PORT
        self._explain(first, rank_zero_hangs=self.members[0] in running)
        return first.code() or 0

    def _failed(self, member: _Member) -> bool:
        """Whether it ended otherwise than well or by a signal that was passed on."""
        return member.code() not in {None, 0, *(128 + number for number in self.received)}

    def _explain(self, first: _Member, *, rank_zero_hangs: bool) -> None:
        """Say which rank failed first and why, unless rank 0 has said it in this terminal."""
        returned = first.process.returncode
        if not rank_zero_hangs and returned > 0 and self.members[0].process.returncode == returned:
            return
        how = (
            f"failed with exit code {returned}"
            if returned > 0
            else f"was ended: {signal.strsignal(-returned)}"
        )
        if returned == -signal.SIGKILL:
            how += " (out of memory?)"
        print(f"rank {first.rank} {how}", file=sys.stderr)
        if first.log:
            lines = first.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print(f"the end of {first.log}:", *lines[-15:], sep="\n", file=sys.stderr)


def _start(command: Sequence[str], rank: int, variables: Mapping[str, str], logs: Path) -> _Member:
    if rank == 0:
        return _Member(0, subprocess.Popen(command, env=variables, preexec_fn=_follow_parent), None)
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"rank-{rank}.log"
    with path.open("ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_follow_parent,
        )
    return _Member(rank, process, path)


def _follow_parent() -> None:
    """In the child: a session of its own, so that Ctrl-C reaches it once, through us; death with us."""
    os.setsid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
