"""Does packing scale? Wall time and peak memory of `mvat_dist.pack` over corpora of growing size.

    python benchmarks/packing.py --counts 2000 8000 32000
    python benchmarks/packing.py --speech DIR --copies 8      # DIR in DNS-Challenge layout
    python benchmarks/packing.py --plan 450000

Time per file and memory of the workers should not grow with the number of files. The second form measures
the rate on recordings of real length and states what 500 hours would take. The third needs no audio: it
measures what the main process holds for so many files, through the inspections and the whole plan.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from tabulate import tabulate

from mvat_dist.data.prepare.corpora import Listing, Source
from mvat_dist.data.prepare.inspection import Inspection, inspect_all
from mvat_dist.data.prepare.plan import make_plan
from mvat_dist.data.prepare.recipes import DnsRecipe

RATE = 16_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 8000, 32000], help="files per corpus")
    parser.add_argument("--speech", type=Path, default=None, help="real recordings instead of made ones")
    parser.add_argument("--copies", type=int, default=8, help="of them, each shifted by another time")
    parser.add_argument("--rate", type=int, default=RATE, help="Hz of the copies; 48000 as DNS-Challenge has")
    parser.add_argument("--codecs", nargs="+", default=["flac"], choices=["flac", "int16"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None, help="folder for corpora and shards")
    parser.add_argument("--plan", type=int, default=0, help="files to plan for, without audio")
    args = parser.parse_args()
    if args.plan:
        print(_plan(args.plan, args.work))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = Path(work)
        corpora = (
            [_copies(folder / "copies", args.speech, args.copies, args.rate)]
            if args.speech
            else (_made(folder / str(count), count) for count in args.counts)
        )
        for corpus in corpora:
            for codec in args.codecs:
                rows.append(_measure(corpus, folder / f"packed-{len(rows)}", codec, args.workers))
                print(tabulate(rows, headers="keys", floatfmt=".2f"), flush=True)


def _plan(count: int, work: Path | None) -> str:
    """Seconds and memory of inspecting (results made up) and planning `count` files."""
    before, began = _status(os.getpid(), "VmRSS"), time.perf_counter()
    listing = Listing(Path("corpus"), count, "made up")
    for number in range(count):
        if number % 5 == 0:
            path = f"datasets_fullband/noise_fullband/door_Freesound_validated_{number:06d}_{number % 7}.wav"
            listing.sources.append(Source(path, "noise", path.rpartition("_")[0]))
        else:
            book = f"book_{number // 100:05d}_chp_{number % 40:04d}_reader_{number // 200:05d}"
            path = f"datasets_fullband/clean_fullband/read_speech/{book}_{number % 200}.wav"
            listing.sources.append(Source(path, "clean", sys.intern(f"reader_{number // 200:05d}")))

    def inspected(_function: Any, jobs: Any, _chunk: int = 1) -> Iterator[Any]:
        for path, _ in jobs:
            digest = hashlib.blake2b(path.encode(), digest_size=16).digest()
            frames = 3 * RATE + int.from_bytes(digest[:2], "little")
            yield (2 * frames, 1), Inspection(path, None, "", RATE, 1, frames, digest, ((0, frames),))

    recipe = DnsRecipe(max_shard_size=256.0, valid_clips=256, valid_fraction=0.05)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        inspections, _ = inspect_all(listing, recipe, Path(folder) / "log", inspected)
    plan = make_plan(listing, inspections, recipe)
    grown = _status(os.getpid(), "VmHWM") - before
    shards = sum(len(subset.shards) for subset in plan.subsets)
    return (
        f"{count} files in {shards} shards planned in {time.perf_counter() - began:.0f} s; listing, "
        f"inspections and plan took {grown / 1e6:.0f} MB beside {before / 1e6:.0f} MB of the program: "
        f"{grown / count:.0f} bytes a file"
    )


def _made(folder: Path, count: int) -> Path:
    """`count` files of 0.9 to 1.2 s, no two alike; every fifth is noise."""
    random = np.random.default_rng(count)
    pool = np.cumsum(random.standard_normal(120 * RATE)) * 0.01
    pool = (pool - np.convolve(pool, np.ones(400) / 400, "same")) * 600
    for number in range(count):
        name = "noise_fullband/n" if number % 5 == 0 else "clean_fullband/reader"
        path = folder / f"{name}_{number // 20:05d}_{number % 20}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = int(random.integers(int(0.9 * RATE), int(1.2 * RATE)))
        start = int(random.integers(pool.size - length))
        audio = pool[start : start + length] * random.uniform(0.3, 1)
        soundfile.write(path, audio.clip(-30000, 30000).astype(np.int16), RATE)
    return folder


def _copies(folder: Path, corpus: Path, copies: int, to_rate: int) -> Path:
    """All of `corpus` several times, turned round in time so that no copy counts as a duplicate."""
    for path in sorted(corpus.rglob("*.flac")) + sorted(corpus.rglob("*.wav")):
        audio, rate = soundfile.read(path, dtype="int16")
        if rate != to_rate:
            audio = soxr.resample(audio, rate, to_rate)
        for copy in range(copies):
            suffix = path.suffix if to_rate == RATE else ".wav"
            to = folder / path.relative_to(corpus).with_name(f"{path.stem}copy{copy}{suffix}")
            to.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(to, np.roll(audio, 4000 * copy, axis=0), to_rate, subtype="PCM_16")
    return folder


def _measure(corpus: Path, out: Path, codec: str, workers: int) -> dict[str, float | str]:
    argv = [sys.executable, "-m", "mvat_dist.pack", "dns", "--corpus", str(corpus), "--out", str(out)]
    argv += ["--codec", codec, "--workers", str(workers), "--min-seconds", "0.5"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    parent, worker = _peak_memory(argv)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    manifest = json.loads((out / "manifest.json").read_text())
    hours = sum(
        subset["hours"] * (2 if subset["kind"] == "pairs" else 1) for subset in manifest["subsets"].values()
    )
    stored = sum(subset["bytes"] for subset in manifest["subsets"].values())
    files = manifest["files"]["found"]
    return {
        "codec": codec,
        "files": files,
        "audio h": hours,
        "GB": stored / 1e9,
        "s": seconds,
        "ms/file": 1000 * seconds / files,
        "CPU ms/file": 1000 * cpu / files,
        "h audio/h": hours / (seconds / 3600),
        "500 h take h": 500 / hours * seconds / 3600,
        "parent MB": parent / 1e6,
        "worker MB": worker / 1e6,
    }


def _peak_memory(argv: list[str]) -> tuple[int, int]:
    """Run a command; most bytes resident in it, and in one of the processes that it started."""
    memory: dict[int, int] = {}
    # Into a file: a pipe that nobody empties would stop the progress bar, and with it the packing.
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=said) as process,
    ):
        while process.poll() is None:
            for pid in _family(process.pid):
                memory[pid] = max(memory.get(pid, 0), _status(pid, "VmHWM"))
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read())
    parent = memory.pop(process.pid)
    return parent, max(memory.values())


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))


def _status(pid: int, field: str) -> int:
    """Resident memory now (VmRSS) or at its largest (VmHWM), in bytes; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


if __name__ == "__main__":
    main()
