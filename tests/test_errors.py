"""How commands end where it is nobody's mistake."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mvat_dist.errors import exit_code

SAYS = """
import sys
from mvat_dist.errors import exit_code

def main(argv):
    for number in range({lines}):
        print("line", number)

sys.exit(exit_code(main))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])  # noticed when it ends, and while it prints
def test_nobody_reads_to_the_end(lines: int, unbuffered: str) -> None:
    """As after `| head -1`: no traceback, and the exit code of a program that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        ended = subprocess.run(
            [sys.executable, "-c", SAYS.format(lines=lines)],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_a_defect() -> None:
    def main(_: list[str] | None) -> None:
        raise BrokenPipeError("of a scoring process")

    with pytest.raises(BrokenPipeError):
        exit_code(main)
