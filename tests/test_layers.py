"""The house: imports go down only, and the ground and the parts know nothing of what is above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "mvat_dist"

ENTRY = {
    "train", "submit", "sweep", "trial", "status", "requeue", "sync", "cluster", "sweeps",
    "pack", "synthesize", "cache", "evaluate", "report", "enhance", "export", "experiment", "quickstart",
}  # fmt: skip
RUN = {
    "trainer", "assembly", "fleet", "relief", "intake", "engine", "collectives", "devices", "teacher",
    "modelfile", "checkpoint", "caching", "cachecheck", "forecast", "tracking", "timing", "energy", "logs",
    "environment", "stopping", "guard", "watchdog", "scoring", "deploy",
}  # fmt: skip
PARTS = {"models", "losses", "data", "metrics", "summary", "schedule", "reporting", "costmodel"}
GROUND = {
    "config", "configfile", "commandline", "students", "rundir", "placement", "ranks", "errors", "files",
    "seeds", "clock", "history", "weightsfile", "lock", "heartbeat", "squeue", "runstate", "locations",
}  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate((GROUND, PARTS, RUN, ENTRY)) for room in rooms}
FOREIGN_TO_PARTS = {"deepspeed", "submitit", "wandb"}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Dotted names of every module that `file` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if room(file) != "__init__"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    here = LEVEL[room(file)]
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "mvat_dist" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= here, f"{file.name} imports {name}, which lies above it"
        if here <= LEVEL["models"]:
            assert parts[0] not in FOREIGN_TO_PARTS
        if here == 0:
            assert parts[0] != "torch"


def test_no_module_is_without_a_room() -> None:
    assert {room(file) for file in FILES} == set(LEVEL)
