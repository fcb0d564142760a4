"""How a run is doing: ``python -m mvat_dist.status [RUN|all]``. Reads its folder; no torch, no network.

What STATUS says is checked: a run that calls itself running but whose process is gone is `lost`, and
one that completes nothing any more is `hung`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mvat_dist.config.cli import CommandParser
from mvat_dist.distributed import slurm
from mvat_dist.errors import UserError, exit_code, nearest
from mvat_dist.io import read_record
from mvat_dist.runs import heartbeat, lock
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.heartbeat import Beat
from mvat_dist.runs.lock import Owner
from mvat_dist.runs.records import JobRecord
from mvat_dist.training.throughput import in_words

_WATCH_SECONDS = 2.0
_SQUEUE_SECONDS = 5.0
_QUIET_SECONDS = 60.0
"""A run that has completed nothing for so long is worth a word."""

ENDED = {"finished", "stopped", "failed", "lost"}


@dataclass
class Report:
    """One run as a reader sees it."""

    run: str
    state: str
    """`new`, `queued`, `starting`, `running`, `hung`, `lost`, `stopped`, `failed` or `finished`."""
    why: str = ""
    """Why it stopped, failed, is lost or hangs."""
    step: int = 0
    steps: int = 0
    steps_per_second: float | None = None
    seconds_left: float | None = None
    time_shares: dict[str, float] = field(default_factory=dict)
    """Shares of the last steps' time, by what it went to; they add up to 1."""
    checkpoint: int | None = None
    """Step of the last checkpoint."""
    checkpoint_age: float | None = None
    """Seconds, by the clocks of this machine and of the training's."""
    restarts: int = 0
    starts: list[dict[str, Any]] = field(default_factory=list)
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    owner: str = ""
    job: str = ""
    queue: str = ""
    """The job's state and reason in squeue."""
    comes_back: bool = False
    """Whether the job is in the queue: its training may have ended and be started again."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it by itself."""
        return self.state in ENDED and not self.comes_back


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = CommandParser(
        "python -m mvat_dist.status",
        "Show how a run is doing, or all runs of a folder. Exit code: 0, whatever state they are in.",
        "python -m mvat_dist.status runs/teacher --watch",
    )
    command.add_argument(
        "run", nargs="?", default="all", help="a run's folder, or its name in --runs (default: all)"
    )
    command.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    command.add_argument(
        "--watch", action="store_true", help="show it again and again until all runs have ended"
    )
    command.add_argument("--json", action="store_true", help="print JSON, one object per run and line")
    return command


def main(argv: list[str] | None = None) -> None:
    """Print the state of a run or of all.

    Raises:
        UserError: no such run.
    """
    options = parser().parse_args(argv)
    folders = _folders(options.run, options.runs)
    while True:
        reports = [report(RunDir(folder)) for folder in folders]
        text = _as_json(reports) if options.json else _as_text(reports)
        if options.watch and sys.stdout.isatty() and not options.json:
            text = f"\033[H\033[J{text}"  # home, and clear what was below
        print(text, flush=True)
        if not options.watch or all(summary.has_ended for summary in reports):
            return
        time.sleep(_WATCH_SECONDS)


def _folders(run: str, runs: Path) -> list[Path]:
    """Folders of the runs asked for.

    Raises:
        UserError: there is none.
    """
    known = sorted(path for path in runs.iterdir() if _is_run(path)) if runs.is_dir() else []
    if run == "all":
        if not known:
            raise UserError(f"no runs in {runs}: --runs names the folder in which they lie")
        return known
    for path in (Path(run), runs / run):
        if _is_run(path):
            return [path]
    like = f"; did you mean {nearest(run, [path.name for path in known])}?" if known else ""
    raise UserError(f"no run at {run} and none of that name in {runs}{like}")


def _is_run(path: Path) -> bool:
    run = RunDir(path)
    return any(file.exists() for file in (run.status, run.job, run.config)) and path.is_dir()


def report(run: RunDir) -> Report:
    """What the folder of a run, and Slurm, say about it now."""
    status, owner, beat = run.read_status(), lock.holder(run.path), heartbeat.read(run.path)
    summary = Report(run.path.name, status.get("state", "new"), status.get("reason", ""))
    summary.step, summary.steps = status.get("step", 0), status.get("steps", 0)
    summary.restarts, summary.starts = status.get("restarts", 0), status.get("starts", [])
    summary.students = status.get("students", {})
    if saved := status.get("checkpoint"):
        summary.checkpoint, summary.checkpoint_age = saved["step"], _age(saved["time"])
    _ask_slurm(run, summary)
    _check(summary, owner, beat)
    if summary.state in {"running", "hung"}:
        summary.owner = str(owner) if owner else ""
        summary.step = max(summary.step, beat.step) if beat else summary.step
        summary.steps_per_second = status.get("steps_per_second")
        summary.time_shares = status.get("time_shares", {})
        if summary.steps_per_second:
            summary.seconds_left = (summary.steps - summary.step) / summary.steps_per_second
    return summary


def _ask_slurm(run: RunDir, summary: Report) -> None:
    """Add what squeue says about the job that was submitted for the run, or in which it trained last."""
    record = read_record(run.job, JobRecord) if run.job.exists() else None
    name = None
    if record and record.cluster == "slurm":
        summary.job, name = record.job_id, record.job_name
    elif summary.starts:
        summary.job = summary.starts[-1].get("job", "")
    if not summary.job or summary.state == "finished":
        return
    try:
        rows = slurm.queued(summary.job, seconds=_SQUEUE_SECONDS)
    except UserError as error:
        summary.queue = str(error)
        return
    for row in rows:
        if name in {None, row.name}:
            summary.queue = row.state + (f" ({row.reason})" if row.reason != "None" else "")
            summary.comes_back = row.state in slurm.ACTIVE
            if row.state in slurm.WAITING:
                summary.state = "queued"


def _check(summary: Report, owner: Owner | None, beat: Beat | None) -> None:
    """Correct a state that the run's process could not correct itself."""
    gone = lock.why_gone(owner) if owner else "no process holds the run's lock"
    alive = owner is not None and gone is None
    if alive and owner and owner.purpose == "train" and summary.state not in {"running", "finished"}:
        summary.state, summary.why = "starting", ""
    if summary.state != "running":
        return
    if beat is None or (owner and beat.token != owner.token):
        beat = None
    if gone:
        summary.state, summary.why = "lost", gone
    elif beat and owner and not lock.lives_here(owner) and time.time() - beat.time > heartbeat.SILENT_SECONDS:
        silence = _duration(time.time() - beat.time)
        summary.state, summary.why = "lost", f"no sign of life from {owner.host} for {silence}"
    elif beat and beat.idle > beat.limit:
        summary.state, summary.why = "hung", f"{beat.phase} after step {beat.step} for {_duration(beat.idle)}"
    elif beat and beat.idle > _QUIET_SECONDS:
        summary.why = f"{beat.phase} after step {beat.step} for {_duration(beat.idle)}"


def _age(written: str) -> float:
    return (datetime.now(UTC) - datetime.strptime(written, "%Y-%m-%dT%H:%M:%S%z")).total_seconds()


def _as_json(reports: list[Report]) -> str:
    return "\n".join(json.dumps(asdict(summary)) for summary in reports)


def _as_text(reports: list[Report]) -> str:
    if len(reports) == 1:
        return _details(reports[0])
    rows = [
        {
            "run": summary.run,
            "state": summary.state,
            "step": f"{summary.step}/{summary.steps or '?'}",
            "left": _duration(summary.seconds_left),
            "saved": _saved(summary),
            "restarts": summary.restarts,
            "job": " ".join(filter(None, (summary.job, summary.queue))),
            "why": summary.why,
        }
        for summary in reports
    ]
    return tabulate(rows, headers="keys", disable_numparse=True)


def _details(summary: Report) -> str:
    percent = f" ({100 * summary.step / summary.steps:.0f} %)" if summary.steps else ""
    lines = {
        "run": summary.run,
        "state": summary.state + (f": {summary.why}" if summary.why else ""),
        "step": f"{summary.step} of {summary.steps or '?'}{percent}",
        "rate": f"{summary.steps_per_second:.3g} steps/s" if summary.steps_per_second else "",
        "time": in_words(summary.time_shares),
        "left": _duration(summary.seconds_left),
        "saved": _saved(summary),
        "by": summary.owner,
        "job": f"{summary.job} {summary.queue}".strip(),
        "restarts": str(summary.restarts) if summary.starts else "",
    }
    text = "\n".join(f"{name:<9}{value}" for name, value in lines.items() if value)
    for start in summary.starts:
        if "ended" in start:
            text += (
                f"\n         {start['time']} steps {start['step']} to {start['to_step']}: {start['ended']}"
            )
    if summary.students:
        rows = [
            {
                "student": name,
                "updates": known["updates"],
                "skipped": known["skipped"],
                "given up": "yes" if known["given_up"] else "no",
                "best score": "" if known["best"] is None else f"{known['best']:.3f}",
            }
            for name, known in summary.students.items()
        ]
        text += "\n\n" + tabulate(rows, headers="keys", disable_numparse=True)
    return text


def _saved(summary: Report) -> str:
    if summary.checkpoint is None:
        return "nothing yet"
    return f"step {summary.checkpoint}, {_duration(summary.checkpoint_age)} ago"


def _duration(seconds: float | None) -> str:
    """``42 s``, ``12 min``, ``3 h 5 min``, ``2 d 4 h``."""
    if seconds is None:
        return ""
    minutes, hours, days = (int(seconds // length) for length in (60, 3600, 86400))
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{max(0, round(seconds))} s"


if __name__ == "__main__":
    sys.exit(exit_code(main))
