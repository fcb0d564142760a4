"""Restart a run at random moments and compare it with the undisturbed one: ``python -m tests.faults.soak``.

A moment is drawn by chance: while the processes start, or some steps later, in the middle of a step, a
save or anything else. So is the way of ending: SIGTERM to the launcher, or SIGKILL of one rank, or of all.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mvat_dist.runs.folder import RunDir
from tests.faults.group import OPTIONS, Bench, assert_same
from tests.faults.processes import Training, rows, send, until

STEPS = 150
"""More than all restarts together can make."""

_MOST_STEPS = 4
_STARTING_SECONDS = 8.0
_ENDS = {1, 128 + signal.SIGTERM, 128 + signal.SIGKILL, -signal.SIGTERM}
"""The last one: a launcher that did not listen yet."""


def disturb(training: Training, chance: random.Random) -> str:
    """End a training at a moment and in a way drawn by chance; both in words."""
    way = chance.choice(["SIGTERM", "kill rank 0", "kill rank 1", "kill all"])
    if chance.random() < 0.25:
        when = "while starting"
        time.sleep(chance.uniform(0.0, _STARTING_SECONDS))
    else:
        steps = chance.randint(1, _MOST_STEPS)
        when = f"{steps} steps later"
        goal = rows(training.run) + steps
        until(lambda: rows(training.run) >= goal or not training.alive(), when, pause=0.005)
        time.sleep(chance.uniform(0.0, 0.5))
    if way == "SIGTERM":
        training.process.terminate()
    elif way == "kill all":
        training.kill()
        return f"{when}, {way}"
    else:
        send([training.ranks()[int(way[-1])]], signal.SIGKILL)
    training.ended(*_ENDS)
    return f"{when}, {way}"


def main() -> int:
    """Exit code 0 where the run ended as the undisturbed one."""
    given = argparse.ArgumentParser("python -m tests.faults.soak", description=__doc__)
    given.add_argument("--restarts", type=int, default=30)
    given.add_argument("--seed", type=int, default=0)
    options = given.parse_args()
    chance = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="mvat soak "))
    bench = Bench(folder, (*OPTIONS, f"--train.steps={STEPS}", "--train.save_every=2"))
    run = RunDir(folder / "my runs" / "soak")
    began, ways = time.monotonic(), Counter[str]()
    for number in range(1, options.restarts + 1):
        what = disturb(bench.start(run), chance)
        ways[what.rpartition(", ")[2]] += 1
        print(f"{number}: {what}; {rows(run)} steps recorded", flush=True)
        assert run.read_status().get("state") != "finished", "too few steps for so many restarts"
    bench.start(run).ended(0)
    disturbed = time.monotonic() - began
    assert_same(run, bench.undisturbed)
    counts = ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))
    print(
        f"{options.restarts} restarts (seed {options.seed}: {counts}) in {disturbed:.0f} s: weights and "
        f"rows of {STEPS} steps equal the undisturbed run's"
    )
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
