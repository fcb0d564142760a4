"""Pack a speech corpus into shards, check packed shards, or make a synthetic corpus."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import cast

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from tabulate import tabulate

from mvat_dist.config.cli import ConfigHelpFormatter, place
from mvat_dist.data.prepare.corpora import list_dns, list_valentini
from mvat_dist.data.prepare.manifests import REJECTED, PackedCorpus
from mvat_dist.data.prepare.reading import REASONS, Reason
from mvat_dist.data.prepare.recipes import DnsRecipe, Recipe, ValentiniRecipe, WebDatasetRecipe
from mvat_dist.data.prepare.statistics import check_picture, collect, draw, source_table, subset_table
from mvat_dist.data.prepare.verify import verify
from mvat_dist.data.prepare.webdataset import list_webdataset
from mvat_dist.data.prepare.write import pack
from mvat_dist.data.synthetic.corpus import make_corpus
from mvat_dist.errors import UserError, exit_code, nearest

EXAMPLE = """example:
  python -m mvat_dist.pack dns --corpus /data/DNS-Challenge/datasets_fullband --out shards/dns
  python -m mvat_dist.pack valentini --config shards/valentini.yaml --corpus /data/VoiceBank \\
      --out shards/valentini
  python -m mvat_dist.pack webdataset --corpus /data/wds --speech 'speech-{000..063}.tar' \\
      --noise 'noise/*.tar' --out shards/wds
  python -m mvat_dist.pack verify shards/dns
  python -m mvat_dist.pack stats shards/dns --out dns.png
  python -m mvat_dist.pack synthetic --out build/corpus --minutes 12 --noise-minutes 6

Options may be written with - for _.
"""


_RECIPES: dict[str, type[Recipe]] = {
    "dns": DnsRecipe,
    "valentini": ValentiniRecipe,
    "webdataset": WebDatasetRecipe,
}
_OPTIONS = (
    "corpus",
    "out",
    "workers",
    "config",
    "sources",
    "minutes",
    "noise_minutes",
    "rooms",
    "test_clips",
)
_ABOUT = {
    "dns": "DNS-Challenge layout: speech, noise and rooms to mix from, or mixed pairs, or both",
    "valentini": "VoiceBank+DEMAND (Valentini-Botinhao): {clean,noisy}_<set>_wav",
    "webdataset": "WebDataset tars: speech, noise and rooms to mix from, or pairs such as KEY.noisy.flac",
}


def main(argv: list[str] | None = None) -> None:
    """Run one of the subcommands."""
    arguments = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        options = _parser().parse_args(arguments)
    except SystemExit:
        raise  # --help
    except Exception as error:
        raise UserError(_readable(str(error))) from error
    commands = {"verify": _verify, "stats": _stats, "synthetic": _synthetic}
    if options.command in commands:
        commands[options.command](options[options.command])
    else:
        _pack(options.command, options[options.command])


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _subparser(
        "Pack a speech corpus into shards, check packed shards, or make a synthetic corpus.",
        prog="python -m mvat_dist.pack",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, recipe in _RECIPES.items():
        commands.add_subcommand(name, _recipe_parser(name, recipe), help=_ABOUT[name])
    verify_parser = _subparser(
        "Compare the SHA-256 of every file with the manifests, and read every utterance once."
    )
    verify_parser.add_argument("corpus", type=place, help="a packed corpus")
    _add_workers(verify_parser)
    commands.add_subcommand("verify", verify_parser, help="check packed shards")
    stats_parser = _subparser("Hours of each subset and source, and how levels, SNRs and lengths spread.")
    stats_parser.add_argument("corpus", type=place, help="a packed corpus")
    stats_parser.add_argument("--out", type=place, default=None, help="picture: FILE.png, .svg or .pdf")
    stats_parser.add_argument("--sources", type=int, default=8, help="most sources of a subset in the table")
    _add_workers(stats_parser)
    commands.add_subcommand("stats", stats_parser, help="hours, and a picture of levels, SNRs and lengths")
    about = "make a small corpus in DNS-Challenge layout of synthetic voices, noises and rooms"
    commands.add_subcommand("synthetic", _synthetic_parser(about), help=about)
    return parser


def _recipe_parser(layout: str, recipe: type[Recipe]) -> ArgumentParser:
    parser = _subparser(_ABOUT[layout])
    parser.add_argument("--config", action="config", help="recipe: a YAML file with any of the options below")
    parser.add_argument("--corpus", type=place, required=True, help="folder of the corpus")
    parser.add_argument(
        "--out", type=place, required=True, help="folder of the shards: new, empty or unfinished"
    )
    _add_workers(parser)
    parser.add_class_arguments(recipe)
    return parser


def _synthetic_parser(about: str) -> ArgumentParser:
    parser = _subparser(f"{about[0].upper()}{about[1:]}.")
    parser.add_argument("--out", type=place, required=True, help="folder of the corpus: new or empty")
    parser.add_argument("--minutes", type=float, default=12.0, help="speech, in minutes")
    parser.add_argument("--noise_minutes", type=float, default=6.0, help="noise, in minutes")
    parser.add_argument("--rooms", type=int, default=4, help="rooms, 4 impulse responses each")
    parser.add_argument("--test_clips", type=int, default=0, help="mixtures for a test set of other voices")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is random")
    return parser


def _add_workers(parser: ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")


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
        known = {*_OPTIONS, *(name for recipe in _RECIPES.values() for name in _names(recipe))}
        line += f"; did you mean {nearest(unknown.group(1).rpartition('.')[2], known)}?"
    return line


def _pack(layout: str, options: Namespace) -> None:
    corpus, out = Path(options.corpus), Path(options.out)
    recipe = _RECIPES[layout](**{name: options[name] for name in _names(_RECIPES[layout])})
    if isinstance(recipe, ValentiniRecipe):
        trainsets = ("28spk", "56spk") if recipe.trainset == "both" else (recipe.trainset,)
        speakers = [speaker.strip() for speaker in recipe.valid_speakers.split(",")]
        listing = list_valentini(corpus, [f"trainset_{trainset}" for trainset in trainsets], speakers)
    elif isinstance(recipe, WebDatasetRecipe):
        listing = list_webdataset(corpus, recipe)
    else:
        listing = list_dns(corpus)
    packed = pack(listing, layout, recipe, out, options.workers)
    _print_summary(packed.manifest, out)
    if packed.kept_inspections:
        print(
            f"went on from an interrupted run: {packed.kept_inspections} files had been inspected and "
            f"{packed.kept_shards} shards written"
        )
    if packed.already:
        print(f"{out} was packed from this corpus with these settings before: nothing to do")


def _names(recipe: type[Recipe]) -> list[str]:
    return [field.name for field in dataclasses.fields(recipe)]


def _print_summary(manifest: PackedCorpus, out: Path) -> None:
    subsets = [
        (name, subset.kind, subset.utterances, f"{subset.hours or 0:.3f}", f"{(subset.bytes or 0) / 1e6:.1f}")
        for name, subset in manifest.subsets.items()
    ]
    print(tabulate(subsets, ["subset", "kind", "utterances", "hours", "MB"], colalign=("left", "left")))
    files = manifest.files
    print(
        f"\n{files['found']} audio files found = {files['packed']} packed + {files['held_out']} held out for "
        f"validation + {files['rejected']} left out"
    )
    if manifest.rejected:
        left_out = [
            (reason, count, REASONS[cast("Reason", reason)]) for reason, count in manifest.rejected.items()
        ]
        print(tabulate(left_out, ["left out", "files", "meaning"]))
        print(f"each one with its reason: {out / REJECTED}")
    for note in manifest.notes:
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


def _stats(options: Namespace) -> None:
    picture = Path(options.out) if options.out is not None else None
    if picture:
        check_picture(picture)
    if options.sources < 1:
        raise UserError(f"--sources must be at least 1, it is {options.sources}")
    corpus = Path(options.corpus)
    statistics = collect(corpus, options.workers)
    header, rows = subset_table(statistics)
    print(tabulate(rows, header, colalign=("left", "left", "left")))
    print("length, level and SNR: median [5 %, 95 %] of the utterances; groups: speakers or recordings\n")
    header, rows = source_table(statistics, options.sources)
    print(tabulate(rows, header, colalign=("left", "left")))
    if picture:
        hours = sum(subset.hours for subset in statistics)
        draw(statistics, f"{corpus.resolve().name}: {hours:.2f} hours", picture)
        print(f"\npicture: {picture}")


def _synthetic(options: Namespace) -> None:
    make_corpus(
        Path(options.out),
        speech_minutes=options.minutes,
        noise_minutes=options.noise_minutes,
        rooms=options.rooms,
        seed=options.seed,
        test_clips=options.test_clips,
    )
    print(f"synthetic corpus: {options.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
