"""One writer per run: a lock with an owner in the run's folder, held by whatever trains or starts it.

The lock is the newest of the numbered files in ``RUN/lock``. Each names its owner, or says that the
lock is free; who wants it adds the next number with `os.link`, which exactly one of many can do, on a
shared file system too. Numbers never go back, so whoever looked at an old state loses. No flock (not
reliable over NFS, and forgotten with the process), no file times, no clocks of other machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mvat_dist.distributed import slurm
from mvat_dist.errors import UserError
from mvat_dist.io import fsync, make_folder, parse_record
from mvat_dist.runs import heartbeat, records

FOLDER = "lock"
INHERITED = "MVAT_LOCK"
"""Environment variable: the token with which a launcher lets its training have the launcher's lock."""

Purpose = Literal["start", "train"]

_POLL_SECONDS = 0.2
_ATTEMPTS = 20


@dataclass(frozen=True)
class Owner:
    """Who holds the lock."""

    token: str
    """Drawn by chance; a launcher hands it to its training."""
    purpose: Purpose
    """`start`: a submission, over in a moment; `train`: a training."""
    host: str
    boot: str
    """The machine's boot and the process-id namespace: where both agree, `pid` can be looked up."""
    pid: int
    born: str
    """Start time of the process in clock ticks: another process may have the number later."""
    job: str
    """Number of the Slurm job; empty outside of jobs."""
    restart: int
    """How often Slurm had restarted the job."""
    since: str

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


def myself(token: str, purpose: Purpose) -> Owner:
    """This process as an owner."""
    return Owner(
        token=token,
        purpose=purpose,
        host=socket.gethostname(),
        boot=_boot(),
        pid=os.getpid(),
        born=_born(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        since=records.now(),
    )


def _boot() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"


def _born(pid: int) -> str:
    """Start time of a process, empty where there is none or only its remains are left."""
    try:
        fields_after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields_after_name[0] in {"Z", "X"} else fields_after_name[19]


def why_gone(owner: Owner) -> str | None:
    """How it is known at once that `owner` is no more; None where it lives or nobody here can tell."""
    if owner.boot == _boot():
        return None if _born(owner.pid) == owner.born else f"process {owner.pid} on {owner.host} is gone"
    if not owner.job:
        return None
    if owner.job == os.environ.get("SLURM_JOB_ID"):
        restarted = owner.restart < int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return f"job {owner.job} was restarted" if restarted else None
    with contextlib.suppress(UserError):
        rows = slurm.queued(owner.job, seconds=10)
        if not any(row.state in slurm.ACTIVE - slurm.WAITING for row in rows):
            return f"job {owner.job} no longer runs"
    return None


def lives_here(owner: Owner) -> bool:
    """Whether `owner` is a living process of this machine."""
    return owner.boot == _boot() and _born(owner.pid) == owner.born


def silent(folder: Path, seconds: float) -> bool:
    """Watch the heartbeat of the run in `folder` for up to `seconds`; whether it stood still all the time."""
    before, deadline = heartbeat.read(folder), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if heartbeat.read(folder) != before:
            return False
    return True


def holder(folder: Path) -> Owner | None:
    """Who holds the lock of the run in `folder`, alive or not; None where it is free."""
    return _newest(folder / FOLDER)[1]


def _numbers(folder: Path) -> list[int]:
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(int(file.name) for file in found if file.name.isdecimal())


def _newest(folder: Path) -> tuple[int, Owner | None]:
    """The newest number (0 before the first) and its owner.

    Raises:
        UserError: the file names an owner in a form that this version does not know: the lock may be held.
    """
    for _ in range(_ATTEMPTS):
        number = max(_numbers(folder), default=0)
        if number == 0:
            return 0, None
        try:
            text = (folder / f"{number:08d}").read_bytes()
        except FileNotFoundError:  # the next one has come
            continue
        return number, _owner(text, folder / f"{number:08d}")
    raise UserError(f"{folder} changes faster than it can be read: is another run being started there?")


def _owner(text: bytes, file: Path) -> Owner | None:
    """The owner that a lock's file names; None where it is free, or torn by a power cut, as zeros are."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return None if content == {} else parse_record(text, Owner, file)


class RunLock:
    """The lock of one run's folder, for one process."""

    def __init__(self, run: Path, purpose: Purpose) -> None:
        self.run = run
        self.token = os.environ.get(INHERITED) or secrets.token_hex(8)
        self._purpose: Purpose = purpose
        self._folder = run / FOLDER
        self._number = 0
        self._made: list[Path] = []

    def acquire(self, *, patience: float = 0.0, silence: float = heartbeat.SILENT_SECONDS) -> Owner | None:
        """Take the lock; None on success, else its living owner.

        Args:
            patience: seconds to wait for another process that is only starting the run.
            silence: seconds without a heartbeat after which an owner that cannot be asked counts as dead.
        """
        self._made = [path for path in (self.run, *self.run.parents) if not path.exists()]
        deadline = time.monotonic() + patience
        while True:
            make_folder(self._folder)  # who gives up a new run removes it
            number, owner = _newest(self._folder)
            if owner and owner.token != self.token and not why_gone(owner):
                if owner.purpose == "start" and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                    continue
                if lives_here(owner) or not silent(self.run, silence):
                    self._tidy()
                    return owner
            with contextlib.suppress(FileNotFoundError):
                if self._take(number + 1):
                    return None

    def _take(self, number: int, *, free: bool = False) -> bool:
        """Whether this process has added `number`; all lower ones go then."""
        content = {} if free else asdict(myself(self.token, self._purpose))
        temporary = self._folder / f".{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        fsync(temporary)
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self._folder / f"{number:08d}")
            # An answer that got lost on the way makes link fail although it was done: count the names.
            mine = temporary.stat().st_nlink == 2
        finally:
            temporary.unlink(missing_ok=True)
        if not mine:
            return False
        if max(_numbers(self._folder)) != number:  # we looked at an old state, and lost
            (self._folder / f"{number:08d}").unlink(missing_ok=True)
            return False
        for old in _numbers(self._folder):
            if old < number:
                (self._folder / f"{old:08d}").unlink(missing_ok=True)
        self._number = number
        return True

    def held(self) -> bool:
        """Whether this process still holds the lock: its file is there, and none that came after."""
        return bool(self._number) and max(_numbers(self._folder), default=0) == self._number

    def release(self) -> None:
        """Let the next one have it. A launcher does this for its dead training too, which has its token.

        Folders made by `acquire` in which nothing has come to lie are removed.
        """
        if not self._folder.is_dir():
            return
        number, owner = _newest(self._folder)
        if owner and owner.token == self.token:
            self._take(number + 1, free=True)
        self._number = 0
        self._tidy()

    def _tidy(self) -> None:
        """Remove the folders that were made for nothing."""
        if (
            self.run not in self._made
            or holder(self.run)
            or any(path.name not in {FOLDER, heartbeat.NAME} for path in self.run.iterdir())
        ):
            return
        with contextlib.suppress(OSError):
            for number in _numbers(self._folder):
                (self._folder / f"{number:08d}").unlink()
            self._folder.rmdir()
            (self.run / heartbeat.NAME).unlink(missing_ok=True)
            for path in self._made:
                path.rmdir()
