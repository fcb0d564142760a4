"""One evaluation: its rows, scored by one or several processes in one or several goes, and its tables."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mvat_dist.data.test_sets import TestSets
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.evaluation import table
from mvat_dist.evaluation.metrics import dnsmos
from mvat_dist.evaluation.metrics.registry import GROUPS, METRICS
from mvat_dist.evaluation.real_time_factor import Cost, cost
from mvat_dist.evaluation.row_log import RowLog
from mvat_dist.evaluation.statistics import NOISY, Row
from mvat_dist.evaluation.systems import Candidate
from mvat_dist.evaluation.table import Section
from mvat_dist.evaluation.validate import rows_as_scored
from mvat_dist.io import only_writer, read_json, sha256, write_json, write_text
from mvat_dist.runs import records

_VOUCHED = ("rows.jsonl", "scores.csv", "scores.md")
"""What ``scores.json`` vouches for."""
_PACKAGES = ("mvat_dist", "torch", "numpy", "pesq", "pystoi")


@dataclass(frozen=True)
class Evaluation:
    """What is scored on what, and where its rows and tables go."""

    networks: Mapping[str, Candidate]
    sets: TestSets
    metrics: tuple[str, ...]
    reference: str | None
    """What the networks are compared with: one of them, or the noisy input."""
    device: torch.device
    out: Path
    about: dict[str, Any]
    """Where networks and clips came from, for the record."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides a score: rows of another identity are not taken for rows of this one."""
        packages = {name: metadata.version(name) for name in _PACKAGES}
        weights = dnsmos.weights_file() if set(self.metrics) & set(GROUPS["dnsmos"]) else None
        return {
            "networks": {name: one.fingerprint for name, one in self.networks.items()},
            "clips": {name: clips.identity for name, clips in self.sets.items()},
            "metrics": list(self.metrics),
            "packages": packages | ({"dnsmos": sha256(weights)} if weights else {}),
            "device": self.device.type,
        }

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()

    @cached_property
    def places(self) -> list[tuple[str, int, str]]:
        """(subset, index, model) of every row, in the order of ``rows.jsonl``."""
        return [
            (subset, index, model)
            for subset, clips in self.sets.items()
            for index in range(len(clips))
            for model in (NOISY, *self.networks)
        ]

    def is_finished(self) -> bool:
        """Whether the tables in `out` are those of this evaluation, and all there."""
        there = _scores(self.out) or {}
        whole = all((self.out / name).is_file() for name in _VOUCHED)
        return whole and self._has_rows() and there.get("reference") == self.reference

    def _has_rows(self) -> bool:
        return (_scores(self.out) or {}).get("fingerprint") == self.fingerprint

    def known_rows(self, log: RowLog) -> dict[tuple[str, int, str], Row]:
        """What has been scored already, by its place: finished, or under way."""
        rows = [*(log.finished_rows() if self._has_rows() else []), *log.rows()]
        return {(row["subset"], row["index"], row["model"]): row for row in rows}

    def say_what_is_replaced(self) -> None:
        """A note where `out` holds the tables of another evaluation."""
        there = (_scores(self.out) or {}).get("identity")
        if isinstance(there, dict) and there != self.identity:
            changed = ", ".join(key for key, value in self.identity.items() if there.get(key) != value)
            print(
                f"note: {self.out} holds scores of another evaluation (other {changed}); they are replaced "
                "when this one is complete",
                file=sys.stderr,
            )


def _scores(out: Path) -> dict[str, Any] | None:
    """``scores.json``, where it is there and whole."""
    try:
        found = read_json(out / "scores.json")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def score(evaluation: Evaluation, log: RowLog, here: Ranks, processes: int) -> None:
    """Score what is missing of this rank's share of the clips, row by row into `log`.

    Raises:
        UserError: another process does the same, or damaged shards.
    """
    share = [place for place in evaluation.places if place[1] % here.world_size == here.rank]
    missing = set(share) - evaluation.known_rows(log).keys()
    models = {name: one.model.to(evaluation.device) for name, one in evaluation.networks.items()}
    bar = tqdm(total=len(share), initial=len(share) - len(missing), unit="utterance", desc="scoring")
    with log.appending(here.rank) as append, bar:
        for subset, clips in evaluation.sets.items():
            scored = rows_as_scored(
                models,
                clips,
                evaluation.metrics,
                device=evaluation.device,
                noisy=True,
                processes=processes,
                wanted=_among(missing, subset),
            )
            for row in scored:
                append({"subset": subset, **row})
                bar.update()


def _among(places: set[tuple[str, int, str]], subset: str) -> Callable[[int, str], bool]:
    return lambda index, model: (subset, index, model) in places


def finish(evaluation: Evaluation, log: RowLog) -> int:
    """Write the tables when every rank's rows are there; how many are missing."""
    with only_writer(evaluation.out, f"writing {evaluation.out}", wait=True):
        if evaluation.is_finished():
            return 0
        found = evaluation.known_rows(log)
        places = evaluation.places
        # Where all rows were there before, a rank may be here while rank 0 still measures the costs.
        if missing := sum(place not in found for place in places) or not _costs_file(log).exists():
            return int(missing)
        rows = [found[place] for place in places]
        costs = {name: Cost(**known) for name, known in read_json(_costs_file(log)).items()}
        _write(evaluation, log, rows, costs)
        log.clear()
        return 0


def _write(evaluation: Evaluation, log: RowLog, rows: list[Row], costs: Mapping[str, Cost]) -> None:
    """``rows.jsonl``, ``scores.csv``, ``scores.md`` and at last ``scores.json``."""
    sections = [
        table.section(
            name, [row for row in rows if row["subset"] == name], evaluation.metrics, evaluation.reference
        )
        for name in evaluation.sets
    ]
    names = {name: one.own_name for name, one in evaluation.networks.items()}
    tables = [table.table_markdown(one, names, costs, evaluation.metrics) for one in sections]
    out = evaluation.out
    # It vouches for what lies beside it: gone before the others change, back when all are there.
    (out / "scores.json").unlink(missing_ok=True)
    log.finish(rows)
    write_text(out / "scores.csv", table.table_csv(sections))
    write_text(out / "scores.md", "\n".join([*tables, table.LEGEND]))
    write_json(out / "scores.json", _record(evaluation, sections, costs))


def _record(evaluation: Evaluation, sections: Sequence[Section], costs: Mapping[str, Cost]) -> dict[str, Any]:
    """The content of ``scores.json``."""
    networks = {
        name: {
            "name": one.own_name,
            "step": one.step,
            "size": asdict(one.size) if one.size else None,
            **asdict(costs[name]),
        }
        for name, one in evaluation.networks.items()
    }
    return {
        "format": table.FORMAT,
        **evaluation.about,
        "time": records.now(),
        "machine": f"{platform.node()} {platform.machine()}, torch {torch.__version__}",
        "reference": evaluation.reference,
        "fingerprint": evaluation.fingerprint,
        "identity": evaluation.identity,
        "metrics": {
            name: {"label": METRICS[name].label, "unit": METRICS[name].unit} for name in evaluation.metrics
        },
        "networks": networks,
        "sections": {one.name: table.record(one) for one in sections},
    }


def _costs_file(log: RowLog) -> Path:
    return log.folder / "costs.json"


def measure_costs(evaluation: Evaluation, log: RowLog) -> None:
    """Once for an evaluation, so that it ends with the same tables however often it is interrupted."""
    if not _costs_file(log).exists():
        costs = {name: asdict(cost(one.model, one.size)) for name, one in evaluation.networks.items()}
        write_json(_costs_file(log), costs)
