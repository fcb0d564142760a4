"""Score networks on held-out clips: the noisy input and every network, as rows and as tables."""

from __future__ import annotations

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch

from mvat_dist.config import locations
from mvat_dist.config.cli import CommandParser, place
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.shards.remote_cache import Cache
from mvat_dist.data.test_sets import TestSets, folder_pair, held_out, pair_name
from mvat_dist.distributed import device as devices
from mvat_dist.distributed import ranks
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError, exit_code
from mvat_dist.evaluation.evaluation import Evaluation, run
from mvat_dist.evaluation.metrics import dnsmos, registry
from mvat_dist.evaluation.metrics.registry import GROUPS, METRICS
from mvat_dist.evaluation.score_record import Request
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.evaluation.systems import load_systems, split_name

DEFAULT_METRICS = "pesq_wb,stoi,si_sdr"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.evaluate",
        "Score networks on held-out clips, beside the noisy input: rows and tables. A killed evaluation\n"
        "continues when it is started again; the tasks of one srun share the clips.",
        "python -m mvat_dist.evaluate runs/mvat-all-1a2b3c4d --data shards/dns --limit 100\n"
        "  python -m mvat_dist.evaluate ours=runs/a/students/manner-s-2.0gf theirs=manner_small.pth \\\n"
        "      --noisy recordings/noisy --clean recordings/clean --metrics paper --out scores\n"
        "  srun --ntasks 8 python -m mvat_dist.evaluate runs/teacher --data shards/dns",
    )
    add = parser.add_argument
    model = (
        "runs, students' folders or model files, NAME=PATH to name one; log-mmse is a classical filter, to "
        "be better than; none scores the noisy input only"
    )
    add("models", nargs="*", type=place, metavar="MODEL", help=model)
    data = (
        "packed corpus (its test_* subsets, else valid) or packed subset, as a folder, URL or quoted "
        "pattern; DNS or Valentini corpus as it comes; or a folder with noisy/ and clean/"
    )
    add("--data", help=data)
    add("--noisy", type=Path, help="instead of --data: folder of recordings of any rate and format")
    add("--clean", type=Path, help="with --noisy: folder of their references, matched by name or fileid_N")
    add("--cache-dir", default="", help="folder for copies of what lies at URLs (default: as in training)")
    groups = "; ".join(f"{name}: {','.join(members)}" for name, members in GROUPS.items())
    add(
        "--metrics",
        default=DEFAULT_METRICS,
        help=f"of {', '.join(METRICS)}, or groups ({groups}) (default: %(default)s)",
    )
    add("--dnsmos", type=Path, help="file sig_bak_ovr.onnx (default: the one in the package speechmos)")
    add("--against", help=f"the network that the others are compared with, or {NOISY} (default: the first)")
    add("--limit", type=int, default=0, help="most clips of each test set (default: 0, all)")
    seconds = "score only the start of each clip (default: 0, all of it)"
    add("--max-seconds", type=float, default=0.0, help=seconds)
    add("--weights", choices=("best", "last"), default="best", help="which weights (default: %(default)s)")
    out = (
        "folder for rows and tables (default: evaluate/DATA-WEIGHTS in the run, FILE-DATA-WEIGHTS beside a "
        "file, or here for several MODELs)"
    )
    add("--out", type=Path, help=out)
    add("--processes", type=int, default=0, help="scoring processes (default: 0, one per available CPU)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the networks run")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that needs no file.

    Raises:
        UserError: a number out of its range, or not exactly one choice of clips.
    """
    arguments = _parser().parse_args(argv)
    for name in ("limit", "max_seconds", "processes"):
        if getattr(arguments, name) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it cannot be negative"
            )
    seconds = arguments.max_seconds
    if not math.isfinite(seconds) or 0 < seconds < 1 / SAMPLE_RATE:
        raise UserError(f"--max-seconds is {seconds}: give seconds of at least one sample, or 0 for all")
    if (arguments.noisy is None) != (arguments.clean is None):
        raise UserError("--noisy and --clean are given together: two folders with the halves of the pairs")
    if (arguments.data is None) == (arguments.noisy is None):
        raise UserError("give either --data, or --noisy and --clean (python -m mvat_dist.evaluate --help)")
    if arguments.dnsmos:
        os.environ[dnsmos.WEIGHTS_VARIABLE] = str(arguments.dnsmos.absolute())  # for the scoring workers
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Score what is asked for, print the tables, and write them and the rows."""
    arguments = parse(argv)
    here = ranks.read()
    evaluation = _evaluation(arguments, here)
    if missing := run(evaluation, here, arguments.processes):
        print(f"rank {here.rank} of {here.world_size} is done; {missing} rows of the others are missing")
        return
    print((evaluation.out / "scores.md").read_text(encoding="utf-8"))
    print(f"rows and tables: {evaluation.out}")


def _evaluation(arguments: argparse.Namespace, here: Ranks) -> Evaluation:
    """Everything that is asked for, loaded and checked."""
    metrics = registry.select(arguments.metrics)
    device = devices.pick(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    systems = load_systems(arguments.models, arguments.weights)
    request, sets = _clips(arguments)
    reference = arguments.against or next(iter(systems), None)
    if reference is not None and reference not in (NOISY, *systems):
        choices = f"{', '.join(systems) or 'none'}; or {NOISY}"
        raise UserError(f"--against {reference}: no such network; there are {choices}")
    out = arguments.out or _default_out(arguments)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    return Evaluation(systems, sets, metrics, reference, device, out, request)


def _clips(arguments: argparse.Namespace) -> tuple[Request, TestSets]:
    """The clips, and what was asked for in words."""
    limits = arguments.limit, arguments.max_seconds
    request = partial(
        Request,
        models=arguments.models,
        weights=arguments.weights,
        limit=arguments.limit,
        max_seconds=arguments.max_seconds,
    )
    if arguments.data is not None:
        sets = held_out(arguments.data, *limits, Cache(arguments.cache_dir))
        return request(data=locations.absolute(arguments.data)), sets
    sets, unmatched = folder_pair(arguments.noisy, arguments.clean, *limits)
    if unmatched:
        shown = ", ".join(unmatched[:3]) + (" ..." if len(unmatched) > 3 else "")
        print(f"note: {len(unmatched)} files without a counterpart are left out: {shown}", file=sys.stderr)
    noisy, clean = (str(folder.absolute()) for folder in (arguments.noisy, arguments.clean))
    return request(noisy=noisy, clean=clean, unmatched=unmatched), sets


def _default_out(arguments: argparse.Namespace) -> Path:
    name = pair_name(arguments.noisy) if arguments.data is None else locations.name(arguments.data)
    # A part of the clips takes no other evaluation's place.
    name += f"-first{arguments.limit}" if arguments.limit else ""
    name += f"-{arguments.max_seconds:g}s" if arguments.max_seconds else ""
    label = label_of(name, arguments.weights)
    if len(arguments.models) != 1:
        return Path("evaluate") / label
    _, path = split_name(arguments.models[0])
    if path.is_dir():
        return path / "evaluate" / label
    return path.parent / "evaluate" / f"{path.stem}-{label}"


def label_of(name: str, weights: str) -> str:
    """The folder of an evaluation on data called `name`, among those of its run."""
    return f"{name}-{weights}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
