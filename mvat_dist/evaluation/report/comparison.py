"""Compare students under the methods: the paper's claims beside these runs, and the tables of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report.scores import Estimate, System, TestSet
from mvat_dist.evaluation.report.study import (
    ALONE,
    Method,
    Study,
    alone,
    nearest_alone,
    output_distillation,
    with_all_views,
)
from mvat_dist.evaluation.report.table import (
    SYMBOLS,
    Cell,
    Table,
    difference_cell,
    mark,
    score_cell,
    unscored,
)
from mvat_dist.evaluation.statistics import NOISY
from mvat_dist.evaluation.table import change_text, difference_text, label

SIMILAR = 0.1
"""MOS. A student is as good as its teacher where the interval of its PESQ lies above the teacher's less
this much. Design choice: the paper does not say what "similar" means."""

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

_MEANINGS = {
    "none": "the student alone, without a teacher",
    "output": "the distance to the teacher's output is added to the loss",
    "mvat": "multi-view attention transfer",
    "mvat+output": "multi-view attention transfer and the teacher's output",
}


def methods_table(study: Study) -> Table:
    """The methods: seeds, factors, and whether there is a training alone to compare with."""
    rows = []
    for method in study.methods:
        without = f", without the {' and '.join(method.views_off)} view" if method.views_off else ""
        compared = (
            "yes" if alone(method, study.methods) else "no: none was trained alone under the same settings"
        )
        cells = [
            method.label,
            _MEANINGS[method.kind] + without,
            ", ".join(map(str, method.seeds)),
            _factors(method),
            "-" if method.kind == ALONE else compared,
        ]
        rows.append([Cell(text) for text in cells])
    heads = ["method", "what it is", "seeds", "factors", "compared with training alone"]
    return Table("Methods", heads, rows)


def _factors(method: Method) -> str:
    factors = {
        key.removeprefix("distil."): value
        for key, value in method.recipe.items()
        if key.startswith("distil.") and key != "distil.method"
    }
    return ", ".join(f"{key} {value:g}" for key, value in factors.items()) or "-"


def shared_settings(study: Study) -> str:
    """The settings that are equal in all methods, of those that matter most."""
    first, *others = [method.recipe for method in study.methods]
    shared = [key for key in _SHARED if all(recipe[key] == first[key] for recipe in others)]
    return "; ".join(f"{key}: {first[key]}" for key in shared) or f"none of {', '.join(_SHARED)}"


def claims(study: Study, tests: Sequence[TestSet]) -> Table | None:
    """The claims of the paper's abstract as rows; None where no run can say anything of them."""
    verdicts: dict[str, Callable[[Study, TestSet, Method], tuple[str, str]]] = {
        "MV-AT improves students of various sizes consistently": _against_alone,
        "MV-AT is better than output distillation": _against_output,
        "15.4x fewer parameters and 4.71x fewer FLOPs than the baseline at similar quality": _against_teacher,
    }
    rows = []
    for claim, verdict_of in verdicts.items():
        for test in tests:
            for method in _transferring(study):
                figures, verdict = verdict_of(study, test, method)
                rows.append([Cell(claim), Cell(verdict, f"{test.name}, {method.label}"), Cell(figures)])
    caption = (
        "Claims of arXiv 2208.10367 (abstract). Our figures are differences of PESQ-WB where it was scored, "
        "with 95 % intervals; ▲ clearly above 0, ▼ clearly below 0, no mark: neither."
    )
    return Table(caption, ["claim", "here", "our figures"], rows) if rows else None


def _transferring(study: Study) -> list[Method]:
    """The methods that the claims are about: attention transfer by itself, if any run has it so."""
    with_views = [method for method in study.methods if "mvat" in method.kind and not method.views_off]
    return [method for method in with_views if method.kind == "mvat"] or with_views


def _against_alone(study: Study, test: TestSet, method: Method) -> tuple[str, str]:
    return _against(study, test, method, alone(method, study.methods), "was trained alone")


def _against_output(study: Study, test: TestSet, method: Method) -> tuple[str, str]:
    reference = output_distillation(method, study.methods)
    return _against(study, test, method, reference, "learnt from the teacher's output alone")


def _against(
    study: Study, test: TestSet, method: Method, reference: Method | None, training: str
) -> tuple[str, str]:
    """The differences from `reference`, and the verdict on the claim; `training` says what is missing."""
    if reference is None:
        return "-", f"cannot be said: no student {training} under the same settings"
    differences = {
        student: difference
        for student in study.sizes
        if (difference := difference_between(test, student, method, reference)) is not None
    }
    if not differences:
        return "-", f"cannot be said: no student was scored under both this and {reference.label}"
    lines = [
        f"{student} {difference_text(difference, test.primary)}{_symbol(difference)}"
        for student, difference in differences.items()
    ]
    return "\n".join(lines), _verdict(differences)


def _verdict(differences: Mapping[str, Estimate]) -> str:
    """Whether differences, by student, support a claim: on their clips, and in all their seeds."""
    signs = [difference.sign for difference in differences.values()]
    better, worse, count = signs.count(1), signs.count(-1), len(signs)
    if count == 1:
        word = {1: "better", 0: "no clear difference", -1: "worse"}[signs[0]]
        verdict = f"{word} for the one student here"
    elif better == count:
        holds = "not shown" if _students_with_divided_seeds(differences) else "holds"
        verdict = f"{holds}: better for all {count} students"
    elif worse:
        verdict = f"does not hold: worse for {worse} of {count} students, better for {better}"
    else:
        verdict = f"not shown: better for {better} of {count} students, no clear difference for the others"
    return verdict + _seed_caveats(differences)


def _students_with_divided_seeds(differences: Mapping[str, Estimate], threshold: float = 0.0) -> list[str]:
    """The students some of whose seeds lie above `threshold`, and some below."""
    return [
        student
        for student, difference in differences.items()
        if difference.seeds and min(difference.seeds) < threshold < max(difference.seeds)
    ]


def _seed_caveats(differences: Mapping[str, Estimate], threshold: float = 0.0) -> str:
    """What must be added to a verdict on clips: with one seed it says nothing of other seeds."""
    text = ""
    for count, words in ((0, "no seed in common"), (1, "one seed")):
        students = [name for name, difference in differences.items() if len(difference.seeds) == count]
        if students:
            text += (
                f" ({words})" if len(students) == len(differences) else f" ({words}: {', '.join(students)})"
            )
    if divided := _students_with_divided_seeds(differences, threshold):
        text += f"; the seeds disagree: {', '.join(divided)}"
    return text


def _symbol(difference: Estimate) -> str:
    return f" {SYMBOLS[mark(difference)]}".rstrip()


def difference_between(
    test: TestSet, student: str, method: Method, reference: Method, metric: str | None = None
) -> Estimate | None:
    """How much higher `student` scores under `method` than under `reference`, by the primary metric if none
    is given."""
    ours, theirs = System(student, method.label), System(student, reference.label)
    return test.difference(ours, theirs, metric or test.primary)


def _against_teacher(study: Study, test: TestSet, method: Method) -> tuple[str, str]:
    """How much smaller than their teacher the students are, and how much worse; the cheapest similar one."""
    metric, lines, verdict = test.primary, [], ""
    teacher_labels = dict.fromkeys(run.teacher_label for run in method.runs)
    for teacher in [system for system in test.references if system.name in teacher_labels]:
        teacher_cost = study.teacher_cost(teacher.name)
        for student in study.sizes:
            difference = test.difference(System(student, method.label), teacher, metric)
            if difference is None or teacher_cost is None:
                continue
            cost = study.cost(student)
            smaller = (
                f"{teacher_cost.parameters / cost.parameters:.1f}x fewer parameters, "
                f"{teacher_cost.gmac / cost.gmac:.2f}x fewer FLOPs"
            )
            lines.append(f"{student}: {smaller}, {difference_text(difference, metric)}{_symbol(difference)}")
            low = difference.low
            if not verdict and metric == "pesq_wb" and low is not None and low > -SIMILAR:
                verdict = f"{student} is as good as its teacher to within {SIMILAR:g} MOS: {smaller}"
                verdict += _seed_caveats({student: difference}, -SIMILAR)
    if not lines:
        return "-", "cannot be said: no teacher was scored beside these students"
    return "\n".join(lines), verdict or f"no student is as good as its teacher to within {SIMILAR:g} MOS"


def scored_systems(study: Study, test: TestSet) -> list[tuple[str, Method]]:
    """Every student and method with scores on `test`."""
    return [
        (student, method)
        for student in study.sizes
        for method in study.methods
        if test.has(System(student, method.label))
    ]


def reference_table(test: TestSet) -> Table:
    """The noisy input, the teachers and the baselines, by every metric."""
    systems = [system for system in (System(NOISY), *test.references) if test.has(system)]
    rows = [
        [Cell(system.label), *(score_cell(test, system, metric) for metric in test.metrics)]
        for system in systems
    ]
    caption = "What there is to compare with: noisy input, teacher, baselines"
    return Table(caption, ["", *map(label, test.metrics)], rows)


def score_table(study: Study, test: TestSet, metric: str) -> Table:
    """Students by methods: a mean, and below it the difference from training alone."""
    scored = [m for m in study.methods if any(test.has(System(name, m.label)) for name in study.sizes)]
    rows = []
    for student in study.sizes:
        cells = [_score_and_difference(study, test, student, method, metric) for method in scored]
        if any(cell.text != "-" or cell.note for cell in cells):
            cost = study.cost(student)
            rows.append([Cell(student, f"{cost.parameters / 1e6:.2f} M, {cost.gmac:.2f} GMAC"), *cells])
    caption = (
        f"{label(metric)}, higher is better: mean and 95 % interval; below it the difference from training "
        "alone, ▲ or ▼ where it is clearly not 0"
    )
    return Table(caption, ["student", *(method.label for method in scored)], rows)


def _score_and_difference(study: Study, test: TestSet, student: str, method: Method, metric: str) -> Cell:
    system = System(student, method.label)
    cell = score_cell(test, system, metric)
    difference = _difference_from_alone(study, test, student, method, metric)
    notes = [difference_text(difference, metric) if difference else "", unscored(test, system, metric)]
    return Cell(cell.text, "; ".join(filter(None, notes)), mark(difference))


def _difference_from_alone(
    study: Study, test: TestSet, student: str, method: Method, metric: str
) -> Estimate | None:
    reference = alone(method, study.methods)
    if reference is None or reference is method:
        return None
    return difference_between(test, student, method, reference, metric)


def seed_table(study: Study, test: TestSet) -> Table:
    """The mean of every seed, and its difference from training alone."""
    metric = test.primary
    digits = METRICS[metric].decimals + 1
    rows = []
    for student, method in scored_systems(study, test):
        system = System(student, method.label)
        mean = test.estimate(system, metric)
        difference = _difference_from_alone(study, test, student, method, metric)
        cells = [
            system.label,
            ", ".join(map(str, test.seeds(system))),
            ", ".join(f"{value:.{digits}f}" for value in mean.seeds) if mean else "-",
            ", ".join(change_text(value, metric) for value in difference.seeds) if difference else "-",
        ]
        rows.append([Cell(text) for text in cells])
    caption = f"{label(metric)} of each seed alone, on the clips that all of them have a score for"
    return Table(caption, ["student, method", "seeds", "means", "differences, seeds that both have"], rows)


def gaps(study: Study, test: TestSet) -> list[str]:
    """A line for each method without a training alone to compare with, and each student without scores."""
    lines = []
    for method in study.methods:
        if method.kind == ALONE or alone(method, study.methods) is not None:
            continue
        differing = nearest_alone(method, study.methods)
        why = "there is none" if differing is None else f"the nearest differs in {', '.join(differing)}"
        lines.append(
            f"{method.label}: no training alone (--distil.method none) under the same settings, {why}."
        )
    scored = {student for student, _ in scored_systems(study, test)}
    return lines + [f"{name}: not evaluated on this test set." for name in study.sizes if name not in scored]


ViewLosses = dict[tuple[str, Method], Estimate]
"""By student and method without a view: the difference from the same method with all views."""


def view_losses(study: Study, test: TestSet) -> ViewLosses:
    """How much every student loses without a view."""
    losses: ViewLosses = {}
    for student in study.sizes:
        for method in study.methods:
            full = with_all_views(method, study.methods) if method.views_off else None
            difference = full and difference_between(test, student, method, full)
            if difference:
                losses[student, method] = difference
    return losses


def view_table(test: TestSet, losses: ViewLosses) -> Table:
    """Students by switched-off views."""
    methods = list(dict.fromkeys(method for _, method in losses))
    rows = [
        [Cell(student), *(difference_cell(losses.get((student, m)), test.primary) for m in methods)]
        for student in dict.fromkeys(student for student, _ in losses)
    ]
    caption = f"{label(test.primary)}: difference from all views and 95 % interval; ▼: the view helps"
    return Table(caption, ["student", *(method.label for method in methods)], rows)


def snr_table(study: Study, test: TestSet) -> Table:
    """The scores of every system by the SNR of the noisy input."""
    buckets = test.buckets()
    students = [System(name, method.label) for name, method in scored_systems(study, test)]
    rows = [
        [Cell(system.label), *(score_cell(test, system, test.primary, clips) for clips in buckets.values())]
        for system in (System(NOISY), *test.references, *students)
    ]
    heads = [f"{name}, {len(clips)} clips" for name, clips in buckets.items()]
    caption = f"{label(test.primary)} by the SNR of the noisy input: mean and 95 % interval"
    return Table(caption, ["network", *heads], rows)
