"""What Slurm's programs say, from stand-ins that are shell text."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest

from mvat_dist.distributed import slurm
from tests.submit_place import Program, programs_in

ARRAY = (
    "JobId=8 ArrayTaskId=0 JobState=PENDING PreemptTime=None\n\n"
    "JobId=7 JobState=RUNNING Restarts=2\n   Command=/a b"
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return programs_in(tmp_path / "bin", monkeypatch)


def test_the_fields_of_a_job_are_its_own(program: Program) -> None:
    """The last job of an array has the array's number, for which Slurm shows all of them."""
    program("scontrol", f'[ "$1 $2 $3" = "show job 7" ] && printf "{ARRAY}"')
    fields = slurm.job_fields("7")
    assert (fields["JobState"], fields["Restarts"], fields["Command"]) == ("RUNNING", "2", "/a")


@pytest.mark.parametrize("script", [None, "exit 1"])
def test_without_an_answer_nothing_is_known(program: Program, script: str | None) -> None:
    if script:
        program("scontrol", script)
    assert slurm.job_fields("7") == {}
    assert not slurm.was_preempted("7")
    assert slurm.host_names("n[1-2]") == []
    assert slurm.node_address("n1") is None
    assert slurm.requeue("7") is not None


def test_a_refusal_is_told_in_slurms_words(program: Program) -> None:
    program("scontrol", 'echo "scontrol: error: Requested operation is not allowed" >&2; exit 1')
    assert slurm.requeue("7") == "Requested operation is not allowed"


@pytest.mark.parametrize(
    ("number", "preempted", "progressed", "restarts", "requeued", "warning"),
    [
        (signal.SIGUSR2, "None", True, "0", True, ""),
        (signal.SIGTERM, "2026-12-01T00:00:00", True, "0", True, ""),
        (signal.SIGTERM, "None", True, "0", False, ""),  # scancel
        (signal.SIGINT, "2026-12-01T00:00:00", True, "0", False, ""),
        (signal.SIGUSR2, "None", False, "0", False, "job 7 is not requeued: it made no step"),
        (signal.SIGUSR2, "None", True, "2", False, "job 7 is not requeued: 2 restarts of 2"),
    ],
)
def test_a_job_that_is_asked_to_make_room_comes_back(
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    preempted: str,
    progressed: bool,
    restarts: str,
    requeued: bool,
    warning: str,
) -> None:
    program("scontrol", f'echo "$@" >> "{tmp_path}/asked"; echo "JobId=7 PreemptTime={preempted}"')
    for name, value in {"JOB_ID": "7", "RESTART_COUNT": restarts}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv(slurm.MAX_RESTARTS, "2")
    with caplog.at_level(logging.WARNING):
        slurm.requeue_after_signal(number, progressed=progressed)
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert ("requeue 7" in asked) is requeued
    assert warning in caplog.text
    assert bool(caplog.text) is bool(warning)


def test_a_signal_reaches_the_steps_of_a_job_by_its_name(program: Program, tmp_path: Path) -> None:
    program("scancel", f'echo "$@" > "{tmp_path}/asked"')
    slurm.signal_steps("7", signal.SIGUSR2)
    assert (tmp_path / "asked").read_text() == "--signal=USR2 7\n"


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        ("RUNNING\\tNone\\tmine", "", slurm.JobState("RUNNING", "None")),
        # Numbers start again on a cluster that is set up anew.
        ("RUNNING\\tNone\\tother", "", slurm.JobState("UNKNOWN")),
        ("", "FAILED|2:0|mine\n", slurm.JobState("FAILED", exit_code=2)),
        ("", "CANCELLED by 0|0:15|mine\n", slurm.JobState("CANCELLED", exit_code=143)),
        ("COMPLETED\\tNone\\tmine", "", slurm.JobState("COMPLETED", "None")),
    ],
)
def test_the_state_of_a_job_is_that_of_its_name(
    program: Program, squeue: str, sacct: str, state: slurm.JobState
) -> None:
    program("squeue", f"printf '{squeue}'")
    program("sacct", f"printf '{sacct}'")
    assert slurm.job_state("7", "mine") == state
