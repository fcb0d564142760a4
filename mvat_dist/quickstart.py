"""The whole path in small: a synthetic corpus, shards, a teacher, three students, their scores.

    python -m mvat_dist.quickstart --out runs/quickstart

Every stage is the command that a user would type. A stage that is done is not done again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mvat_dist import evaluate, pack, submit
from mvat_dist.config import parser as configfile
from mvat_dist.config import sizes
from mvat_dist.config.cli import CommandParser
from mvat_dist.data.synthetic.corpus import make_corpus
from mvat_dist.errors import UserError, exit_code
from mvat_dist.evaluation.score_record import SCORES, Scores
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.io import read_record
from mvat_dist.runs.folder import run_folder

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TEACHER = "demo-teacher"
TEACHER_STEPS = 400
PROCESSES = 2
TEST_CLIPS = 24


def main(argv: list[str] | None = None) -> None:
    """Run all stages; print the scores and where everything is.

    Raises:
        UserError: a stage was refused, or a student is not better than the noisy input.
    """
    arguments = _parser().parse_args(argv)
    started = time.monotonic()
    out: Path = arguments.out.absolute()
    corpus, shards = out / "corpus", out / "shards"

    _headline(1, "a synthetic corpus (espeak-ng voices, computed noises) in DNS layout")
    make_corpus(corpus, speech_minutes=10.0, noise_minutes=6.0, rooms=2, seed=0, test_clips=TEST_CLIPS)
    _headline(2, "shards")
    pack.main(["dns", "--corpus", str(corpus), "--out", str(shards)])

    common = ["--config", str(CONFIG), "--data.train", str(shards), "--runs", str(out / "runs")]
    teaching = [*common, "--student", TEACHER, "--distil.method", "none", "--name", "teacher"]
    teaching += ["--train.steps", str(TEACHER_STEPS)]
    teacher = run_folder(configfile.parse(teaching))
    distilling = [*common, "--teacher", str(teacher), "--name", "students"]
    config = configfile.parse(distilling)
    run = run_folder(config)
    local = ["--cluster", "local", "--nodes", str(PROCESSES)]
    _headline(3, "a teacher")
    submit.main([*local, *teaching])
    _headline(4, "three students at once beside the teacher, by multi-view attention transfer")
    submit.main([*local, *distilling])
    _headline(5, "scores on clips that no training has seen")
    evaluate.main([str(run), "--data", str(shards), "--out", str(out / "scores")])

    _check(out / "scores", list(sizes.select(config.student, config.sizes)))
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nDone in {minutes:.1f} minutes.\nCorpus:   {corpus}\nShards:   {shards}\nTeacher:  {teacher}\n"
        f"Students: {run}\nScores:   {out / 'scores'}"
    )


def _check(scores: Path, students: list[str]) -> None:
    """Check that every student is better than its noisy input.

    Raises:
        UserError: naming the students that are not.
    """
    for name, section in read_record(scores / SCORES, Scores).sections.items():
        means = {
            model: mean
            for model, by_metric in section.scores.items()
            if (mean := by_metric["si_sdr"].mean) is not None
        }
        worse = [student for student in students if student not in means or means[student] <= means[NOISY]]
        if worse:
            raise UserError(
                f"{name}: the SI-SDR of {', '.join(worse)} is not above the noisy input's, see {scores}"
            )


def _headline(number: int, text: str) -> None:
    print(f"\n== {number}/5  {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.quickstart",
        "Make a synthetic corpus, pack it, train a teacher, distil three students, score them.",
        "python -m mvat_dist.quickstart --out runs/quickstart",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(main))
