"""``python -m mvat_dist.synthesize``: make a small corpus of synthetic speech, noise and rooms."""

from __future__ import annotations

import sys
from pathlib import Path

from mvat_dist.config.cli import CommandParser
from mvat_dist.data.synthetic.corpus import make_corpus
from mvat_dist.errors import exit_code


def main(argv: list[str] | None = None) -> None:
    """Make the corpus that the command line describes."""
    parser = CommandParser(
        "python -m mvat_dist.synthesize",
        "Make a small corpus in DNS-Challenge layout out of synthetic voices, noises and rooms.",
        "python -m mvat_dist.synthesize --out build/corpus --minutes 12 --noise-minutes 6",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus: new or empty")
    parser.add_argument("--minutes", type=float, default=12.0, help="speech, in minutes (default: 12)")
    parser.add_argument("--noise-minutes", type=float, default=6.0, help="noise, in minutes (default: 6)")
    parser.add_argument("--rooms", type=int, default=4, help="rooms, 4 impulse responses each (default: 4)")
    parser.add_argument(
        "--test-clips", type=int, default=0, help="mixtures for a test set of other voices (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is random (default: 0)")
    options = parser.parse_args(argv)
    make_corpus(
        options.out,
        speech_minutes=options.minutes,
        noise_minutes=options.noise_minutes,
        rooms=options.rooms,
        seed=options.seed,
        test_clips=options.test_clips,
    )
    print(f"synthetic corpus: {options.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
