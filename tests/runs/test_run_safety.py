"""What happens to a run while it trains: kills, hangs, full disks, second starters; with real processes.

Whatever happened, the same command continues and ends with the weights of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mvat_dist import status
from mvat_dist.errors import EXIT_BUSY, EXIT_HUNG
from mvat_dist.runs import lock
from mvat_dist.runs import status as runstate
from mvat_dist.runs.folder import RunDir
from tests.faults.processes import children, rank_of
from tests.tiny_corpus import write_pairs, write_sources
from tests.waiting import until

STEPS = 40
OPTIONS = (
    "--sizes={tiny: {kind: small, hidden: 4, depth: 2}}",
    "--student=tiny",
    "--distil.method=none",
    "--data.reverb_probability=0",
    "--data.segment_seconds=0.25",
    "--data.workers=0",
    "--train.batch=4",
    f"--train.steps={STEPS}",
    "--train.save_every=4",
    "--train.validate_every=1000",
    "--valid.clips=1",
    "--valid.best=si_sdr",
    "--track.every=1",
)
# As `mvat_dist.submit` starts processes on this machine, but less patient with those that do not end.
SUBMIT = "import sys; from mvat_dist import errors, submit; from mvat_dist.launch import processes; "
SUBMIT += "processes._GRACE_SECONDS = 2; "
SUBMIT += "sys.exit(errors.exit_code(submit.main))"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny corpus")
    generator = np.random.default_rng(0)
    axis = np.arange(16_000) / 16_000
    tones = [0.2 * np.sin(2 * np.pi * generator.uniform(100, 300) * axis) for _ in range(9)]
    write_sources(folder, "train_clean", {f"c{i}": tone for i, tone in enumerate(tones[:8])}, shards=4)
    write_sources(folder, "train_noise", {"n0": 0.1 * generator.standard_normal(32_000)})
    write_pairs(folder, "valid", {"v0": (tones[8] + 0.03 * generator.standard_normal(16_000), tones[8])})
    return folder


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def start(corpus: Path) -> Start:
    """Starts the training of a run's folder as a user does, in one process or in more."""

    def started(run: RunDir, *more: str, processes: int = 1) -> subprocess.Popen[str]:
        many = ["-c", SUBMIT, "--cluster=local", f"--nodes={processes}"]
        module = many if processes > 1 else ["-m", "mvat_dist.train"]
        place = [f"--data.train={corpus}", f"--runs={run.path.parent}", f"--name={run.path.name}"]
        return subprocess.Popen(
            [sys.executable, *module, *OPTIONS, *place, *more],
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


def ended(process: subprocess.Popen[str], code: int) -> str:
    """What a process said on stderr; it has to end with `code`, and soon."""
    _, said = process.communicate(timeout=150)
    assert process.returncode == code, said[-3000:]
    return said


def until_saved(run: RunDir, process: subprocess.Popen[str], count: int = 1) -> None:
    """Wait until the run has `count` new checkpoints."""
    before = checkpoints(run)

    def saved() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        return len([name for name in checkpoints(run) if not before or name > before[-1]]) >= count

    until(saved, 150, pause=0.01)


def killed_in_a_save(run: RunDir, process: subprocess.Popen[str]) -> None:
    """Kill a training while the temporary folder of a checkpoint is there."""
    while True:
        assert process.poll() is None, "it was through before a save could be met"
        if list(run.checkpoints.glob(".step-*")):
            process.send_signal(signal.SIGSTOP)
            if list(run.checkpoints.glob(".step-*")):
                process.kill()
                process.communicate()
                return
            process.send_signal(signal.SIGCONT)


def checkpoints(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.glob("step-*"))


def same_end(run: RunDir, undisturbed: RunDir) -> None:
    """Weights and losses of two finished runs are equal, bit for bit."""
    assert run.read_status()["state"] == "finished"
    for which in ("last", "best"):
        weights, same = (load_file(one.weights("tiny", which)) for one in (run, undisturbed))
        assert {k: v.tobytes() for k, v in weights.items()} == {k: v.tobytes() for k, v in same.items()}
    assert losses(run) == losses(undisturbed)


def losses(run: RunDir) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in run.history("tiny").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, start: Start) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("my runs") / "undisturbed")
    ended(start(run), 0)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    return run


def test_second_starter_signal_kill_and_a_damaged_checkpoint(
    tmp_path: Path, start: Start, undisturbed: RunDir
) -> None:
    run = RunDir(tmp_path / "my runs" / "bumpy")
    first = start(run)
    until_saved(run, first)
    assert status.report(run).state == "running"
    owner = lock.holder(run.path)
    assert owner is not None
    assert owner.pid == first.pid
    first.send_signal(signal.SIGSTOP)  # lest it be through before the second one has read its options
    said = ended(start(run), EXIT_BUSY)
    first.send_signal(signal.SIGCONT)
    assert said.count("\n") == 1
    assert f"trained by process {first.pid}" in said
    first.terminate()
    ended(first, 128 + signal.SIGTERM)
    found = run.read_status()
    assert (found["state"], found["reason"], found["signal"]["name"]) == ("stopped", "SIGTERM", "SIGTERM")
    assert 0 < found["signal"]["seconds_to_saved"] < 60
    assert lock.holder(run.path) is None

    second = start(run, "--data.workers=1")
    until_saved(run, second, 2)
    killed_in_a_save(run, second)
    assert run.read_status()["state"] == "running"
    seen = status.report(run)
    assert (seen.state, seen.why) == ("lost", f"process {second.pid} on {owner.host} is gone")

    newest = run.checkpoints / checkpoints(run)[-1]
    damaged = newest / "tiny.optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    left = run.weights("tiny", "last").with_name(".model.safetensors.some-host.1.tmp")
    left.write_text("half")
    assert list(run.checkpoints.glob(".step-*"))
    said = ended(start(run), 0)
    assert f"{newest} is damaged" in said
    assert not left.exists()
    assert not list(run.checkpoints.glob(".*"))
    same_end(run, undisturbed)
    found = run.read_status()
    assert found["restarts"] == 2
    assert [one["ended"] for one in found["starts"][:-1]] == ["SIGTERM", runstate.LOST]


def test_a_file_size_limit_leaves_the_checkpoint_before(tmp_path: Path, start: Start) -> None:
    """As a full disk does, which is in the fault matrix."""
    run = RunDir(tmp_path / "small files" / "full")
    process = start(run)
    until_saved(run, process)
    process.send_signal(signal.SIGSTOP)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))  # its moments are larger
    process.send_signal(signal.SIGCONT)
    said = ended(process, 2)
    words = "the file-size limit is reached"
    assert f"error: {words} at {run.path}" in said
    found = run.read_status()
    assert found["state"] == "failed"
    assert words in found["reason"]
    assert checkpoints(run)
    assert found["checkpoint"]["step"] == int(checkpoints(run)[-1].removeprefix("step-"))


def test_removing_the_folder_ends_the_run_and_nothing_comes_back(tmp_path: Path, start: Start) -> None:
    run = RunDir(tmp_path / "removed")
    process = start(run)
    until_saved(run, process)
    # The weights are the last file of a save: between two saves the run asks whether the folder is its own.
    until(lambda: run.weights("tiny", "last").exists(), 30, pause=0.005)
    run.path.rename(tmp_path / "away")  # as one step, for the run writes meanwhile
    said = ended(process, 2)
    assert f"{run.path} was removed or taken over" in said
    assert not run.status.exists()
    assert not run.checkpoints.exists()


def test_a_hang_ends_explained_and_the_same_command_goes_on(tmp_path: Path, start: Start) -> None:
    short = "--train.steps=16"
    other = RunDir(tmp_path / "two undisturbed")
    ended(start(other, short, processes=2), 0)
    run = RunDir(tmp_path / "two")
    launcher = start(run, short, "--train.watchdog_seconds=12", "--data.workers=1", processes=2)
    until_saved(run, launcher)
    (stopped,) = [pid for pid in children(launcher.pid) if rank_of(pid) == 1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    said = ended(launcher, EXIT_HUNG)
    assert 10 < time.monotonic() - began < 60
    assert "hung: no step, validation or save was completed for 12 s" in said
    stacks = (run.logs / "stacks-rank-0.txt").read_text()
    assert "all_reduce" in stacks or "all_gather" in stacks, stacks  # where it waited for the other
    found = run.read_status()
    assert (found["state"], found["reason"][:5]) == ("failed", "hung:")
    assert lock.holder(run.path) is None
    ended(start(run, short, processes=2), 0)
    same_end(run, other)
