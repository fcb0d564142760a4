"""What `mvat_dist.status` says about a run folder, and what a job's script makes of a failed training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mvat_dist import status
from mvat_dist.errors import EXIT_HUNG, UserError
from mvat_dist.launch import requeue
from mvat_dist.runs import heartbeat, lock
from mvat_dist.runs import status as runstate
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.heartbeat import Beat
from mvat_dist.runs.lock import RunLock
from mvat_dist.runs.records import JobRecord
from mvat_dist.runs.status import RunState

STUDENT = {"updates": 9, "skipped": 1, "skipped_in_a_row": 0, "given_up": True, "validated": 8, "best": 1.25}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 100 steps whose second start, in this process, has done 10 steps and saved after 8."""
    folder = RunDir(tmp_path / "my runs" / "one")
    folder.path.mkdir(parents=True)
    RunState(folder, 100, 0).write("stopped", 4, reason="SIGUSR2")
    state = RunState(folder, 100, 4)
    state.saved(8)
    state.write("running", 10, students={"tiny": STUDENT})
    return folder


@pytest.fixture
def owner(run: RunDir) -> RunLock:
    taken = RunLock(run.path, "train")
    assert taken.acquire() is None
    return taken


def beat(run: RunDir, owner: RunLock, idle: float = 0.0, age: float = 0.0) -> None:
    heartbeat.write(run.path, Beat(owner.token, 1, time.time() - age, 12, "validating", idle, 60.0))


def test_a_living_run_is_shown_with_its_past(
    run: RunDir, owner: RunLock, capsys: pytest.CaptureFixture[str]
) -> None:
    beat(run, owner)
    status.main([str(run.path)])
    said = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in said.split("\n\n")[0].splitlines())
    assert lines["state"] == "running"
    assert lines["step"] == "12 of 100 (12 %)"  # the heartbeat knows more than STATUS
    assert lines["saved"].startswith("step 8, ")
    assert lines["restarts"] == "1"
    assert "steps 0 to 4: SIGUSR2" in said
    assert f"process {os.getpid()} on" in lines["by"]
    assert said.splitlines()[-1].split() == ["tiny", "9", "1", "yes", "1.250"]


def test_rate_and_time_left_follow_from_the_steps(run: RunDir, owner: RunLock) -> None:
    beat(run, owner)
    found = status.report(run)
    assert found.steps_per_second is not None
    assert found.seconds_left == pytest.approx((100 - 12) / found.steps_per_second)


def test_a_killed_run_is_lost(run: RunDir) -> None:
    code = "import sys; from pathlib import Path; from mvat_dist.runs.lock import RunLock; "
    code += "RunLock(Path(sys.argv[1]), 'train').acquire()"
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
    found = status.report(run)
    assert found.state == "lost"
    assert "is gone" in found.why


def test_a_run_without_an_owner_is_lost(run: RunDir) -> None:
    assert status.report(run).state == "lost"


def test_a_run_that_completes_nothing_hangs(run: RunDir, owner: RunLock) -> None:
    beat(run, owner, idle=61)
    found = status.report(run)
    assert (found.state, found.why) == ("hung", "validating after step 12 for 1 min")


def test_silence_of_another_machine(run: RunDir, owner: RunLock) -> None:
    (file,) = (run.path / lock.FOLDER).glob("0*")
    file.write_text(json.dumps({**json.loads(file.read_text()), "boot": "another machine", "host": "far"}))
    beat(run, owner, age=10)
    assert status.report(run).state == "running"
    beat(run, owner, age=7300)
    found = status.report(run)
    assert (found.state, found.why) == ("lost", "no sign of life from far for 2 h 1 min")


def test_all_runs_by_name_and_as_json(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    other = RunDir(run.path.with_name("other"))
    other.path.mkdir()
    other.write_status("finished", 5)
    runs = f"--runs={run.path.parent}"
    status.main([runs])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[:2] for row in rows] == [["one", "lost"], ["other", "finished"]]
    status.main([runs, "other", "--json", "--watch"])  # it has ended, so watching it ends too
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    with pytest.raises(UserError, match="did you mean 'other'"):
        status.main([runs, "othre"])
    with pytest.raises(UserError, match="no runs in"):
        status.main(["--runs", str(run.path / "nowhere")])


def test_a_job_that_waits_is_queued(run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'PENDING\\tPriority\\tmvat-one\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    record = JobRecord("slurm", "here", "2026-12-01T00:00:00Z", 1, 1, job_id="7", job_name="mvat-one")
    run.job.write_text(json.dumps(asdict(record)))
    found = status.report(run)
    assert (found.state, found.job, found.queue) == ("queued", "7", "PENDING (Priority)")


def test_torch_is_not_needed(run: RunDir) -> None:
    code = "import sys; from mvat_dist import status; from mvat_dist.launch import requeue; "
    code += "status.main(sys.argv[1:]); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True).returncode == 0


def ended(run: RunDir, begins: int, saves: int | None, reason: str = "ended by SIGKILL") -> dict[str, Any]:
    """STATUS after one more start that begins at a step, saves at another and is killed."""
    state = RunState(run, 100, begins)
    if saves is not None:
        state.saved(saves)
    state.write("running", saves or begins)
    runstate.record_end(run, reason)
    return run.read_status()


def test_mere_progress_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runstate.time, "monotonic", lambda: now[0])
    run = RunDir(tmp_path)
    state = RunState(run, 1000, 0)
    state.write("running", 0)
    seen = []
    for step in range(10, 140, 10):
        now[0] += 1.0
        state.write("running", step, at_once=False, speed=step)
        seen.append(run.read_status()["step"])
    assert seen == [0, 0, 0, 0, 50, 50, 50, 50, 50, 100, 100, 100, 100]
    state.write("stopped", 131)
    assert (run.read_status()["step"], run.read_status()["speed"]) == (131, 130)


def test_a_killed_job_comes_back_while_it_gets_on_and_a_few_times_while_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert requeue.decide(ended(run, 0, 5)) == (None, 0.0)
    assert requeue.decide(ended(run, 5, 9)) == (None, 0.0)
    waits = []
    while True:
        told, wait = requeue.decide(ended(run, 9, None))
        if told:
            break
        waits.append(wait)
    assert len(waits) == requeue.FRUITLESS
    assert waits == sorted(waits)
    assert waits[0] < waits[-1]
    assert "without a new checkpoint" in told
    assert requeue.decide(ended(run, 9, 12)) == (None, 0.0)  # somebody mended it


def test_a_job_that_fails_before_it_begins_gives_up_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requeue, "_again", lambda job, wait: f"job {job} again after {wait:g} s")
    run = RunDir(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    state = RunState(run, 100, 0)
    state.saved(5)
    state.write("running", 5)
    told = []
    for restart in range(6):
        monkeypatch.setenv(
            "SLURM_RESTART_COUNT", str(restart)
        )  # but for the first, none comes to note itself
        requeue.main(["1", f"--runs={run.path.parent}", "--name=one", "--distil.method=none"])
        told.append(capsys.readouterr().out.partition(": ")[2].strip())
    again = [f"job 7 again after {wait} s" for wait in (0, 0, 20, 60)]
    assert told[:4] == again
    assert "4 starts in a row" in told[4]
    assert run.read_status()["checkpoint"]["step"] == 5


@pytest.mark.parametrize("code", [143, 140])
def test_a_job_that_is_asked_to_stop_before_it_listens_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    """As when it is preempted while torch is imported: the trainer has said nothing to Slurm."""
    monkeypatch.setattr(requeue, "_again", lambda job, wait: f"job {job} again after {wait:g} s")
    monkeypatch.setattr(
        requeue.slurm, "requeue_after_signal", lambda *_, **__: pytest.fail("that is the trainer's matter")
    )
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    given = [str(code), f"--runs={tmp_path}", "--name=one", "--distil.method=none"]
    requeue.main(given)
    assert "job 7 again after 0 s" in capsys.readouterr().out
    run = RunDir(tmp_path / "one")
    run.path.mkdir(exist_ok=True)
    RunState(run, 100, 0).write("stopped", 5)  # it has begun, and asked for itself
    requeue.main(given)
    assert capsys.readouterr().out == ""


def test_restarts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVAT_MAX_RESTARTS", "2")
    run = RunDir(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert requeue.decide(ended(run, 0, 5))[0] is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert requeue.decide(ended(run, 5, 9))[0] == "not queued again after 2 restarts of 2"


@pytest.mark.parametrize(
    ("code", "words"), [(137, "ended by SIGKILL"), (EXIT_HUNG, "hung"), (1, "failed with exit code 1")]
)
def test_a_job_script_records_an_end_of_which_nobody_could_speak(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, words: str
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    place = [f"--runs={run.path.parent}", f"--name={run.path.name}", "--distil.method=none"]
    requeue.main(["0", *place])
    requeue.main([str(128 + 15), *place])  # asked to stop: the trainer's matter
    assert run.read_status()["state"] == "running"
    requeue.main([str(code), *place])
    found = run.read_status()
    assert found["state"] == "failed"
    assert words in found["reason"]
    assert f"exit code {code}" in capsys.readouterr().out
    with pytest.raises(UserError, match="exit code"):
        requeue.main(place)


def test_a_former_life_of_a_job_touches_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its node was given up, and the job runs on others."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked"; echo "JobState=RUNNING Restarts=1"\n'
    )
    (programs / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    place = [f"--runs={run.path.parent}", f"--name={run.path.name}", "--distil.method=none"]
    before = run.read_status()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    requeue.main(["1", *place])
    assert "started again in the meantime" in capsys.readouterr().out
    assert run.read_status() == before
    assert "requeue" not in (tmp_path / "asked").read_text()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # this life
    requeue.main(["1", *place])
    assert "requeue 7" in (tmp_path / "asked").read_text()


def test_a_late_warning_of_the_time_limit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(runstate.LEAD, "120")
    state = RunState(RunDir(tmp_path), 100, 0)
    state.took("step", 4.0)
    state.took("validation", 100.0)
    assert not caplog.records
    state.took("save", 30.0)
    (told,) = caplog.messages
    assert "120 s before the time limit" in told
    assert "134 s together" in told
    assert "--signal-delay 268" in told
    state.write("stopped", 5)
    RunState(RunDir(tmp_path), 100, 5)  # known from the first moment of the next start
    assert len(caplog.messages) == 2
