"""``python -m mvat_dist.cache``: run the teacher once on every segment, and store its targets."""

from __future__ import annotations

import argparse
import re
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from mvat_dist.config import locations
from mvat_dist.config import parser as config_parser
from mvat_dist.config.cli import CommandParser, place
from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.data.shards.target_codec import COARSENESS, CODECS
from mvat_dist.data.shards.targets import CacheManifest
from mvat_dist.errors import UserError, exit_code

PROG = "python -m mvat_dist.cache"


def parser() -> argparse.ArgumentParser:
    """The options that are not the trainer's."""
    command = CommandParser(
        PROG,
        "Fill a teacher cache: the teacher's energy maps of every block and view, and optionally its output, "
        "for every segment of a corpus. All other options are the trainer's (python -m mvat_dist.train "
        "--help); give those that decide the segments (--data.*, --seed) as the training will. --data is "
        "short for --data.train. The same command continues where it was interrupted.",
        "python -m mvat_dist.cache --teacher runs/teacher --data shards/dns --data.variants 4 \\\n"
        "      --out cache/dns\n"
        "  python -m mvat_dist.train --teacher.source cache --teacher.cache cache/dns --data.variants 4 \\\n"
        "      --data.train shards/dns --student all",
    )
    add = command.add_argument
    add(
        "--out",
        type=place,
        required=True,
        metavar="DIR",
        help="folder of the cache: new, unfinished, or to be checked",
    )
    add(
        "--codec",
        choices=CODECS,
        default="compact",
        help="compact: smaller than the audio's FLAC, maps within a few per cent; fp16: eight times as "
        "large; fp32: exact (default: compact)",
    )
    add(
        "--coarseness",
        type=float,
        default=COARSENESS,
        metavar="STEP",
        help="of compact, from 0.01 to 1: half of it makes the maps twice as exact and a third larger "
        f"(default: {COARSENESS})",
    )
    add("--output", action="store_true", help="store the enhanced waveform too, for the methods with output")
    add("--workers", type=int, default=0, help="processes; 0: one per core, or one beside a GPU (default: 0)")
    add(
        "--part",
        metavar="K/N",
        default="0/1",
        help="only shards K, K+N, ... counted from 0, for N jobs side by side (default: 0/1)",
    )
    add("--dry-run", action="store_true", help="forecast size and time, and compare with a live teacher")
    add("--verify", action="store_true", help="check every checksum, and run the teacher again on 1 %%")
    return command


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The cache's own options, and the trainer's.

    Raises:
        UserError: an unknown option, or a value that cannot be.
    """
    options, rest = parser().parse_known_args(_spell_out(argv))
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: give 0 or more")
    if not 0.01 <= options.coarseness <= 1.0:
        raise UserError(f"--coarseness {options.coarseness}: give 0.01 to 1")
    if locations.is_url(options.out):
        raise UserError(
            f"--out {options.out}: a cache is made in a folder of this machine; copy it afterwards"
        )
    return options, config_parser.parse(rest, prog=PROG)


def main(argv: list[str] | None = None) -> None:
    """Fill, forecast or verify a cache.

    Raises:
        UserError: anything the user can mend.
    """
    options, config = parse(sys.argv[1:] if argv is None else argv)
    part = _part(options.part)
    out = Path(options.out).absolute()

    # Imported late: --help and a refused option answer at once.
    from mvat_dist.distributed.logs import configure_logging
    from mvat_dist.training import cache_check, teacher_cache

    configure_logging(0)
    output = options.output or "output" in config.distil.method
    workers = options.workers or teacher_cache.default_workers(config)
    threads = 1 if workers > 1 else 0
    spec = teacher_cache.CacheSpec(
        uuid.uuid4().hex, config, options.codec, output, options.coarseness, threads
    )
    if options.verify:
        print(cache_check.verify(spec, out))
        return
    if options.dry_run:
        print(cache_check.compare(spec))
        return
    print(_summary(teacher_cache.fill(spec, out, workers=workers, part=part), out))


def _spell_out(argv: Sequence[str]) -> list[str]:
    return [re.sub(r"^--data(?=$|=)", "--data.train", argument) for argument in argv]


def _part(text: str) -> tuple[int, int]:
    """(K, N) of ``K/N``.

    Raises:
        UserError: no such part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--part {text}: give K/N with K from 0 to N - 1, as in 0/8")
    return int(match[1]), int(match[2])


def _summary(manifest: CacheManifest | None, out: Path) -> str:
    if manifest is None:
        return f"this part of {out} is done; the cache is finished when all parts are"
    hours = manifest.segments * manifest.samples / SAMPLE_RATE / 3600
    return (
        f"{out} holds {manifest.segments} segments, {hours:.2f} hours, in {manifest.bytes / 1e9:.3f} GB: "
        f"train with --teacher.source cache --teacher.cache {out} and the same --data options"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
