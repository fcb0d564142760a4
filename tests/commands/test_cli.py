"""What every command has in common: help with an example, and refusals of one line."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from mvat_dist.__main__ import COMMANDS
from mvat_dist.__main__ import main as list_or_run
from tests.conftest import REPOSITORY
from tests.mistakes import assert_refused


def test_every_command_is_listed() -> None:
    modules = {
        file.stem
        for file in (REPOSITORY / "mvat_dist").glob("*.py")
        if "\ndef main(" in file.read_text() and file.stem != "__main__"
    }
    assert modules == set(COMMANDS)


def test_the_list_has_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    list_or_run([])
    listed = [
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")
    ]
    assert [name for name, _ in listed] == list(COMMANDS)
    assert all(len(description) > 20 for _, description in listed)


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(list_or_run, ["evalute"], "did you mean 'evaluate'", capsys)


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    command = f"{sys.executable} -m mvat_dist | head -c 1"
    listed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY)
    assert listed.stdout == "u"
    assert listed.stderr == ""


def test_a_listed_command_is_that_command() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-m", *words, "--help"], capture_output=True, cwd=REPOSITORY, check=True
        )
        for words in (["mvat_dist", "status"], ["mvat_dist.status"])
    ]
    assert outputs[0].stdout == outputs[1].stdout != b""


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
