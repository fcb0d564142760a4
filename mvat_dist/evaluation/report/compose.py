"""The order of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from mvat_dist.evaluation.report import comparison, curves, figures, listening, methods, provenance
from mvat_dist.evaluation.report.blocks import Block, Cell, Items, Missing, Report, Section, Table, Text
from mvat_dist.evaluation.report.methods import Method
from mvat_dist.evaluation.report.results import teacher_name
from mvat_dist.evaluation.report.runs import Run
from mvat_dist.evaluation.report.study import Study

_SHARED = (
    "data.train",
    "data.segment_seconds",
    "train.steps",
    "train.batch",
    "train.micro_batch",
    "optim.lr",
    "optim.schedule",
)
"""Settings that a reader wants to know even where they are the same everywhere."""


def report(runs: Sequence[Run], problems: list[str], audio_bytes: int) -> Report:
    """Everything that `runs` show.

    Args:
        runs: at least one.
        problems: what could not be read; what is found on the way is added.
        audio_bytes: the most that sounds and their pictures may take.
    """
    study = Study.of(runs, problems)
    sections = [comparison.claims(study), _compared(study), *_tests(study)]
    sections += [
        curves.section(study),
        listening.section(study, audio_bytes),
        provenance.cost(study),
        provenance.reproduction(study),
        _method(),
    ]
    if problems:  # last, because every section may find some; first on the page, because a reader must know
        sections.insert(0, Section("Left out", [Items(problems)]))
    return Report("MV-AT distillation report", _summary(study), sections)


def _summary(study: Study) -> list[str]:
    seeds = sorted({run.config.seed for run in study.runs})
    counted = [
        _count(len(study.runs), "run"),
        _count(len(study.sizes), "student"),
        _count(len(study.methods), "method"),
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
    ]
    lines = [", ".join(counted) + "."]
    teachers = dict.fromkeys(teacher_name(run.teacher) for run in study.runs if run.teacher)
    if teachers:
        told = "; ".join(teachers)
        lines.append(f"{told[:1].upper()}{told[1:]}.")
    if stamps := sorted(_stamps(study.runs)):
        lines.append(f"Records up to {stamps[-1].isoformat(' ', 'minutes')}.")
    return lines


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _stamps(runs: Sequence[Run]) -> Iterator[datetime]:
    """When something was last written; the report's own date comes from its input."""
    for run in runs:
        for record in (run.status, *(evaluation.record for evaluation in run.evaluations)):
            try:
                yield datetime.strptime(str(record.get("time")), "%Y-%m-%dT%H:%M:%S%z")
            except ValueError:
                continue


def _compared(study: Study) -> Section:
    """The methods, and the settings that they share."""
    rows = [
        [
            Cell(one.label),
            Cell(_meaning(one)),
            Cell(", ".join(_seeds(one))),
            Cell(_factors(one)),
            Cell(_beside(one, study)),
        ]
        for one in study.methods
    ]
    heads = ["method", "what it is", "seeds", "factors", "compared with training alone"]
    recipes = [method.recipe for method in study.methods]
    shared = [
        f"{key}: {recipes[0][key]}" for key in _SHARED if all(one[key] == recipes[0][key] for one in recipes)
    ]
    same = (
        f"The same in all: {'; '.join(shared)}."
        if shared
        else f"The same in all: none of {', '.join(_SHARED)}."
    )
    return Section("What was compared", [Table("Methods", heads, rows), Text(same)])


def _meaning(method: Method) -> str:
    words = {
        "none": "the student alone, without a teacher",
        "output": "the distance to the teacher's output is added to the loss",
        "mvat": "multi-view attention transfer",
        "mvat+output": "multi-view attention transfer and the teacher's output",
    }
    off = f", without the {' and '.join(method.views_off)} view" if method.views_off else ""
    return words[method.kind] + off


def _seeds(method: Method) -> list[str]:
    return [str(seed) for seed in sorted({run.config.seed for run in method.runs})]


def _factors(method: Method) -> str:
    found = {
        key: value
        for key, value in method.recipe.items()
        if key.startswith("distil.") and key != "distil.method"
    }
    return ", ".join(f"{key.removeprefix('distil.')} {value:g}" for key, value in found.items()) or "-"


def _beside(method: Method, study: Study) -> str:
    if method.kind == methods.ALONE:
        return "-"
    return (
        "yes"
        if methods.alone(method, study.methods)
        else "no: none was trained alone under the same settings"
    )


def _tests(study: Study) -> Iterator[Section]:
    if not study.tests:
        text = "No scores: no run was evaluated (python -m mvat_dist.evaluate RUN --data SHARDS)."
        yield Section("Scores", [Missing(text)])
    for test in study.tests:
        parts: tuple[tuple[str, list[Block]], ...] = (
            ("Cost against quality", figures.pareto(study, test)),
            ("Ablation of the views", figures.views(study, test)),
            ("By SNR", figures.by_snr(study, test)),
        )
        inner = [Section(title, blocks) for title, blocks in parts]
        yield Section(f"Scores on {test.name}", [*comparison.scores(study, test), *inner])


def _method() -> Section:
    return Section(
        "How the figures were made",
        [
            Text(
                "The clips are the units. The scores of a method's seeds are averaged clip by clip; a "
                "clip without a score in one of them is left out of that figure, never counted as zero. "
                "Intervals are 95 % percentile bootstrap intervals over clips (2000 fixed draws). A "
                "difference is paired: the mean over the clips that both have, with the interval of the "
                "differences clip by clip; ▲ and ▼ mark those whose interval excludes 0 and whose "
                "p-value in a sign-flip test is below 0.05. So an interval says how far a figure would "
                "move with other clips of the same kind; how far it moves with other seeds stands under "
                "“Seed by seed”, and verdicts say where there is one seed, or where seeds disagree. A single "
                "clip has no interval."
            ),
            Text(
                "Many differences are shown, each at 95 %: of twenty that are truly zero, one is marked. "
                "Multiply-accumulates count convolutions, linear layers and matrix products; the paper calls "
                "them FLOPs."
            ),
        ],
    )
