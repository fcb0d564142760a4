"""Which runs are one experiment with several seeds, what it is called, and whom it is compared with.

All of it comes from the configurations, nothing from the names of folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mvat_dist.config import parser
from mvat_dist.config.sizes import VIEWS
from mvat_dist.evaluation.report.runs import Run

ALONE = "none"
"""The method that trains a student without a teacher."""

_BETAS = tuple(f"distil.beta_{view}" for view in VIEWS)
# What of the distillation a method looks at; the rest may differ and changes nothing.
_HEEDED = {
    "none": (),
    "output": ("distil.output_weight", "distil.fade_by"),
    "mvat": ("distil.weight", "distil.fade_by", *_BETAS),
    "mvat+output": ("distil.weight", "distil.output_weight", "distil.fade_by", *_BETAS),
}
_ORDER = tuple(_HEEDED)
_INDIFFERENT = ("seed", "student", "sizes", "train.save_every")
"""Keys whose value makes no other method of a run."""


@dataclass(frozen=True, eq=False)
class Method:
    """Runs that differ in nothing but seed and students."""

    label: str
    """``mvat``, ``mvat without channel``; with settings where two would be called the same."""
    recipe: dict[str, Any]
    """The keys that make it what it is, flat."""
    runs: tuple[Run, ...]

    @property
    def kind(self) -> str:
        """``none``, ``output``, ``mvat`` or ``mvat+output``."""
        return str(self.recipe["distil.method"])

    @property
    def views_off(self) -> tuple[str, ...]:
        """Views whose factor is 0, where the method transfers attention."""
        return _views_off(self.recipe)


def group(runs: Iterable[Run]) -> list[Method]:
    """The methods of `runs`: training alone first, then in the order of the paper's comparison."""
    found: dict[str, list[Run]] = {}
    recipes: dict[str, dict[str, Any]] = {}
    for run in runs:
        recipe = _recipe(run)
        key = json.dumps(recipe, sort_keys=True)
        found.setdefault(key, []).append(run)
        recipes[key] = recipe
    keys = sorted(found, key=lambda key: (_rank(recipes[key]), key))
    labels = _labels([recipes[key] for key in keys])
    return [
        Method(label, recipes[key], tuple(sorted(found[key], key=lambda run: (run.config.seed, run.name))))
        for key, label in zip(keys, labels, strict=True)
    ]


def _recipe(run: Run) -> dict[str, Any]:
    flat = parser.science(run.config)
    method = flat["distil.method"]
    kept = {
        key: value
        for key, value in flat.items()
        if key not in _INDIFFERENT and not key.startswith(("distil.", "teacher."))
    }
    kept["distil.method"] = method
    kept |= {key: flat[key] for key in _HEEDED[method]}
    if method != ALONE:
        kept["teacher"] = (run.teacher or {}).get("sha256") or flat["teacher.file"]
        kept["teacher.source"] = flat["teacher.source"]
    if began := run.inputs.get("init"):
        kept["train.init"] = "+".join(sorted({one["sha256"] for one in began.values()}))
    return kept


def _views_off(recipe: dict[str, Any]) -> tuple[str, ...]:
    return tuple(view for view in VIEWS if recipe.get(f"distil.beta_{view}") == 0)


def _rank(recipe: dict[str, Any]) -> tuple[int, int]:
    # Methods with all their views come before those that lack some.
    off = len(_views_off(recipe))
    return (_ORDER.index(recipe["distil.method"]) + (len(_ORDER) if off else 0), off)


def _labels(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each, with the settings in which it differs from others of the same name."""
    short = [_short(recipe) for recipe in recipes]
    labels = []
    for recipe, name in zip(recipes, short, strict=True):
        others = [other for other, its in zip(recipes, short, strict=True) if its == name]
        differing = sorted({key for other in others for key in differences(recipe, other)})
        settings = ", ".join(f"{key} {_shown(recipe.get(key))}" for key in differing)
        labels.append(f"{name} ({settings})" if settings else name)
    return labels


def _short(recipe: dict[str, Any]) -> str:
    off = _views_off(recipe)
    return str(recipe["distil.method"]) + (f" without {' and '.join(off)}" if off else "")


def _shown(value: Any) -> str:
    # A teacher's fingerprint: the start of it is enough.
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys in which two recipes differ."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _common(recipe: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal for two methods to be compared: all but how they distil."""
    return {key: value for key, value in recipe.items() if not key.startswith(("distil.", "teacher"))}


def alone(method: Method, methods: Iterable[Method]) -> Method | None:
    """Training alone with the same data, steps and optimiser as `method`."""
    return next((m for m in methods if m.kind == ALONE and _common(m.recipe) == _common(method.recipe)), None)


def nearest_alone(method: Method, methods: Iterable[Method]) -> tuple[Method, list[str]] | None:
    """The run alone that differs least from `method` in what should be equal, and the keys that differ."""
    found = [(m, differences(_common(m.recipe), _common(method.recipe))) for m in methods if m.kind == ALONE]
    return min(found, key=lambda pair: len(pair[1]), default=None)


def output_distillation(method: Method, methods: Iterable[Method]) -> Method | None:
    """Output distillation by the same teacher under the same conditions as `method`."""
    return next(
        (
            m
            for m in methods
            if m.kind == "output"
            and _common(m.recipe) == _common(method.recipe)
            and m.recipe["teacher"] == method.recipe.get("teacher")
        ),
        None,
    )


def with_all_views(method: Method, methods: Iterable[Method]) -> Method | None:
    """What `method` would be with the views that it lacks."""
    off = {f"distil.beta_{view}" for view in method.views_off}
    return next((m for m in methods if set(differences(m.recipe, method.recipe)) == off), None)
