"""A process that hangs is ended and says where it hung; one that was only suspended goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from mvat_dist.errors import EXIT_HUNG

# Makes a step for every line that it gets.
WATCHED = """
import sys
from pathlib import Path
from mvat_dist.training.fault_tolerance import Watchdog

def wait_for_ever():
    return sys.stdin.readline()

def before_abort(reason):
    print("aborts:", reason, flush=True)

watchdog = Watchdog(float(sys.argv[1]), Path(sys.argv[2]), before_abort)
watchdog.start()
for step in range(3):
    watchdog.progress("training", step)
    print(step, flush=True)
    wait_for_ever()
watchdog.stop()
"""


def watched(limit: float, stacks: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WATCHED, str(limit), str(stacks)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_hang_is_ended_and_explained(tmp_path: Path) -> None:
    stacks = tmp_path / "logs" / "stacks-rank-0.txt"
    with watched(1, stacks) as process:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout
        output = process.stdout.read()
        assert process.wait(60) == EXIT_HUNG
        assert process.stderr
        assert process.stderr.read().startswith("error: hung: no step")
    assert "aborts: no step, validation or save was completed for 1 s while training after step 1" in output
    assert "in wait_for_ever" in stacks.read_text()


def test_a_suspended_process_is_not_hung(tmp_path: Path) -> None:
    limit = 4.0
    with watched(limit, tmp_path / "stacks.txt") as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * limit)  # the thing itself: so long it is suspended
        process.send_signal(signal.SIGCONT)
        process.communicate("\n\n\n", timeout=60)
        assert process.returncode == 0
    assert not (tmp_path / "stacks.txt").exists()
