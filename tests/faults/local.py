"""Faults that need no Slurm: each disturbs a run at a moment and has it end as the undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mvat_dist.runs.folder import RunDir
from tests.faults.group import SAVE_EVERY, STEPS, Bench, assert_same, checkpoints
from tests.faults.matrix import Moment, Outcome, cannot, fault
from tests.waiting import until
from tests.wandb_server import listening

BEFORE, MIDDLE, LAST = Moment.BEFORE, Moment.MIDDLE, Moment.LAST


def goes_on(bench: Bench, run: RunDir, outcome: Outcome) -> Outcome:
    """The same command again: it has to finish the run as the undisturbed one."""
    began = time.monotonic()
    said = bench.start(run).ended(0)
    outcome.figures["seconds to finish after the restart"] = time.monotonic() - began
    assert_same(run, bench.undisturbed)
    outcome.said = said
    return outcome


def nothing_is_lost(run: RunDir, moment: Moment) -> None:
    """The newest checkpoint before the moment is there, or one after it."""
    saved = [step for step in range(SAVE_EVERY, STEPS, SAVE_EVERY) if step <= moment.step]
    assert not saved or checkpoints(run)[-1] >= saved[-1], (checkpoints(run), saved)


def _killed(bench: Bench, run: RunDir, moment: Moment, rank: int) -> Outcome:
    training = bench.start(run)
    training.hold_after(moment.step)
    began = time.monotonic()
    os.kill(training.ranks()[rank], signal.SIGKILL)
    training.release()
    said = training.ended(1, 128 + signal.SIGKILL)
    outcome = Outcome("same end", {"seconds to notice a dead rank": time.monotonic() - began})
    assert "SIGKILL" in run.read_status()["reason"] or "rank" in said, said
    nothing_is_lost(run, moment)
    return goes_on(bench, run, outcome)


@fault("kill -9 of rank 0", ci=[BEFORE])
def kill_rank_0(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    return _killed(bench, run, moment, 0)


@fault("kill -9 of another rank", ci=[LAST])
def kill_rank_1(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    return _killed(bench, run, moment, 1)


@fault("SIGTERM to the job", ci=[MIDDLE])
def sigterm(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    training = bench.start(run)
    training.hold_after(moment.step)
    training.process.terminate()
    training.release()
    if moment is LAST:  # nothing to stop: it is through
        training.ended(0)
        assert_same(run, bench.undisturbed)
        return Outcome("finished all the same")
    training.ended(128 + signal.SIGTERM)
    status = run.read_status()
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert moment.step <= status["step"] <= moment.step + 2
    assert checkpoints(run)[-1] == status["step"]
    figures = {"seconds from signal to saved state": status["signal"]["seconds_to_saved"]}
    return goes_on(bench, run, Outcome("same end", figures))


@fault("killed during a save", ci=[MIDDLE])
def kill_in_save(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    training = bench.start(run)
    # The first save, one behind another, and that of the last step.
    step = {BEFORE: SAVE_EVERY, MIDDLE: 2 * SAVE_EVERY, LAST: STEPS}[moment]
    training.hold_in_save(step)
    training.kill()
    assert checkpoints(run) == list(range(SAVE_EVERY, step, SAVE_EVERY))[-2:]
    return goes_on(bench, run, Outcome("same end"))


def _damaged(bench: Bench, run: RunDir, moment: Moment, *, torn: bool) -> Outcome:
    training = bench.start(run)
    training.hold_after(moment.step if moment is not BEFORE else SAVE_EVERY + 1)
    training.kill()
    before = checkpoints(run)
    newest = run.checkpoints / f"step-{before[-1]:08d}"
    file = newest / "mini.optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if torn else content)
    if moment is BEFORE:  # it was the only one
        said = bench.start(run).ended(2)
        assert "every checkpoint is damaged" in said
        assert newest.exists()
        shutil.move(newest, bench.folder / f"{run.path.name} damaged")  # as the message says
        return goes_on(bench, run, Outcome("the only one: refused by name; moved away, same end"))
    outcome = goes_on(bench, run, Outcome("named, the one before used, same end"))
    assert f"{newest} is damaged" in outcome.said
    return outcome


@fault("torn latest checkpoint", ci=[BEFORE])
def torn(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    return _damaged(bench, run, moment, torn=True)


@fault("flipped bit in the latest checkpoint", ci=[LAST])
def flipped(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    return _damaged(bench, run, moment, torn=False)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder]).returncode:
        cannot("this user may not mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@fault("disk full", ci=[BEFORE])
def disk_full(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    disk = run.path.with_name(f"{run.path.name} disk")
    with _small_disk(disk):
        run = RunDir(disk / run.path.name)
        training = bench.start(run)
        training.hold_after(moment.step)
        with (disk / "filler").open("wb") as filler:
            filler.write(bytes(shutil.disk_usage(disk).free - 100_000))  # STATUS fits, a checkpoint does not
        training.release()
        said = training.ended(2)
        assert f"the disk is full at {run.path}" in said
        status = run.read_status()
        assert (status["state"], "the disk is full" in status["reason"]) == ("failed", True)
        nothing_is_lost(run, moment)
        assert (run.logs / "rank-1.log").exists()
        (disk / "filler").unlink()
        return goes_on(bench, run, Outcome("stopped and explained; with space again, same end"))


@fault("W&B server gone", ci=[BEFORE])
def wandb_gone(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40}
    began = time.monotonic()
    if moment is BEFORE:  # the discard port: refused at once
        said = bench.start(run, variables={**online, "WANDB_BASE_URL": "http://127.0.0.1:9"}).ended(0)
        assert "W&B cannot be used" in said
        assert len(list(run.path.glob("wandb/offline-run-*"))) == 2
        words = "from the start: offline, same end"
    else:
        with listening() as server:
            training = bench.start(run, variables={**online, "WANDB_BASE_URL": server.url})
            training.hold_after(moment.step)
            until(lambda: len(list(run.path.glob("wandb/run-*"))) == 2, 60)  # online
        training.release()
        training.ended(0)
        words = "trained on, waited at most a minute at the end, same end"
    assert_same(run, bench.undisturbed)
    return Outcome(words, {"seconds of the whole run": time.monotonic() - began})


@fault("shard unreadable in mid-epoch", ci=[MIDDLE])
def shard_unreadable(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    own = replace(bench, folder=run.path.with_name(f"{run.path.name} data"))
    own.undisturbed = bench.undisturbed
    shards = sorted(own.corpus.glob("train_clean/*.tar"))
    contents = {shard: shard.read_bytes() for shard in shards}
    training = own.start(run)
    training.hold_after(moment.step)
    for shard, content in contents.items():
        shard.write_bytes(content[:512])  # in place: also for who has it open
    training.release()
    said = training.ended(*((0, 2) if moment is LAST else (2,)))
    if training.process.returncode == 0:
        assert_same(run, own.undisturbed)
        return Outcome("the last batch was read already: finished all the same")
    assert "train_clean" in said, said[-3000:]
    assert (run.logs / "rank-1.log").exists()
    nothing_is_lost(run, moment)
    again = own.start(run).ended(2)
    assert "train_clean" in again, again[-3000:]
    for shard, content in contents.items():
        shard.write_bytes(content)
    return goes_on(own, run, Outcome("stopped, the shard named; with the shard again, same end"))


@fault("checkpoints and STATUS deleted under the run")
def deleted(bench: Bench, run: RunDir, moment: Moment) -> Outcome:
    training = bench.start(run)
    training.hold_after(moment.step)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    run.status.unlink()
    training.release()
    training.ended(0)
    assert_same(run, bench.undisturbed)
    return Outcome("written again, same end")
