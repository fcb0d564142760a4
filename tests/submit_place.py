"""Where submitting is tried: a folder with a corpus, and programs that are shell text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_corpus import write_pairs, write_sources

Program = Callable[[str, str], None]


def write_place(folder: Path) -> Path:
    """A working directory with a small corpus, whose name has spaces and a quote."""
    place = folder / "it's my place"
    place.mkdir()
    noise = np.random.default_rng(0).standard_normal(8000) * 0.1
    write_sources(place / "corpus", "train_clean", {f"c{i}": noise for i in range(16)}, shards=16)
    write_sources(place / "corpus", "train_noise", {"n0": noise})
    write_pairs(place / "corpus", "valid", {"v0": (noise, noise)})
    return place


def programs_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Installs programs written as shell text; only these, sh and cat are on the path."""
    folder.mkdir()
    for name in ("sh", "cat"):
        (folder / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("SLURM_CONF", raising=False)

    def install(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return install
