"""List the commands, or run one: ``python -m mvat_dist [COMMAND ...]``, ``mvat-dist [COMMAND ...]``."""

from __future__ import annotations

import ast
import os
import sys
from importlib.metadata import version
from pathlib import Path

from mvat_dist.errors import UserError, exit_code, nearest

COMMANDS = (
    "train", "submit", "pack", "cache", "evaluate", "report", "enhance", "export", "experiment", "quickstart",
    "sweep", "trial", "status", "sync",
)  # fmt: skip
"""Every command, in the order of the list; each is a module of this name with a ``main(argv)``."""


def summary(command: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    source = (Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: list[str] | None = None) -> None:
    """List the commands, or become one of them: a command that exists replaces this process.

    Raises:
        UserError: an unknown command.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: mvat-dist COMMAND [OPTIONS]   (the same as: python -m mvat_dist.COMMAND [OPTIONS])\n")
        print("\n".join(f"  {command:<11} {summary(command)}" for command in COMMANDS))
        print("\nmvat-dist COMMAND --help shows a command's options and an example.")
    elif arguments[0] == "--version":
        print(f"mvat_dist {version('mvat_dist')}")
    elif arguments[0] not in COMMANDS:
        raise UserError(f"no command {arguments[0]!r}; did you mean {nearest(arguments[0], COMMANDS)}?")
    else:
        # A new process image, so that the command sees what `python -m mvat_dist.COMMAND` sees.
        os.execv(sys.executable, [sys.executable, "-m", f"mvat_dist.{arguments[0]}", *arguments[1:]])


def console() -> int:
    """The console script ``mvat-dist``."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(console())
