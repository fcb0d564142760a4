"""The runs of a report, put in order: students by cost, methods, test sets, and what a network costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from mvat_dist.config import sizes as students
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.config.sizes import Size
from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.report import methods as grouping
from mvat_dist.evaluation.report import results
from mvat_dist.evaluation.report.methods import Method
from mvat_dist.evaluation.report.results import Estimate, TestSet, Who
from mvat_dist.evaluation.report.runs import Run, number

COST_SECONDS = 4.0
"""Length of the clip on which multiply-accumulates are counted, as in ``scores.json``."""


@dataclass(frozen=True)
class Cost:
    """What a network costs to run. Lower is better in all of it."""

    parameters: float
    gmac: float
    """10^9 multiply-accumulates for a clip of `COST_SECONDS`."""
    real_time_factor: float | None
    """Median over the evaluations on the first of `Study.machines`; None where none measured it there."""


@dataclass(frozen=True)
class Study:
    """Everything that the sections of a report are written from."""

    runs: list[Run]
    sizes: dict[str, Size]
    """The students, the cheapest first."""
    methods: list[Method]
    tests: list[TestSet]
    problems: list[str]

    @classmethod
    def of(cls, runs: Sequence[Run], problems: list[str]) -> Study:
        """Put `runs` in order; what cannot be compared is added to `problems`."""
        sizes: dict[str, Size] = {}
        kept = []
        for run in runs:
            resized = [name for name, size in run.sizes.items() if sizes.get(name, size) != size]
            if resized:
                problems.append(
                    f"{run.path} is left out: its {', '.join(resized)} is of another size than that of the "
                    "runs before it"
                )
            else:
                sizes |= run.sizes
                kept.append(run)
        ordered = dict(sorted(sizes.items(), key=lambda item: (_macs(item[1]), item[0])))
        methods = grouping.group(kept)
        return cls(kept, ordered, methods, results.collect(methods, problems), problems)

    @property
    def main(self) -> list[tuple[int, Method]]:
        """The methods that plots compare, numbered as in `methods`: those with all views, if any."""
        numbered = list(enumerate(self.methods))
        return [(number, one) for number, one in numbered if not one.views_off] or numbered

    def scored(self, test: TestSet) -> list[tuple[str, Method]]:
        """Every student and method with scores on `test`."""
        return [
            (name, method)
            for name in self.sizes
            for method in self.methods
            if test.has(Who(name, method.label))
        ]

    def cost(self, student: str) -> Cost:
        """What `student` costs."""
        size = self.sizes[student]
        return Cost(students.parameters(size), _macs(size) / 1e9, self._real_time_factor(student, self.runs))

    def teachers_of(self, method: Method, test: TestSet) -> list[Who]:
        """The teachers of a method's runs that have scores on `test`."""
        names = dict.fromkeys(results.teacher_name(run.teacher) for run in method.runs)
        whos = [Who(name, results.REFERENCE) for name in names]
        return [who for who in whos if test.has(who)]

    def teacher_cost(self, teacher: Who) -> Cost | None:
        """What a teacher costs; None where no evaluation says so."""
        runs = [run for run in self.runs if results.teacher_name(run.teacher) == teacher.name]
        for _, network in _networks(runs, results.TEACHER):
            parameters, gmac = number(network.get("parameters")), number(network.get("gmac_at_4_s"))
            if parameters and gmac:
                return Cost(parameters, gmac, self._real_time_factor(results.TEACHER, runs))
        return None

    @cached_property
    def machines(self) -> list[str]:
        """On which real-time factors were measured, that of the most networks first.

        Factors of different machines do not compare, so those of the first one alone count.
        """
        timed: dict[str, set[str]] = {}
        for run in self.runs:
            names = {*run.sizes, results.TEACHER}
            for name in names:
                own = results.teacher_name(run.teacher) if name == results.TEACHER else name
                for machine in _real_time_factors([run], name):
                    timed.setdefault(machine, set()).add(own)
        return sorted(timed, key=lambda machine: (-len(timed[machine]), machine))

    def _real_time_factor(self, network: str, runs: Iterable[Run]) -> float | None:
        known = _real_time_factors(runs, network).get(self.machines[0]) if self.machines else None
        return statistics.median(known) if known else None


def _real_time_factors(runs: Iterable[Run], name: str) -> dict[str, list[float]]:
    """Those of a network, by the machine that they were measured on."""
    found: dict[str, list[float]] = {}
    for machine, network in _networks(runs, name):
        if factor := number(network.get("real_time_factor")):
            found.setdefault(machine, []).append(factor)
    return found


def _networks(runs: Iterable[Run], name: str) -> list[tuple[str, dict[str, object]]]:
    """What the evaluations of `runs` say of a network, and on which machine."""
    found = []
    for run in runs:
        for evaluation in run.evaluations:
            networks = evaluation.record.get("networks")
            network = networks.get(name) if isinstance(networks, dict) else None
            if isinstance(network, dict):
                found.append((str(evaluation.record.get("machine") or "an unknown machine"), network))
    return found


def _macs(size: Size) -> int:
    return students.macs(size, round(COST_SECONDS * SAMPLE_RATE))


def label(metric: str) -> str:
    """``PESQ-WB (MOS) ↑``."""
    known = METRICS[metric]
    return known.label + (f" ({known.unit})" if known.unit else "") + " ↑"


def shown(estimate: Estimate | None, metric: str) -> str:
    """``2.31 [2.25, 2.37]``."""
    if estimate is None:
        return "-"
    digits = METRICS[metric].decimals
    text = f"{estimate.mean:.{digits}f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(estimate: Estimate, metric: str) -> str:
    """A difference, with one more digit than a score: ``+0.083 [+0.031, +0.135]``."""
    text = change(estimate.mean, metric)
    if estimate.low is not None and estimate.high is not None:
        text += f" [{change(estimate.low, metric)}, {change(estimate.high, metric)}]"
    return text


def change(value: float, metric: str) -> str:
    """``+0.083``, ``−0.004``."""
    return f"{value:+.{METRICS[metric].decimals + 1}f}".replace("-", "\N{MINUS SIGN}")
