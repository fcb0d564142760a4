"""How the commands read their options and print their help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from jsonargparse import DefaultHelpFormatter

from mvat_dist.errors import UserError


class ConfigHelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the example's line breaks kept."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose help keeps its example's lines and whose refusals are one line."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("type", Path, path)

    def error(self, message: str) -> NoReturn:
        """A user's mistake is one line, without the usage."""
        raise UserError(f"{message} ({self.prog} --help)")


def path(text: str) -> Path:
    """Converter behind ``type=Path``: refuses an empty text, which pathlib takes for the current folder."""
    return Path(place(text))


def place(text: str) -> str:
    """A path or a URL as an option's type.

    Raises:
        argparse.ArgumentTypeError: it is empty, or, from a file, no text.
    """
    if not isinstance(text, str):
        raise argparse.ArgumentTypeError(f"{text!r} is no path: put it in quotes")
    if not text:
        raise argparse.ArgumentTypeError("the path is empty (a variable of the shell that is not set?)")
    return text
