"""Decoded audio, a configuration and every --help equal the stored files, on every machine.

After an intended change, renew them with ``python -m tests.test_golden``; the commit shows the difference.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import pytest

from mvat_dist.__main__ import COMMANDS
from mvat_dist.config import parser
from mvat_dist.data.shards.reader import ShardSet
from tests.conftest import REPOSITORY

GOLDEN = Path(__file__).parent / "golden"
SAMPLE = REPOSITORY / "shards" / "sample"


def decoded_audio() -> str:
    """SHA-256 of every decoded array of the packed sample, by subset, utterance and field."""
    digests: dict[str, str] = {}
    for folder in sorted(path.parent for path in SAMPLE.glob("*/manifest.json")):
        shards = ShardSet.open(str(folder))
        for index in range(len(shards)):
            for field in ("clean", "noisy") if shards.kind == "pairs" else ("audio",):
                key = f"{folder.name}/{shards.key(index)}.{field}"
                digests[key] = hashlib.sha256(shards.read(index, field).tobytes()).hexdigest()
    return json.dumps(digests, indent=1, sort_keys=True) + "\n"


def resolved_configuration() -> str:
    """The configuration that a run writes down, with this machine's folder left out."""
    config = parser.parse(
        [
            "--config",
            str(REPOSITORY / "configs" / "distil.yaml"),
            "--teacher",
            "teacher.pth",
            "--student",
            "all",
        ]
    )
    return parser.to_yaml(config).replace(str(Path.cwd()), "HERE")


def help_of(command: str) -> str:
    """What ``--help`` prints, on a terminal of 110 columns."""
    text = io.StringIO()
    program = importlib.import_module(f"mvat_dist.{command}").main
    with mock.patch.dict(os.environ, COLUMNS="110"), redirect_stdout(text), suppress(SystemExit):
        program(["--help"])
    return text.getvalue()


CONTENTS = {
    "sample_audio.json": decoded_audio,
    "config.yaml": resolved_configuration,
    **{f"help/{command}.txt": lambda command=command: help_of(command) for command in COMMANDS},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_nothing_changed_unnoticed(name: str) -> None:
    if name.startswith("help/") and sys.version_info[:2] != (3, 11):
        pytest.skip("argparse words its help differently in other versions of Python")
    assert CONTENTS[name]() == (GOLDEN / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    for name, make in CONTENTS.items():
        (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / name).write_text(make(), encoding="utf-8")
