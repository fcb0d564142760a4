"""Compare two checkouts bit by bit: ``python -m tests.compare_checkouts OLD_CHECKOUT NEW_CHECKOUT``.

Each checkout packs the same small corpus, trains a teacher on one process, and distils it into two students
on two processes, with the interpreter that runs this script. Losses, scores and weights must be equal to the
last bit. Only commands and files of a run are used, so the two checkouts may be laid out differently inside.
Floats differ between processors: run both on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.dns_corpus import write_dns

STUDENTS = ("tiny", "mini")
RANKS = 2
SIZES = "{tiny: {kind: small, hidden: 4, depth: 2}, mini: {kind: base, hidden: 6, depth: 2}}"
COMMON = (
    f"--sizes={SIZES}",
    "--data.segment_seconds=0.5",
    "--data.tempo_probability=0.5",
    "--data.reverb_probability=0.5",
    "--data.bandwidth_probability=0.3",
    "--data.codec_probability=0.3",
    "--data.codecs=mu-law",
    "--data.workers=1",
    "--train.batch=8",
    "--train.micro_batch=2",
    "--train.validate_every=6",
    "--train.save_every=4",
    "--valid.clips=2",
    "--valid.best=si_sdr",
    "--track.every=1",
    "--track.wandb=disabled",
)
MEASURED = ("audio_seconds_per_second", "joules", "memory", "time")
"""Keys of a row that say how fast the machine was."""


def train_both_runs(checkout: Path, corpus: Path, folder: Path) -> None:
    """Pack the corpus, train the teacher, distil it into the students; everything lands in `folder`."""
    shards, runs = folder / "shards", folder / "runs"
    recipe = ("--workers=1", "--min_shards=4", "--min_seconds=0.15", "--valid_clips=2", "--valid_seconds=2")
    command(checkout, "mvat_dist.pack", "dns", f"--corpus={corpus}", f"--out={shards}", *recipe)
    place = (f"--data.train={shards}", f"--runs={runs}", *COMMON)
    teacher = ("--name=teacher", "--student=mini", "--distil.method=none", "--train.steps=4")
    command(checkout, "mvat_dist.train", *place, *teacher)
    students = (
        "--name=distilled",
        f"--student={','.join(STUDENTS)}",
        f"--teacher={runs / 'teacher'}",
        "--distil.method=mvat+output",
        "--loss.waveform=1",
        "--train.steps=12",
    )
    on_ranks = ("torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "mvat_dist.train")
    command(checkout, *on_ranks, *place, *students)


def command(checkout: Path, *argv: str) -> None:
    """Run one command of a checkout with this interpreter; end the comparison where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {argv[0]} ended with {done.returncode}\n{done.stderr[-4000:]}")


def differences(old: Path, new: Path) -> Iterator[str]:
    """Every difference between the two folders of results, in words."""
    for run, students in (("teacher", ("mini",)), ("distilled", STUDENTS)):
        for student in students:
            places = [folder / "runs" / run / "students" / student for folder in (old, new)]
            for number, (row, other) in enumerate(zip(*map(rows, places), strict=True), start=1):
                for key in sorted(row.keys() | other.keys()):
                    if row.get(key) != other.get(key):
                        yield f"{run}, {student}, row {number}: {key} was {row.get(key)}, is {other.get(key)}"
            for which in ("last", "best"):
                files = [place / which / "model.safetensors" for place in places]
                yield from (f"{run}, {student}, {which}: {name}" for name in unequal_tensors(*files))


def rows(student: Path) -> list[dict[str, Any]]:
    """The student's history without what depends on the machine's speed."""
    lines = (student / "history.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def unequal_tensors(old: Path, new: Path) -> list[str]:
    """Names of the tensors that differ in at least one bit."""
    tensors, others = load_file(old), load_file(new)
    names = sorted(tensors.keys() | others.keys())
    nothing = np.empty(0)
    return [n for n in names if tensors.get(n, nothing).tobytes() != others.get(n, nothing).tobytes()]


def main() -> int:
    """Exit code 0 where nothing differs."""
    parser = argparse.ArgumentParser("python -m tests.compare_checkouts", description=__doc__)
    parser.add_argument("old", type=Path, help="folder of a checkout")
    parser.add_argument("new", type=Path, help="folder of the other one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare ") as name:
        folder = Path(name)
        corpus = write_dns(folder / "corpus", readers=6)
        for label, checkout in (("old", options.old), ("new", options.new)):
            train_both_runs(checkout.resolve(), corpus, folder / label)
        found = list(differences(folder / "old", folder / "new"))
    print("\n".join(found) or "equal: every loss, score and weight, bit for bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
