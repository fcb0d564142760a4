"""Group runs into methods and students: which runs are one experiment, and which experiments compare.

All of it comes from the configurations, nothing from the names of folders.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mvat_dist.config import parser, sizes
from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.config.sizes import COST_SECONDS, VIEWS, Size
from mvat_dist.evaluation.report.load import Network, Run

ALONE = "none"
"""The method that trains a student without a teacher."""

TEACHER = "teacher"
"""The teacher's name in the rows of `mvat_dist.evaluate`."""

_BETAS = tuple(f"distil.beta_{view}" for view in VIEWS)
# The settings of the distillation that a method uses; a difference in the others changes nothing.
_USED = {
    "none": (),
    "output": ("distil.output_weight", "distil.fade_by"),
    "mvat": ("distil.weight", "distil.fade_by", *_BETAS),
    "mvat+output": ("distil.weight", "distil.output_weight", "distil.fade_by", *_BETAS),
}
_IN_ORDER = tuple(_USED)
_IRRELEVANT = ("seed", "student", "sizes", "train.save_every")
"""Keys in which runs of one method may differ."""

Recipe = dict[str, Any]
"""The settings that make a method what it is, by flat key."""


@dataclass(frozen=True, eq=False)
class Method:
    """Runs that differ in nothing but seed and students."""

    label: str
    """``mvat``, ``mvat without channel``; with settings where two methods would have the same label."""
    recipe: Recipe
    runs: tuple[Run, ...]
    """By seed."""

    @property
    def kind(self) -> str:
        """``none``, ``output``, ``mvat`` or ``mvat+output``."""
        return str(self.recipe["distil.method"])

    @property
    def views_off(self) -> tuple[str, ...]:
        """Views whose factor is 0, where the method transfers attention."""
        return _views_off(self.recipe)

    @property
    def seeds(self) -> list[int]:
        return sorted({run.config.seed for run in self.runs})


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
    """The runs of a report, in order: students by cost, and methods."""

    runs: list[Run]
    sizes: dict[str, Size]
    """The students, the cheapest first."""
    methods: list[Method]
    """Training alone first, then in the order of the paper's comparison."""

    @classmethod
    def of(cls, runs: Sequence[Run], problems: list[str]) -> Study:
        """Put `runs` in order; a run that cannot be compared with those before it is added to `problems`."""
        known: dict[str, Size] = {}
        kept = []
        for run in runs:
            resized = [name for name, size in run.sizes.items() if known.get(name, size) != size]
            if resized:
                problems.append(
                    f"{run.folder.path} is left out: its {', '.join(resized)} is of another size than that "
                    "of the runs before it"
                )
            else:
                known |= run.sizes
                kept.append(run)
        ordered = dict(sorted(known.items(), key=lambda item: (_macs(item[1]), item[0])))
        return cls(kept, ordered, methods_of(kept))

    @property
    def main(self) -> list[tuple[int, Method]]:
        """The methods that plots compare, numbered as in `methods`: those with all views, if any."""
        numbered = list(enumerate(self.methods))
        return [(number, method) for number, method in numbered if not method.views_off] or numbered

    def cost(self, student: str) -> Cost:
        """What `student` costs."""
        size = self.sizes[student]
        return Cost(sizes.parameters(size), _macs(size) / 1e9, self._real_time_factor(student, self.runs))

    def teacher_cost(self, label: str) -> Cost | None:
        """What the teacher of this label costs; None where no evaluation says so."""
        runs = [run for run in self.runs if run.teacher_label == label]
        for _, network in _networks(runs, TEACHER):
            if network.parameters and network.gmac_at_4_s:
                factor = self._real_time_factor(TEACHER, runs)
                return Cost(network.parameters, network.gmac_at_4_s, factor)
        return None

    @cached_property
    def machines(self) -> list[str]:
        """The machines on which real-time factors were measured, that of the most networks first.

        Factors of different machines do not compare, so only those of the first machine count.
        """
        timed: dict[str, set[str]] = {}
        for run in self.runs:
            for name in (*run.sizes, TEACHER):
                label = run.teacher_label if name == TEACHER else name
                for machine, network in _networks([run], name):
                    if network.real_time_factor:
                        timed.setdefault(machine, set()).add(label)
        return sorted(timed, key=lambda machine: (-len(timed[machine]), machine))

    def _real_time_factor(self, name: str, runs: Iterable[Run]) -> float | None:
        factors = [
            network.real_time_factor
            for machine, network in _networks(runs, name)
            if network.real_time_factor and machine == self.machines[0]
        ]
        return statistics.median(factors) if factors else None


def _networks(runs: Iterable[Run], name: str) -> Iterator[tuple[str, Network]]:
    """What the evaluations of `runs` say of a network, each with the machine that measured it."""
    for run in runs:
        for evaluation in run.evaluations:
            if network := evaluation.record.networks.get(name):
                yield evaluation.record.machine, network


def _macs(size: Size) -> int:
    return sizes.macs(size, round(COST_SECONDS * SAMPLE_RATE))


def methods_of(runs: Iterable[Run]) -> list[Method]:
    """The methods of `runs`, in the order of `Study.methods`."""
    by_recipe: dict[str, tuple[Recipe, list[Run]]] = {}
    for run in runs:
        recipe = _recipe(run)
        by_recipe.setdefault(json.dumps(recipe, sort_keys=True), (recipe, []))[1].append(run)
    ordered = sorted(by_recipe.items(), key=lambda item: (_rank(item[1][0]), item[0]))
    labels = _labels([recipe for _, (recipe, _) in ordered])
    return [
        Method(label, recipe, tuple(sorted(group, key=lambda run: (run.config.seed, run.name))))
        for (_, (recipe, group)), label in zip(ordered, labels, strict=True)
    ]


def _recipe(run: Run) -> Recipe:
    settings = parser.science(run.config)
    method = settings["distil.method"]
    recipe = {
        key: value
        for key, value in settings.items()
        if key not in _IRRELEVANT and not key.startswith(("distil.", "teacher."))
    }
    recipe["distil.method"] = method
    recipe |= {key: settings[key] for key in _USED[method]}
    if method != ALONE:
        teacher = run.inputs.teacher
        recipe["teacher"] = (teacher and teacher.sha256) or settings["teacher.file"]
        recipe["teacher.source"] = settings["teacher.source"]
    if run.inputs.init:  # by what the weights are, not by where they lay
        recipe["train.init"] = "+".join(sorted({weights.sha256 for weights in run.inputs.init.values()}))
    return recipe


def _views_off(recipe: Recipe) -> tuple[str, ...]:
    return tuple(view for view in VIEWS if recipe.get(f"distil.beta_{view}") == 0)


def _rank(recipe: Recipe) -> tuple[int, int]:
    # Methods with all their views come before those that lack some.
    off = len(_views_off(recipe))
    return (_IN_ORDER.index(recipe["distil.method"]) + (len(_IN_ORDER) if off else 0), off)


def _labels(recipes: Sequence[Recipe]) -> list[str]:
    """A label for each, with the settings in which it differs from others of the same name."""
    names = [
        recipe["distil.method"] + (f" without {' and '.join(off)}" if (off := _views_off(recipe)) else "")
        for recipe in recipes
    ]
    labels = []
    for recipe, name in zip(recipes, names, strict=True):
        namesakes = [other for other, other_name in zip(recipes, names, strict=True) if other_name == name]
        differing = sorted({key for other in namesakes for key in _differences(recipe, other)})
        settings = ", ".join(f"{key} {_shortened(recipe.get(key))}" for key in differing)
        labels.append(f"{name} ({settings})" if settings else name)
    return labels


def _shortened(value: Any) -> str:
    # The start of a fingerprint is enough.
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


def _differences(first: Recipe, second: Recipe) -> list[str]:
    """The keys in which two recipes differ."""
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _conditions(recipe: Recipe) -> Recipe:
    """The settings that two methods must share to be compared: all but how they distil."""
    return {key: value for key, value in recipe.items() if not key.startswith(("distil.", "teacher"))}


def alone(method: Method, methods: Iterable[Method]) -> Method | None:
    """Training alone with the same data, steps and optimiser as `method`."""
    conditions = _conditions(method.recipe)
    return next((m for m in methods if m.kind == ALONE and _conditions(m.recipe) == conditions), None)


def nearest_alone(method: Method, methods: Iterable[Method]) -> list[str] | None:
    """The keys that keep the most similar training alone apart from `method`; None without any."""
    conditions = _conditions(method.recipe)
    differing = [_differences(_conditions(m.recipe), conditions) for m in methods if m.kind == ALONE]
    return min(differing, key=len, default=None)


def output_distillation(method: Method, methods: Iterable[Method]) -> Method | None:
    """Output distillation by the same teacher under the same conditions as `method`."""
    conditions, teacher = _conditions(method.recipe), method.recipe.get("teacher")
    return next(
        (
            m
            for m in methods
            if m.kind == "output" and _conditions(m.recipe) == conditions and m.recipe["teacher"] == teacher
        ),
        None,
    )


def with_all_views(method: Method, methods: Iterable[Method]) -> Method | None:
    """The method that differs from `method` only in having the views that it lacks."""
    off = {f"distil.beta_{view}" for view in method.views_off}
    return next((m for m in methods if set(_differences(m.recipe, method.recipe)) == off), None)
