"""Students of a run that are trained apart: in groups, each a world of processes with a folder of its own.

`together` is one group. `split` deals the processes of one job to the groups, `jobs` gives each group a job.
Either way a group's part of the run is an ordinary run, ``RUN/parts/A+B``, with its own lock, record and
checkpoints: it stops, comes back and ends by itself. Seeds, order of the data and global batch are the run's,
so students come out as they would have together.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mvat_dist.config import sizes
from mvat_dist.config.schema import Config
from mvat_dist.distributed import ranks
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError
from mvat_dist.runs.folder import RunDir, run_folder

Placement = Literal["together", "split", "jobs"]
JOINT = "+"
"""Between the students in the name of a part."""


@dataclass(frozen=True)
class Part:
    """Students that share their processes, their batches and their teacher."""

    students: tuple[str, ...]
    processes: int | None = None
    """Of the job's; None for an equal share."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return JOINT.join(self.students)


def parse(config: Config) -> list[Part]:
    """The groups of ``--parts``: ``a,b:3/c:1`` is a and b on three processes, c on one; empty without groups.

    Raises:
        UserError: a student is missing or named twice, is none of the run's, or cannot name a folder.
    """
    if not config.parts:
        return []
    parts = []
    for text in config.parts.split("/"):
        names, _, count = text.rpartition(":") if text.rpartition(":")[2].isdecimal() else (text, "", "")
        group = tuple(name.strip() for name in names.split(","))
        parts.append(Part(group, int(count) if count else None))
    wanted = sizes.select(config.student, config.sizes)
    named = [name for part in parts for name in part.students]
    if sorted(named) != sorted(wanted):
        raise UserError(
            f"--parts {config.parts!r} must name every student of --student {config.student!r} once: "
            "groups are separated by /, students by commas, as in a,b/c"
        )
    if len({part.processes is None for part in parts}) > 1 or any(part.processes == 0 for part in parts):
        raise UserError(f"--parts {config.parts!r}: give every group its processes, a,b:3/c:1, or none")
    if odd := [name for name in named if JOINT in name or Path(name).name != name]:
        raise UserError(f"a student called {odd[0]!r} cannot be trained apart: its name is no folder's")
    return parts


def in_words(parts: Sequence[Part]) -> str:
    """The text of ``--parts`` for these groups."""
    return "/".join(
        ",".join(part.students) + (f":{part.processes}" if part.processes else "") for part in parts
    )


def config_of(part: Part, config: Config) -> Config:
    """The configuration of a part as the run that it is."""
    whole = RunDir(run_folder(config))
    return dataclasses.replace(
        config, student=",".join(part.students), runs=str(whole.parts), name=part.name, parts=""
    )


def processes(parts: Sequence[Part], world_size: int) -> list[int]:
    """Processes of every part in a world of so many.

    Raises:
        UserError: they do not come out even.
    """
    if parts[0].processes is None:
        if world_size % len(parts):
            raise UserError(
                f"{world_size} processes are not shared equally by {len(parts)} groups: say what each gets, "
                "--parts a,b:3/c:1, or take a number of processes that they divide"
            )
        return [world_size // len(parts)] * len(parts)
    counts = [part.processes or 0 for part in parts]
    if sum(counts) != world_size:
        raise UserError(f"--parts gives its groups {sum(counts)} processes, and there are {world_size}")
    return counts


def mine(config: Config, here: Ranks, environ: Mapping[str, str] = os.environ) -> tuple[Config, Ranks]:
    """The run that this process belongs to and its place there: its part, or the whole where there are none.

    Raises:
        UserError: the groups cannot share the processes, or the run is there already and divided otherwise.
    """
    check(config)
    parts = parse(config)
    if not parts:
        return config, here
    counts = processes(parts, here.world_size)
    first = 0
    for number, count in enumerate(counts):
        if here.rank < first + count:
            return config_of(parts[number], config), ranks.part(here, first, count, number, environ)
        first += count
    raise AssertionError("the counts add up to the world's size")


def explain(config: Config) -> None:
    """Write the configuration of a divided run where every run has it: evaluate and report look there."""
    RunDir(run_folder(config)).create(config)


def divided(run: RunDir) -> list[Part]:
    """The groups whose folders lie in a run's."""
    return [Part(tuple(folder.name.split(JOINT))) for folder in run.part_folders()]


def check(config: Config) -> None:
    """Refuse to divide a run otherwise than it is divided already.

    Raises:
        UserError: with how it is divided.
    """
    run = RunDir(run_folder(config))
    before = {part.name for part in divided(run)}
    now = {part.name for part in parse(config)}
    if before and not before <= now:
        raise UserError(
            f"{run.path} trains its students apart ({in_words(divided(run))}): start it with these --parts, "
            "through submit with --placement split or jobs, or choose another --name"
        )
    if now and run.checkpoints.exists():
        raise UserError(
            f"{run.path} trains its students together: choose --placement together, or another --name"
        )
