"""Export a trained network: safetensors, TorchScript and ONNX files, each checked before it is kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from mvat_dist.config.cli import CommandParser
from mvat_dist.data.clips import Clip, UnusableClipError
from mvat_dist.data.prepare.inspection import SILENCE
from mvat_dist.data.test_sets import held_out
from mvat_dist.errors import UserError, clean_end, exit_code, nearest
from mvat_dist.inference import provenance
from mvat_dist.inference.export import FORMATS, Subject, export, outdated
from mvat_dist.models import weights
from mvat_dist.runs.weights import resolve

CLIP_SECONDS = 10.0
"""Longest clip to check on."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.export",
        "Export a trained network: each file is compared with the network on real clips before it is kept,\n"
        "and a model card is written beside the files.",
        "python -m mvat_dist.export --model runs/NAME/students/manner-s-2.0gf --data shards/dns \\\n"
        "      --out release --licence CC-BY-4.0",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a run, a student's folder in one, or a model file")
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for the files; those of an earlier export are replaced",
    )
    add("--data", required=True, help="noisy and clean clips to check on, as for mvat_dist.evaluate")
    add("--clips", type=int, default=8, help="how many of them (default: %(default)s)")
    formats = f"of {', '.join(FORMATS)} (default: %(default)s)"
    add("--formats", default=",".join(FORMATS), help=formats)
    add("--weights", choices=("best", "last"), default="best", help="which weights (default: %(default)s)")
    add("--licence", default="", help="licence of the weights, in words (default: not stated)")
    return parser


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--formats: unknown format {name!r}; did you mean {nearest(name, FORMATS)}?")
    return list(dict.fromkeys(names))


def _clips(data: str, count: int) -> list[Clip]:
    """The first `count` clips of `data` that can serve for a check; the others are named on standard error.

    Raises:
        UserError: there is none.
    """
    usable: list[Clip] = []
    for test_set in held_out(data, count, CLIP_SECONDS).values():
        for index in range(len(test_set)):
            if len(usable) == count:
                return usable
            try:
                clip = test_set[index]
            except UnusableClipError as error:
                print(f"note: clip {error.key} is left out: {error}", file=sys.stderr)
                continue
            # A network that maps silence to silence may map speech to anything.
            if not clip.noisy.size or np.abs(clip.noisy - clip.noisy.mean()).max() < SILENCE:
                print(f"note: clip {clip.key} is left out: it is silent", file=sys.stderr)
                continue
            usable.append(clip)
    if not usable:
        raise UserError(f"--data {data} has no clip to check on that can be read and is not silent")
    return usable


def main(argv: list[str] | None = None) -> None:
    """Export one network and say what was kept."""
    arguments = _parser().parse_args(argv)
    names = _formats(arguments.formats)
    if arguments.clips < 1:
        raise UserError(f"--clips is {arguments.clips}: at least one is needed to check on")
    file = resolve(arguments.model, arguments.weights)
    loaded = weights.load(file)
    clips = _clips(arguments.data, arguments.clips)
    subject = Subject(loaded, provenance.describe(file, loaded, arguments.licence), clips)
    with clean_end():
        files = export(subject, names, arguments.out)
    for exported in files:
        kept = f"{exported.bytes / 1e6:.2f} MB" if exported.kept else "NOT KEPT"
        print(f"{exported.file}: {kept}, {exported.check}")
    print(f"model card: {arguments.out / loaded.name}.md")
    for note in outdated(subject, names, arguments.out):
        print(f"note: {note}", file=sys.stderr)
    if refused := [exported.file for exported in files if not exported.kept]:
        raise UserError(f"not kept: {', '.join(refused)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
