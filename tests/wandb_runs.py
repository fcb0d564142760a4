"""What W&B holds of a run, as tests compare it with the run's own record."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from tests.wandb_server import Server

WANDB = Path(sys.executable).with_name("wandb")


def records(log: Path) -> list[dict[str, Any]]:
    """Everything in a log on disk, read with W&B's own command."""
    done = subprocess.run(
        [WANDB, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True, timeout=60
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def rows_of(log: Path) -> list[dict[str, Any]]:
    """History rows in a log on disk."""
    return rows_in(records(log))


def rows_in(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """History rows among a log's records."""
    return [record["history"]["item"] for record in log if record.get("type") == "history"]


def summary_of(log: Path) -> dict[str, Any]:
    """What W&B's command says of a log as a whole: summary, config, tags, exit code."""
    command = [WANDB, "leet", "inspect", "--summary", "--json", log]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return dict(json.loads(done.stdout))


def synchronise(folder: Path, server: Server) -> None:
    """`wandb sync` of all that is offline in a run's folder, as a user does it later."""
    logs = sorted((folder / "wandb").glob("offline-run-*"))
    done = subprocess.run([WANDB, "sync", "--yes", *logs], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not server.unknown - {"OrganizationCoreWeaveOrganizationID"}


def same_rows(copy: Iterable[dict[str, Any]], history: Path, but_for: Collection[str] = ()) -> None:
    """W&B's rows are those of the record: every one once, in its order, with every value.

    Of a run that was killed, W&B keeps what it had of the steps that were made again: `but_for` what differs.
    """
    expected = [json.loads(line) for line in history.read_text().splitlines()]
    found = list(copy)
    assert [row["global_step"] for row in found] == [row["step"] for row in expected]
    for row, truth in zip(found, expected, strict=True):
        kept = {key: value for key, value in truth.items() if key not in {"step", *but_for}}
        for key, value in _flat(kept).items():
            assert row.get(key) == value, (truth["step"], key)


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found
