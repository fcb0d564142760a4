"""``python -m mvat_dist.pack``: turn a corpus into shards, and check packed ones."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from tabulate import tabulate

from mvat_dist.commandline import ConfigHelpFormatter
from mvat_dist.data.corpora import list_dns, list_valentini
from mvat_dist.data.inspection import REASONS
from mvat_dist.data.packing import REJECTED, pack
from mvat_dist.data.recipes import DnsRecipe, Recipe, ValentiniRecipe
from mvat_dist.data.verification import verify
from mvat_dist.errors import UserError, exit_code, nearest

EXAMPLE = """example:
  python -m mvat_dist.pack dns --corpus /data/DNS-Challenge/datasets_fullband --out shards/dns
  python -m mvat_dist.pack valentini --config shards/valentini.yaml --corpus /data/VoiceBank \\
      --out shards/valentini
  python -m mvat_dist.pack verify shards/dns

Options may be written with - for _.
"""


_RECIPES: dict[str, type[Recipe]] = {"dns": DnsRecipe, "valentini": ValentiniRecipe}
_ABOUT = {
    "dns": "DNS-Challenge layout: speech, noise and rooms to mix from, or mixed pairs, or both",
    "valentini": "VoiceBank+DEMAND (Valentini-Botinhao): {clean,noisy}_<set>_wav",
}


def main(argv: list[str] | None = None) -> None:
    """Run one of the subcommands."""
    made = _parser()
    try:
        parsed = made.parse_args([_underscored(one) for one in (sys.argv[1:] if argv is None else argv)])
    except SystemExit:
        raise  # --help
    except Exception as error:
        raise UserError(_readable(str(error))) from error
    if parsed.command == "verify":
        _verify(parsed.verify)
    else:
        _pack(parsed.command, parsed[parsed.command])


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = _subparser(
        "Pack a speech corpus into shards, or check packed shards.", prog="python -m mvat_dist.pack"
    )
    commands = made.add_subcommands(required=True, dest="command")
    for name, recipe in _RECIPES.items():
        one = _subparser(_ABOUT[name])
        one.add_argument(
            "--config", action="config", help="recipe: a YAML file with any of the options below"
        )
        one.add_argument("--corpus", type=str, required=True, help="folder of the corpus")
        one.add_argument(
            "--out", type=str, required=True, help="folder of the shards: new, empty or unfinished"
        )
        one.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
        one.add_class_arguments(recipe)
        commands.add_subcommand(name, one, help=_ABOUT[name])
    check = _subparser("Compare every byte and every decoded sample with the manifests.")
    check.add_argument("corpus", type=str, help="a packed corpus")
    check.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    commands.add_subcommand("verify", check, help="check packed shards")
    return made


def _subparser(description: str, prog: str | None = None) -> ArgumentParser:
    return ArgumentParser(
        prog=prog,
        description=description,
        epilog=EXAMPLE,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=ConfigHelpFormatter,
    )


def _underscored(argument: str) -> str:
    """``--valid-clips=3`` -> ``--valid_clips=3``: both spellings are understood."""
    return re.sub(r"^--[^=]+", lambda name: "--" + name.group()[2:].replace("-", "_"), argument)


def _readable(message: str) -> str:
    """jsonargparse's message on one line, with the nearest option where one is unknown."""
    line = re.sub(r"\s+", " ", message).strip()
    if unknown := re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.+-]+)", line):
        known = {"corpus", "out", "workers", "config", *_names(DnsRecipe), *_names(ValentiniRecipe)}
        line += f"; did you mean {nearest(unknown.group(1).rpartition('.')[2], known)}?"
    return line


def _pack(layout: str, options: Namespace) -> None:
    corpus, out = Path(options.corpus), Path(options.out)
    recipe = _RECIPES[layout](**{name: options[name] for name in _names(_RECIPES[layout])})
    if isinstance(recipe, ValentiniRecipe):
        trainsets = ("28spk", "56spk") if recipe.trainset == "both" else (recipe.trainset,)
        speakers = [one.strip() for one in recipe.valid_speakers.split(",")]
        listing = list_valentini(corpus, [f"trainset_{one}" for one in trainsets], speakers)
    else:
        listing = list_dns(corpus)
    manifest, already = pack(listing, layout, recipe, out, options.workers)
    _print_summary(manifest, out)
    if already:
        print(f"{out} was packed from this corpus with these settings before: nothing to do")


def _names(recipe: type[Recipe]) -> list[str]:
    return [field.name for field in dataclasses.fields(recipe)]


def _print_summary(manifest: dict[str, Any], out: Path) -> None:
    subsets = [
        (name, one["kind"], one["utterances"], f"{one['hours']:.3f}", f"{one['bytes'] / 1e6:.1f}")
        for name, one in manifest["subsets"].items()
    ]
    print(tabulate(subsets, ["subset", "kind", "utterances", "hours", "MB"], colalign=("left", "left")))
    files = manifest["files"]
    print(
        f"\n{files['found']} audio files found = {files['packed']} packed + {files['held_out']} held out for "
        f"validation + {files['rejected']} left out"
    )
    if manifest["rejected"]:
        left_out = [(reason, count, REASONS[reason]) for reason, count in manifest["rejected"].items()]
        print(tabulate(left_out, ["left out", "files", "meaning"]))
        print(f"each one with its reason: {out / REJECTED}")
    for note in manifest["notes"]:
        print(f"note: {note}")


def _verify(options: Namespace) -> None:
    report = verify(Path(options.corpus), options.workers)
    for problem in report.problems:
        print(problem)
    if report.problems:
        raise UserError(
            f"{len(report.problems)} problems in {options.corpus}: copy these shards again, or remove the "
            "folder and pack again"
        )
    print(
        f"{options.corpus} is whole: {report.shards} shards, {report.utterances} utterances, "
        f"{report.hours:.3f} hours"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
