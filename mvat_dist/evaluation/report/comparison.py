"""The words and tables: the paper's claims beside our figures, and the scores of students by methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report import methods as grouping
from mvat_dist.evaluation.report.blocks import (
    SYMBOL,
    Block,
    Cell,
    Fold,
    Items,
    Mark,
    Missing,
    Section,
    Table,
    Text,
)
from mvat_dist.evaluation.report.methods import Method
from mvat_dist.evaluation.report.results import Clip, Estimate, TestSet, Who
from mvat_dist.evaluation.report.study import Study, change, label, shown, signed
from mvat_dist.evaluation.statistics import NOISY

SIMILAR = 0.1
"""MOS. A student is as good as its teacher where the interval of its PESQ lies above the teacher's less
this much. Design choice: the paper does not say what "similar" means."""


def mark(estimate: Estimate | None) -> Mark:
    """Whether a difference is clearly above or below 0."""
    if estimate is None or not estimate.sign:
        return ""
    return "better" if estimate.sign > 0 else "worse"


def claims(study: Study) -> Section:
    """The claims of the paper's abstract as rows."""
    figures = {
        "MV-AT improves students of various sizes consistently": _against_alone,
        "MV-AT is better than output distillation": _against_output,
        "15.4x fewer parameters and 4.71x fewer FLOPs than the baseline at similar quality": _beside_teacher,
    }
    rows = []
    for claim, figure in figures.items():
        for test in study.tests:
            for method in _transferring(study):
                ours, reading = figure(study, test, method)
                rows.append([Cell(claim), Cell(reading, f"{test.name}, {method.label}"), Cell(ours)])
    title = "The paper's claims, and what these runs show"
    if not rows:
        return Section(title, [Missing(_why_no_claims(study))])
    caption = (
        "Claims of arXiv 2208.10367 (abstract). Our figures are differences of PESQ-WB where it was scored, "
        "with 95 % intervals; ▲ clearly above 0, ▼ clearly below 0, no mark: neither."
    )
    heads = ["claim", "here", "our figures"]
    return Section(title, [Table(caption, heads, rows)])


def _transferring(study: Study) -> list[Method]:
    """The methods that the claims are about: attention transfer by itself, if any run has it so."""
    whole = [method for method in study.methods if "mvat" in method.kind and not method.views_off]
    return [method for method in whole if method.kind == "mvat"] or whole


def _why_no_claims(study: Study) -> str:
    if not study.tests:
        return "Nothing can be said yet: no run was evaluated. Run python -m mvat_dist.evaluate on each."
    return "Nothing can be said: no run transfers attention with all views (--distil.method mvat)."


def _against_alone(study: Study, test: TestSet, method: Method) -> tuple[str, str]:
    return _against(study, test, method, grouping.alone(method, study.methods), "was trained alone")


def _against_output(study: Study, test: TestSet, method: Method) -> tuple[str, str]:
    reference = grouping.output_distillation(method, study.methods)
    return _against(study, test, method, reference, "learnt from the teacher's output alone")


def _against(
    study: Study, test: TestSet, method: Method, reference: Method | None, did: str
) -> tuple[str, str]:
    """Our figures against `reference`, whose students `did` something else, and what they say."""
    if reference is None:
        return "-", f"cannot be said: no student {did} under the same settings"
    found = {
        name: difference
        for name in study.sizes
        if (difference := _difference(test, name, method, reference)) is not None
    }
    if not found:
        return "-", f"cannot be said: no student was scored under both this and {reference.label}"
    metric = test.primary
    ours = "\n".join(f"{name} {signed(one, metric)}{_symbol(one)}" for name, one in found.items())
    return ours, _reading(found)


def _reading(found: Mapping[str, Estimate]) -> str:
    """What differences, by student, say of a claim: from their clips, and whether their seeds agree."""
    signs = [one.sign for one in found.values()]
    better, worse, count = signs.count(1), signs.count(-1), len(signs)
    if count == 1:
        word = {1: "better", 0: "no clear difference", -1: "worse"}[signs[0]]
        told = f"{word} for the one student here"
    elif better == count:
        told = f"{'not shown' if _divided(found) else 'holds'}: better for all {count} students"
    elif worse:
        told = f"does not hold: worse for {worse} of {count} students, better for {better}"
    else:
        told = f"not shown: better for {better} of {count} students, no clear difference for the others"
    return told + _by_seed(found)


def _divided(found: Mapping[str, Estimate], bar: float = 0.0) -> list[str]:
    """The students some of whose seeds lie above `bar`, and some below."""
    return [name for name, one in found.items() if one.seeds and min(one.seeds) < bar < max(one.seeds)]


def _by_seed(found: Mapping[str, Estimate], bar: float = 0.0) -> str:
    """What must be added to a verdict on clips: it says nothing of other seeds where there is one."""
    text = ""
    for count, words in ((0, "no seed in common"), (1, "one seed")):
        few = [name for name, one in found.items() if len(one.seeds) == count]
        if few:
            text += f" ({words})" if len(few) == len(found) else f" ({words}: {', '.join(few)})"
    if divided := _divided(found, bar):
        text += f"; the seeds disagree: {', '.join(divided)}"
    return text


def _symbol(estimate: Estimate) -> str:
    return f" {SYMBOL[mark(estimate)]}".rstrip()


def _difference(test: TestSet, student: str, method: Method, reference: Method) -> Estimate | None:
    return test.difference(Who(student, method.label), Who(student, reference.label), test.primary)


def _beside_teacher(study: Study, test: TestSet, method: Method) -> tuple[str, str]:
    """How much smaller than their teacher the students are, and how much worse; the cheapest similar one."""
    metric, lines, similar = test.primary, [], ""
    for teacher in study.teachers_of(method, test):
        base = study.teacher_cost(teacher)
        for name in study.sizes:
            difference = test.difference(Who(name, method.label), teacher, metric)
            if difference is None or base is None:
                continue
            cost = study.cost(name)
            smaller = (
                f"{base.parameters / cost.parameters:.1f}x fewer parameters, "
                f"{base.gmac / cost.gmac:.2f}x fewer FLOPs"
            )
            lines.append(f"{name}: {smaller}, {signed(difference, metric)}{_symbol(difference)}")
            low = difference.low
            if not similar and metric == "pesq_wb" and low is not None and low > -SIMILAR:
                similar = f"{name} is as good as its teacher to within {SIMILAR:g} MOS: {smaller}"
                similar += _by_seed({name: difference}, -SIMILAR)
    if not lines:
        return "-", "cannot be said: no teacher was scored beside these students"
    return "\n".join(lines), similar or f"no student is as good as its teacher to within {SIMILAR:g} MOS"


def scores(study: Study, test: TestSet) -> list[Block]:
    """Everything about one test set that is a table of scores."""
    first, *others = test.metrics
    ordered = [test.primary, *(metric for metric in (first, *others) if metric != test.primary)]
    blocks: list[Block] = [
        Text(f"{len(test.clips)} clips, {test.seconds / 60:.1f} minutes."),
        _references(test, ordered),
        _table(study, test, ordered[0]),
    ]
    blocks += [Fold(label(metric), [_table(study, test, metric)]) for metric in ordered[1:]]
    blocks.append(Fold("Seed by seed", [_seeds(study, test)]))
    return [*blocks, *_gaps(study, test)]


def _references(test: TestSet, metrics: Sequence[str]) -> Table:
    """The noisy input, the teachers and the baselines."""
    whos = [Who(NOISY), *test.references]
    rows = [
        [Cell("noisy input" if who.name == NOISY else who.name)]
        + [_score(test, who, metric) for metric in metrics]
        for who in whos
        if test.has(who)
    ]
    return Table(
        "What there is to compare with: noisy input, teacher, baselines", ["", *map(label, metrics)], rows
    )


def _score(test: TestSet, who: Who, metric: str) -> Cell:
    return Cell(shown(test.estimate(who, metric), metric), unscored(test, who, metric))


def unscored(test: TestSet, who: Who, metric: str, among: frozenset[Clip] | None = None) -> str:
    """How many clips a mean lacks, in words; empty where it lacks none."""
    missing = test.unscored(who, metric, among)
    seeds = " of every seed" if len(test.seeds(who)) > 1 else ""
    return f"{missing} clips without a score{seeds}" if missing else ""


def _table(study: Study, test: TestSet, metric: str) -> Table:
    scored = [m for m in study.methods if any(test.has(Who(name, m.label)) for name in study.sizes)]
    rows = []
    for name in study.sizes:
        cells = [_compared(study, test, name, method, metric) for method in scored]
        if any(cell.text != "-" or cell.note for cell in cells):
            cost = study.cost(name)
            rows.append([Cell(name, f"{cost.parameters / 1e6:.2f} M, {cost.gmac:.2f} GMAC"), *cells])
    caption = (
        f"{label(metric)}, higher is better: mean and 95 % interval; below it the difference from training "
        "alone, ▲ or ▼ where it is clearly not 0"
    )
    return Table(caption, ["student", *(method.label for method in scored)], rows)


def _compared(study: Study, test: TestSet, student: str, method: Method, metric: str) -> Cell:
    """A mean, and how much it differs from that of training alone."""
    who = Who(student, method.label)
    text = shown(test.estimate(who, metric), metric)
    lacking = unscored(test, who, metric)
    reference = grouping.alone(method, study.methods)
    if reference is None or reference is method:
        return Cell(text, lacking)
    difference = test.difference(who, Who(student, reference.label), metric)
    notes = [signed(difference, metric) if difference else "", lacking]
    return Cell(text, "; ".join(filter(None, notes)), mark(difference))


def _seeds(study: Study, test: TestSet) -> Table:
    metric = test.primary
    rows = []
    for name, method in study.scored(test):
        who = Who(name, method.label)
        mean = test.estimate(who, metric)
        reference = grouping.alone(method, study.methods)
        difference = None
        if reference is not None and reference is not method:
            difference = test.difference(who, Who(name, reference.label), metric)
        digits = METRICS[metric].decimals + 1
        rows.append(
            [
                Cell(f"{name}, {method.label}"),
                Cell(", ".join(map(str, test.seeds(who)))),
                Cell(", ".join(f"{value:.{digits}f}" for value in mean.seeds) if mean else "-"),
                Cell(", ".join(change(v, metric) for v in difference.seeds) if difference else "-"),
            ]
        )
    caption = f"{label(metric)} of each seed alone, on the clips that all of them have a score for"
    return Table(caption, ["student, method", "seeds", "means", "differences, seeds that both have"], rows)


def _gaps(study: Study, test: TestSet) -> list[Block]:
    """A line for each method that has nobody to be compared with."""
    lines = []
    for method in study.methods:
        if method.kind == grouping.ALONE or grouping.alone(method, study.methods) is not None:
            continue
        nearest = grouping.nearest_alone(method, study.methods)
        why = f"the nearest differs in {', '.join(nearest[1])}" if nearest else "there is none"
        lines.append(
            f"{method.label}: no training alone (--distil.method none) under the same settings, {why}."
        )
    scored = {name for name, _ in study.scored(test)}
    lines += [f"{name}: not evaluated on this test set." for name in study.sizes if name not in scored]
    return [Items(lines)] if lines else []
