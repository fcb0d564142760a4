"""Write one page that compares runs: whether distillation helped, by how much, and at what cost."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from tqdm import tqdm

from mvat_dist.config.cli import CommandParser
from mvat_dist.errors import UserError, exit_code
from mvat_dist.evaluation.report.load import load_runs
from mvat_dist.evaluation.report.render import compose, render_page, render_twin
from mvat_dist.io import make_folder, write_text

PAGE, TWIN = "report.html", "report.md"


def main(argv: list[str] | None = None) -> None:
    """Read the runs and write the page and its Markdown twin.

    Raises:
        UserError: no usable run, or a place that cannot be written.
    """
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    if not (math.isfinite(arguments.audio_mb) and arguments.audio_mb >= 0):
        raise UserError(f"--audio-mb is {arguments.audio_mb:g}: give megabytes, 0 or more")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    problems: list[str] = []
    runs = load_runs(tqdm(arguments.runs, desc="reading", unit="run", leave=False), problems)
    report = compose(runs, problems, round(arguments.audio_mb * 1e6))
    make_folder(out)
    write_text(out / TWIN, _encodable(render_twin(report)))
    write_text(out / PAGE, _encodable(render_page(report)))
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    print(f"page: {out / PAGE}\nthe same as Markdown: {out / TWIN}")


def _encodable(text: str) -> str:
    """`text` with escapes for what a file's name may hold and UTF-8 may not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.report",
        "Compare runs: one self-contained HTML page and its Markdown twin. Evaluate the runs first.",
        "python -m mvat_dist.report runs/*/ --out report",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run; several to compare"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder for the page (default: report)"
    )
    parser.add_argument(
        "--audio-mb",
        type=float,
        default=16.0,
        help="most MB of sounds and spectrograms in the page; 0 leaves them out (default: %(default)g)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(main))
