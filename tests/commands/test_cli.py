"""What every command has in common: help with an example, and refusals of one line."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import pytest

from tests.mistakes import assert_refused

COMMANDS = sorted(
    file.stem
    for file in (Path(__file__).parent.parent.parent / "mvat_dist").glob("*.py")
    if "\ndef main(" in file.read_text() and '__name__ == "__main__"' in file.read_text()
)


def test_there_are_commands() -> None:
    assert {"train", "submit", "evaluate", "enhance", "export", "report", "experiment"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"mvat_dist.{command}").main
    with contextlib.suppress(SystemExit):
        main(["--help"])
    example = capsys.readouterr().out.partition("example")[2]
    # A trial is started by its sweep's agent.
    assert ("wandb agent" if command == "trial" else f"python -m mvat_dist.{command}") in example


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("export", ["--model", "x", "--data", "y", "--out", ""]),
        ("report", ["", "--out", "x"]),
        ("experiment", ["grid.yaml", "--out="]),
        ("cache", ["--teacher", "x", "--data", "y", "--out", ""]),
        ("cache", ["--teacher", "x", "--data", "", "--out", "y"]),
        ("train", ["--data.train="]),
        ("train", ["--data.train={,b}"]),
        ("train", ["--data.valid={a,}"]),
        ("pack", ["dns", "--corpus", "", "--out", "x"]),
        ("pack", ["dns", "--corpus", "x", "--out="]),
        ("pack", ["verify", ""]),
        ("pack", ["stats", "x", "--out", ""]),
        ("enhance", ["--model=", "x", "--out", "y"]),
    ],
)
def test_an_empty_path_is_not_the_folder_one_is_in(
    command: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"mvat_dist.{command}").main
    assert_refused(main, argv, "the path is empty", capsys)


def test_a_number_in_a_file_is_no_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("corpus: 2024\nout: there\n")
    main = importlib.import_module("mvat_dist.pack").main
    assert_refused(main, ["dns", "--config", str(recipe)], "2024 is no path", capsys)
