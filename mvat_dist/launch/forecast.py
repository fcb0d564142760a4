"""The fastest placement of a fleet's students on so many processes, and what ends its growth. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate

from mvat_dist.config import sizes
from mvat_dist.config.schema import SAMPLE_RATE, Config
from mvat_dist.config.sizes import Size
from mvat_dist.launch import cost_model
from mvat_dist.launch.cost_model import Machine, Step, Work
from mvat_dist.launch.placement import Part, Placement, in_words
from mvat_dist.models import metadata
from mvat_dist.runs import weights

_WORTH_IT = 0.9
"""A placement has to be this much faster than `together`, which is simpler."""


@dataclass(frozen=True)
class Option:
    """One way to place the students."""

    placement: Placement
    parts: tuple[Part, ...]
    """The groups; one for `together`."""
    step: Step
    """Of the slowest group."""
    hours: float
    """Until all students are trained. Jobs are reckoned one after the other: each takes all nodes."""
    memory: float
    """Bytes of a process at its peak."""
    why_not: str | None
    """Why it cannot be; None where it can."""


@dataclass(frozen=True)
class Fleet:
    """What a forecast is about."""

    config: Config
    teacher: Size | None
    """Of the teacher; None where there is none."""
    shards: int
    machine: Machine

    def work(self, part: Part | None = None) -> Work:
        """Of all students, or of a group."""
        return Work.of(self.config, self.teacher, self.shards, part.students if part else None)

    def option(self, placement: Placement, parts: Sequence[Part], processes: int, per_node: int) -> Option:
        """What a placement would cost."""
        share = max(1, processes // len(parts)) if placement == "split" else processes
        counts = [part.processes or share for part in parts]
        works = [self.work(part) for part in parts]
        steps = [
            cost_model.step(work, self.machine, count, per_node)
            for work, count in zip(works, counts, strict=True)
        ]
        reasons = [cost_model.impossible(work, count) for work, count in zip(works, counts, strict=True)]
        if placement == "split" and sum(counts) != processes:
            reasons.insert(0, f"{processes} processes are not shared by {len(parts)} groups")
        seconds = [step.seconds for step in steps]
        return Option(
            placement,
            tuple(parts),
            max(steps, key=lambda one: one.seconds),
            (sum(seconds) if placement == "jobs" else max(seconds)) * self.config.train.steps / 3600,
            max(
                cost_model.memory(work, self.machine, count)
                for work, count in zip(works, counts, strict=True)
            ),
            next((reason for reason in reasons if reason), None),
        )

    def options(self, processes: int, per_node: int, groups: Sequence[Part] = ()) -> list[Option]:
        """The best of each placement; `groups`, where given, are the only way to divide the students."""
        names = tuple(sizes.select(self.config.student, self.config.sizes))
        found = [self.option("together", [Part(names)], processes, per_node)]
        if len(names) == 1:
            return found
        divisions = [tuple(groups)] if groups else list(self._divisions(names, processes))
        splits = [self.option("split", parts, processes, per_node) for parts in divisions]
        if splits:
            found.append(best(splits) or splits[0])
        apart = groups or [Part((name,)) for name in names]
        alone = [replace(part, processes=None) for part in apart]
        return [*found, self.option("jobs", alone, processes, per_node)]

    def _divisions(self, names: Sequence[str], processes: int) -> Iterator[tuple[Part, ...]]:
        """Students in every number of groups that share the processes equally, the groups alike in cost.

        The costliest goes first, to the group that has least so far (Graham, 1969).
        """
        samples = round(self.config.data.segment_seconds * SAMPLE_RATE)
        cost = {
            name: self.machine.learning.seconds(sizes.get(name, self.config.sizes), samples) for name in names
        }
        for count in range(2, len(names) + 1):
            if processes % count:
                continue
            groups: list[list[str]] = [[] for _ in range(count)]
            for name in sorted(names, key=lambda one: -cost[one]):
                min(groups, key=lambda group: sum(cost[one] for one in group)).append(name)
            yield tuple(Part(tuple(group)) for group in groups)


def best(options: Sequence[Option]) -> Option | None:
    """The fastest that is possible; `together` unless another is faster beyond the forecast's error."""
    possible = [option for option in options if not option.why_not]
    if not possible:
        return None
    fastest = min(possible, key=lambda one: one.hours)
    together = next((one for one in possible if one.placement == "together"), fastest)
    return fastest if fastest.hours < _WORTH_IT * together.hours else together


def table(options: Sequence[Option]) -> str:
    """One line per placement. Lower is better in all columns."""
    rows = [
        {
            "placement": option.placement,
            "step s": f"{option.step.seconds:.3g}",
            "hours": f"{option.hours:.3g}",
            "GB a process": f"{option.memory / 1e9:.1f}",
            "computing": f"{100 * option.step.computing / option.step.seconds:.0f} %",
            "": option.why_not
            or (f"--parts {in_words(option.parts)}" if option.placement == "split" else "")
            or f"then most: {option.step.largest_burden()}",
        }
        for option in options
    ]
    return tabulate(rows, headers="keys", disable_numparse=True, tablefmt="plain")


def breaking_point(work: Work, machine: Machine, per_node: int, most: int = 4096) -> tuple[int, str]:
    """(nodes, why) at which adding nodes first stops helping; `most` where nothing has stopped it before.

    Nodes are doubled until training is impossible, or until more than half of a step is not computing.
    """
    for nodes in itertools.takewhile(lambda n: n <= most, (2**power for power in itertools.count())):
        if reason := cost_model.impossible(work, nodes * per_node):
            return nodes, reason
        found = cost_model.step(work, machine, nodes * per_node, per_node)
        if found.computing < found.seconds / 2:
            return nodes, found.largest_burden()
    return most, "nothing yet"


def teacher_size(config: Config) -> Size | None:
    """The teacher's architecture, by its file's header or the cache's; `manner-b` where that does not say.

    Raises:
        UserError: it is none that a run could learn from.
    """
    if config.distil.method == "none":
        return None
    if config.teacher.source == "cache":
        from mvat_dist.data.shards.targets import read_header

        return Size(**read_header(Path(config.teacher.cache))["teacher"]["size"])
    said = metadata.read(weights.resolve(Path(config.teacher.file)))
    return said.size if said else sizes.SIZES["manner-b"]
