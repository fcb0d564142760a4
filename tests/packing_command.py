"""Run `mvat_dist.pack`, and read what it has written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mvat_dist import pack
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.errors import exit_code
from tests.dns_corpus import write


def write_pair(folder: Path, number: int, clean: np.ndarray, noisy: np.ndarray) -> None:
    write(folder / "clean" / f"clean_fileid_{number}.wav", clean)
    write(folder / "noisy" / f"book_reader_{number:05d}_door_snr5_tl-20_fileid_{number}.wav", noisy)


def run(*argv: str | Path, workers: int = 1) -> int:
    return exit_code(pack.main, [*map(str, argv), "--workers", str(workers)])


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return found


def left_out(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {row["path"]: row["reason"] for row in rows}


def metas(out: Path, subset: str) -> list[dict[str, Any]]:
    opened = ShardSet.open(out / subset)
    return [opened.meta(index) for index in range(len(opened))]


def source_paths(out: Path, subset: str) -> set[str]:
    return {one["path"] for meta in metas(out, subset) for one in meta["source"].values()}


def digests(out: Path) -> dict[str, str]:
    files = sorted([*out.rglob("*.tar"), *out.rglob("*.npy")])
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
