"""One evaluation: its rows, scored by one or several processes in one or several goes, and its tables.

    OUT/rows-FINGERPRINT/00000.jsonl ...        one file per rank, a row a line, while it is under way
    OUT/rows-FINGERPRINT/costs.json             what the networks cost to run, measured once
    OUT/rows.jsonl, scores.csv, scores.md       all rows in order, and the tables, once it is complete
    OUT/scores.json                             written last: a `Scores`

The fingerprint is that of everything that decides a score. Rows of other weights, clips or metrics lie
in a folder of another name, so none is ever taken for one of these.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from mvat_dist.data.test_sets import TestSets
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError
from mvat_dist.evaluation import table
from mvat_dist.evaluation.metrics import dnsmos
from mvat_dist.evaluation.metrics.registry import GROUPS, METRICS
from mvat_dist.evaluation.real_time_factor import Cost, cost
from mvat_dist.evaluation.score_record import SCORES, Inputs, Network, Request, Scores
from mvat_dist.evaluation.statistics import NOISY, Row
from mvat_dist.evaluation.systems import System
from mvat_dist.evaluation.table import Section
from mvat_dist.evaluation.validate import rows_as_completed
from mvat_dist.io import make_folder, only_writer, read_record, sha256, write_json, write_record, write_text
from mvat_dist.runs import records

_TABLES = ("rows.jsonl", "scores.csv", "scores.md")
"""Files that ``scores.json`` belongs to: it is there only while all of them are complete."""
_PACKAGES = ("mvat_dist", "torch", "numpy", "pesq", "pystoi")
_NAME_DIGITS = 16
"""Of the fingerprint, in the name of the folder of rows."""

Place = tuple[str, int, str]
"""Subset, index and model: what a row is about."""


@dataclass(frozen=True)
class Evaluation:
    """What is scored on what, and where its rows and tables go."""

    systems: Mapping[str, System]
    sets: TestSets
    metrics: tuple[str, ...]
    reference: str | None
    """What the systems are compared with: one of them, or the noisy input."""
    device: torch.device
    out: Path
    request: Request

    @cached_property
    def inputs(self) -> Inputs:
        dnsmos_weights = dnsmos.weights_file() if set(self.metrics) & set(GROUPS["dnsmos"]) else None
        packages = {name: metadata.version(name) for name in _PACKAGES}
        return Inputs(
            networks={name: system.fingerprint for name, system in self.systems.items()},
            clips={name: clips.fingerprint for name, clips in self.sets.items()},
            metrics=list(self.metrics),
            packages=packages | ({"dnsmos": sha256(dnsmos_weights)} if dnsmos_weights else {}),
            device=self.device.type,
        )

    @cached_property
    def fingerprint(self) -> str:
        return self.inputs.fingerprint

    @cached_property
    def places(self) -> list[Place]:
        """What every row is about, in the order of ``rows.jsonl``."""
        return [
            (subset, index, model)
            for subset, clips in self.sets.items()
            for index in range(len(clips))
            for model in (NOISY, *self.systems)
        ]

    @property
    def rows_folder(self) -> Path:
        """The rows while the evaluation is under way."""
        return self.out / f"rows-{self.fingerprint[:_NAME_DIGITS]}"

    @property
    def costs_file(self) -> Path:
        return self.rows_folder / "costs.json"

    def is_finished(self) -> bool:
        """Whether the tables in `out` are those of this evaluation, and all there."""
        scores = self._scores()
        complete = all((self.out / name).is_file() for name in _TABLES)
        return complete and scores is not None and scores.reference == self.reference

    def known_rows(self) -> dict[Place, Row]:
        """The rows that are scored already, by what they are about: finished, or under way."""
        files = sorted(self.rows_folder.glob("*.jsonl"))
        finished = self.out / "rows.jsonl"
        if finished.is_file() and self._scores():
            files.insert(0, finished)
        rows = [row for file in files for row in _complete_rows(file)]
        return {(row["subset"], row["index"], row["model"]): row for row in rows}

    def _scores(self) -> Scores | None:
        """``scores.json``, where it is of the same inputs."""
        try:
            scores = read_record(self.out / SCORES, Scores)
        except (OSError, UserError):
            return None
        return scores if scores.fingerprint == self.fingerprint else None

    def note_what_is_replaced(self) -> None:
        """Say on standard error that `out` holds the tables of another evaluation."""
        if not (self.out / SCORES).is_file():
            return
        try:
            scores = read_record(self.out / SCORES, Scores)
        except UserError as error:
            print(f"note: {error}; it is replaced when this evaluation is complete", file=sys.stderr)
            return
        theirs, ours = asdict(scores.inputs), asdict(self.inputs)
        if changed := [key for key in ours if theirs[key] != ours[key]]:
            print(
                f"note: {self.out} holds scores of another evaluation (other {', '.join(changed)}); they are "
                "replaced when this one is complete",
                file=sys.stderr,
            )


def run(evaluation: Evaluation, ranks: Ranks, processes: int) -> int:
    """Score this rank's clips, and write the tables where the rows of all ranks are there.

    Args:
        evaluation: the same on all ranks. What is scored already is not scored again.
        ranks: clips are dealt out to them.
        processes: scoring workers of this rank; 0 takes one per available CPU.

    Returns:
        How many rows of other ranks are missing.

    Raises:
        UserError: another process does the same, or damaged shards.
        OSError: a place that cannot be written.
    """
    make_folder(evaluation.out)
    if evaluation.is_finished():
        return 0
    if ranks.rank == 0:
        evaluation.note_what_is_replaced()
        _measure_costs(evaluation)  # before the workers take the CPUs
    with _half_of_the_threads():
        _score(evaluation, ranks, processes)
    return _finish(evaluation)


def _measure_costs(evaluation: Evaluation) -> None:
    """Once for an evaluation, so that it ends with the same tables however often it is interrupted."""
    if not evaluation.costs_file.exists():
        costs = {name: asdict(cost(system.model, system.size)) for name, system in evaluation.systems.items()}
        write_json(evaluation.costs_file, costs)


@contextmanager
def _half_of_the_threads() -> Iterator[None]:
    """Torch's threads spin for work and would take the cores of the scoring workers: half are enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)  # an experiment evaluates many runs in one process


def _score(evaluation: Evaluation, ranks: Ranks, processes: int) -> None:
    """Score what is missing of this rank's clips, row by row into its file."""
    own = [place for place in evaluation.places if place[1] % ranks.world_size == ranks.rank]
    missing = set(own) - evaluation.known_rows().keys()
    models = {name: system.model.to(evaluation.device) for name, system in evaluation.systems.items()}
    bar = tqdm(total=len(own), initial=len(own) - len(missing), unit="utterance", desc="scoring")
    with _appending(evaluation, ranks.rank) as append, bar:
        for subset, clips in evaluation.sets.items():
            if not any(place[0] == subset for place in missing):
                continue  # no worker is started for nothing
            rows = rows_as_completed(
                models,
                clips,
                evaluation.metrics,
                device=evaluation.device,
                noisy=True,
                processes=processes,
                wanted=_among(missing, subset),
            )
            for row in rows:
                append({"subset": subset, **row})
                bar.update()


def _among(places: set[Place], subset: str) -> Callable[[int, str], bool]:
    return lambda index, model: (subset, index, model) in places


@contextmanager
def _appending(evaluation: Evaluation, rank: int) -> Iterator[Callable[[Row], None]]:
    """A function that writes one row to the file of `rank`; a kill leaves complete rows but for the last.

    Raises:
        UserError: another process writes that file.
    """
    make_folder(evaluation.rows_folder)
    path = evaluation.rows_folder / f"{rank:05d}.jsonl"
    with path.open("ab") as file, only_writer(path, f"scoring into {evaluation.out}"):
        file.truncate(path.read_bytes().rfind(b"\n") + 1)  # a kill in the middle of a line

        def append(row: Row) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        yield append


def _complete_rows(path: Path) -> list[Row]:
    """The rows of a file, without a last line that has no end, because a kill has torn it."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _finish(evaluation: Evaluation) -> int:
    """Write the tables when every rank's rows are there; how many are missing."""
    with only_writer(evaluation.out, f"writing {evaluation.out}", wait=True):
        if evaluation.is_finished():
            return 0
        known = evaluation.known_rows()
        missing = sum(place not in known for place in evaluation.places)
        # Where all rows were there already, a rank may be here while rank 0 still measures the costs.
        if missing or not evaluation.costs_file.exists():
            return missing or 1
        _write(evaluation, [known[place] for place in evaluation.places])
        _remove_rows(evaluation)
        return 0


def _write(evaluation: Evaluation, rows: list[Row]) -> None:
    """``rows.jsonl``, ``scores.csv``, ``scores.md`` and at last ``scores.json``."""
    costs = read_record(evaluation.costs_file, dict[str, Cost])
    sections = {
        name: table.section(
            [row for row in rows if row["subset"] == name], evaluation.metrics, evaluation.reference
        )
        for name in evaluation.sets
    }
    own_names = {name: system.own_name for name, system in evaluation.systems.items()}
    tables = [table.section_markdown(name, section, own_names, costs) for name, section in sections.items()]
    out = evaluation.out
    (out / SCORES).unlink(missing_ok=True)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / "scores.csv", table.sections_csv(sections))
    write_text(out / "scores.md", "\n".join([*tables, table.LEGEND]))
    write_record(out / SCORES, _record(evaluation, sections, costs))


def _record(evaluation: Evaluation, sections: dict[str, Section], costs: Mapping[str, Cost]) -> Scores:
    return Scores(
        **vars(evaluation.request),
        time=records.now(),
        machine=f"{platform.node()} {platform.machine()}, torch {torch.__version__}",
        reference=evaluation.reference,
        fingerprint=evaluation.fingerprint,
        inputs=evaluation.inputs,
        metrics={
            name: {"label": METRICS[name].label, "unit": METRICS[name].unit} for name in evaluation.metrics
        },
        networks={
            name: Network(**vars(costs[name]), name=system.own_name, step=system.step, size=system.size)
            for name, system in evaluation.systems.items()
        },
        sections=sections,
    )


def _remove_rows(evaluation: Evaluation) -> None:
    """Remove what the ranks have written, and what evaluations of other inputs have left.

    What another process is writing just now stays.
    """
    shutil.rmtree(evaluation.rows_folder, ignore_errors=True)
    for folder in evaluation.out.glob("rows-" + _NAME_DIGITS * "[0-9a-f]"):
        if not any(map(_is_written, folder.glob("*.jsonl"))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_written(path: Path) -> bool:
    try:
        with only_writer(path, "scoring"):
            return False
    except (UserError, OSError):
        return True
