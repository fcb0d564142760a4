"""What a user's mistake must look like: one line that says what is wrong, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mvat_dist.errors import exit_code


def assert_refused(
    main: Callable[[list[str]], None], argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says `message`, in one line, and ends with 2."""
    assert exit_code(main, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
