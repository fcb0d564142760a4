"""List the commands, or run one: ``python -m mvat_dist [COMMAND ...]``, ``mvat-dist [COMMAND ...]``."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from mvat_dist.errors import EXIT_USER_ERROR, nearest

COMMANDS = (
    "train", "submit", "pack", "cache", "evaluate", "report", "enhance", "export", "experiment", "quickstart",
    "sweep", "trial", "status", "sync",
)  # fmt: skip
"""Every command, in the order of the list; each is a module of this name with a ``main(argv)``."""


def summary(command: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    source = (Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """List the commands, or become one of them.

    Returns:
        0; 2 for an unknown command. A command that exists replaces this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mvat-dist COMMAND [OPTIONS]   (the same as: python -m mvat_dist.COMMAND [OPTIONS])\n")
        print("\n".join(f"  {command:<11} {summary(command)}" for command in COMMANDS))
        print("\nmvat-dist COMMAND --help shows a command's options and an example.")
        return 0
    if arguments[0] == "--version":
        print(f"mvat_dist {version('mvat_dist')}")
        return 0
    if arguments[0] not in COMMANDS:
        near = nearest(arguments[0], COMMANDS)
        print(f"error: no command {arguments[0]!r}; did you mean {near}?", file=sys.stderr)
        return EXIT_USER_ERROR
    # A new process image, so that the command sees what `python -m mvat_dist.COMMAND` sees.
    return os.execv(sys.executable, [sys.executable, "-m", f"mvat_dist.{arguments[0]}", *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main())
