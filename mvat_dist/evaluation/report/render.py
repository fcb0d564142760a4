"""Put together what a report says, and write it by two templates: the page and its Markdown twin."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from tabulate import tabulate

from mvat_dist.evaluation.report import comparison, figures, provenance
from mvat_dist.evaluation.report.audio import Example, load_examples
from mvat_dist.evaluation.report.figures import Figure
from mvat_dist.evaluation.report.load import Run
from mvat_dist.evaluation.report.provenance import Reproduction
from mvat_dist.evaluation.report.scores import System, TestSet, collect
from mvat_dist.evaluation.report.study import Study
from mvat_dist.evaluation.report.table import Cell, Table
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.evaluation.table import label, score_text


@dataclass(frozen=True)
class TestReport:
    """What a report says of one test set."""

    __test__ = False  # no test of pytest

    name: str
    clips: int
    minutes: float
    noisy: str
    """The noisy input's score by the primary metric."""
    references: Table
    scores: dict[str, Table]
    """By the metric's label, the primary one first."""
    seeds: Table
    gaps: list[str]
    cost_figures: list[Figure]
    cost_table: Table
    view_figures: list[Figure]
    view_table: Table
    snr_figures: list[Figure]
    snr_table: Table | None
    """None where the SNR of the clips is not known."""


@dataclass(frozen=True)
class Report:
    """Everything that a report says beside the words of its templates."""

    title: str
    summary: list[str]
    problems: list[str]
    """What was left out, where, and why."""
    claims: Table | None
    methods: Table
    shared_settings: str
    machines: list[str]
    tests: list[TestReport]
    curves: list[Figure]
    curve_table: Table | None
    examples: list[Example]
    omitted_sounds: int
    cost_table: Table
    total_hours: str
    reproductions: list[Reproduction]


def compose(runs: Sequence[Run], problems: list[str], audio_bytes: int) -> Report:
    """Everything that `runs` show.

    Args:
        runs: at least one.
        problems: what could not be read; gains what is found on the way.
        audio_bytes: the most that sounds and their pictures may take.
    """
    study = Study.of(runs, problems)
    tests = collect(study.methods, problems)
    examples, omitted = load_examples(study, audio_bytes, problems)
    return Report(
        title="MV-AT distillation report",
        summary=_summary(study),
        problems=problems,
        claims=comparison.claims(study, tests),
        methods=comparison.methods_table(study),
        shared_settings=comparison.shared_settings(study),
        machines=study.machines,
        tests=[_test_report(study, test) for test in tests],
        curves=figures.curve_figures(study),
        curve_table=figures.curve_table(study),
        examples=examples,
        omitted_sounds=omitted,
        cost_table=provenance.cost_table(study),
        total_hours=provenance.total_hours(study),
        reproductions=[provenance.reproduction(run) for run in study.runs],
    )


def _test_report(study: Study, test: TestSet) -> TestReport:
    networks = figures.priced_networks(study, test)
    losses = comparison.view_losses(study, test)
    return TestReport(
        name=test.name,
        clips=len(test.clips),
        minutes=test.minutes,
        noisy=score_text(test.estimate(System(NOISY), test.primary), test.primary),
        references=comparison.reference_table(test),
        scores={label(metric): comparison.score_table(study, test, metric) for metric in test.metrics},
        seeds=comparison.seed_table(study, test),
        gaps=comparison.gaps(study, test),
        cost_figures=figures.cost_figures(study, test, networks),
        cost_table=figures.cost_table(test, networks),
        view_figures=[figures.view_figure(test, losses)] if losses else [],
        view_table=comparison.view_table(test, losses),
        snr_figures=figures.snr_figures(study, test),
        snr_table=comparison.snr_table(study, test) if test.buckets() else None,
    )


def _summary(study: Study) -> list[str]:
    seeds = sorted({run.config.seed for run in study.runs})
    counts = [
        _count(len(study.runs), "run"),
        _count(len(study.sizes), "student"),
        _count(len(study.methods), "method"),
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
    ]
    lines = [", ".join(counts) + "."]
    if teachers := "; ".join(dict.fromkeys(run.teacher_label for run in study.runs if run.inputs.teacher)):
        lines.append(f"{teachers[:1].upper()}{teachers[1:]}.")
    if stamps := sorted(_stamps(study.runs)):
        lines.append(f"Records up to {stamps[-1].isoformat(' ', 'minutes')}.")
    return lines


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _stamps(runs: Sequence[Run]) -> Iterator[datetime]:
    """When the records were written: the latest dates the report, so equal input gives equal bytes."""
    for run in runs:
        for time in (run.status.time, *(evaluation.record.time for evaluation in run.evaluations)):
            try:
                yield datetime.strptime(time, "%Y-%m-%dT%H:%M:%S%z")
            except ValueError:
                continue


def render_page(report: Report) -> str:
    """The report as one HTML document."""
    return _environment(autoescape=True).get_template("page.html.j2").render(report=report)


def render_twin(report: Report) -> str:
    """The report as GitHub's Markdown."""
    text = _environment(autoescape=False).get_template("twin.md.j2").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text)


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("mvat_dist.evaluation", "report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode("ascii"),
        "markdown": _markdown,
        "markdown_table": _markdown_table,
        "fenced": _fenced,
    }
    return environment


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is: names come from folders and from configurations."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _markdown_table(table: Table) -> str:
    rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return tabulate(rows, list(map(_markdown, table.heads)), tablefmt="github", disable_numparse=True)


def _markdown_cell(cell: Cell) -> str:
    note = f"({_markdown(cell.note)})" if cell.note else ""
    return " ".join(filter(None, ("; ".join(map(_markdown, cell.lines)), note, cell.symbol)))


def _fenced(code: str) -> str:
    """A code block whose fence is longer than any in the code."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`*", code)))
    return f"{fence}sh\n{code}\n{fence}"
