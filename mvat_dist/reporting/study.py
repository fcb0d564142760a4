"""The runs of a report, put in order: students by cost, methods, test sets, and what a network costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mvat_dist import students
from mvat_dist.config import SAMPLE_RATE
from mvat_dist.metrics import METRICS
from mvat_dist.reporting import methods as grouping
from mvat_dist.reporting import results
from mvat_dist.reporting.methods import Method
from mvat_dist.reporting.results import Estimate, TestSet, Who
from mvat_dist.reporting.runs import Run, number
from mvat_dist.students import Size

COST_SECONDS = 4.0
"""Length of the clip on which multiply-accumulates are counted, as in ``scores.json``."""


@dataclass(frozen=True)
class Cost:
    """What a network costs to run. Lower is better in all of it."""

    parameters: float
    gmac: float
    """10^9 multiply-accumulates for a clip of `COST_SECONDS`."""
    real_time_factor: float | None
    """Median over the evaluations; None where none measured it."""


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
        for network in _networks(runs, results.TEACHER):
            parameters, gmac = number(network.get("parameters")), number(network.get("gmac_at_4_s"))
            if parameters and gmac:
                return Cost(parameters, gmac, self._real_time_factor(results.TEACHER, runs))
        return None

    @property
    def machines(self) -> list[str]:
        """On which the real-time factors were measured."""
        records = (evaluation.record for run in self.runs for evaluation in run.evaluations)
        return sorted({str(record["machine"]) for record in records if record.get("machine")})

    def _real_time_factor(self, network: str, runs: Iterable[Run]) -> float | None:
        measured = [number(one.get("real_time_factor")) for one in _networks(runs, network)]
        known = [value for value in measured if value]
        return statistics.median(known) if known else None


def _networks(runs: Iterable[Run], name: str) -> list[dict[str, object]]:
    """What the evaluations of `runs` say of a network."""
    found = []
    for run in runs:
        for evaluation in run.evaluations:
            networks = evaluation.record.get("networks")
            network = networks.get(name) if isinstance(networks, dict) else None
            if isinstance(network, dict):
                found.append(network)
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
    text = f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(estimate: Estimate, metric: str) -> str:
    """A difference, with one more digit than a score: ``+0.083 [+0.031, +0.135]``."""
    return (
        f"{change(estimate.mean, metric)} [{change(estimate.low, metric)}, {change(estimate.high, metric)}]"
    )


def change(value: float, metric: str) -> str:
    """``+0.083``, ``−0.004``."""
    return f"{value:+.{METRICS[metric].decimals + 1}f}".replace("-", "\N{MINUS SIGN}")
