"""Score a run on held-out clips: noisy input, teacher and every student, as rows and as a table."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from mvat_dist import clock, locations, modelfile
from mvat_dist import metrics as metric_table
from mvat_dist.commandline import CommandParser
from mvat_dist.data.store.folders import Folder, read_manifest
from mvat_dist.data.store.packed import Corpus, locate
from mvat_dist.data.store.remote import RemoteError
from mvat_dist.data.store.shardcache import Cache
from mvat_dist.data.validation import ValidationClips
from mvat_dist.errors import UserError, exit_code
from mvat_dist.files import make_folder, write_json, write_text
from mvat_dist.metrics import METRICS
from mvat_dist.modelfile import LoadedModel, Which
from mvat_dist.rundir import RunDir
from mvat_dist.speed import COST_SECONDS, Cost, cost
from mvat_dist.summary import NOISY, Row, Summary, summarise
from mvat_dist.validate import validate

TEACHER = "teacher"
DEFAULT_METRICS = "pesq_wb,stoi,si_sdr"


@dataclass(frozen=True)
class Section:
    """The scores on one test set."""

    name: str
    rows: list[Row]
    summaries: dict[str, dict[str, Summary]]
    """``{model: {metric: Summary}}``."""

    @property
    def clips(self) -> int:
        return len({row["index"] for row in self.rows})

    @property
    def seconds(self) -> float:
        """Duration of its clips."""
        return float(sum(row["duration_s"] for row in self.rows if row["model"] == NOISY))


def networks_of(run: Path, which: Which) -> dict[str, LoadedModel]:
    """What `run` offers to score, by the name that its rows get: the teacher first, then the students.

    Raises:
        UserError: nothing there, no trained weights in it, or a file that is something else.
    """
    if not RunDir(run).config.is_file():
        loaded = modelfile.load(modelfile.resolve(run, which))
        return {loaded.name: loaded}
    students = modelfile.students_of(run, which)
    if not students:
        raise UserError(f"{run} holds no trained student yet: weights are saved with its first checkpoint")
    found = {}
    teacher = modelfile.teacher_of(run)
    if teacher is not None and teacher.exists():
        found[TEACHER] = modelfile.load(teacher)
    elif teacher is not None:
        print(f"note: the run's teacher is no longer at {teacher}; it is left out", file=sys.stderr)
    return found | {name: modelfile.load(file) for name, file in students.items()}


def held_out(
    data: Path | str, limit: int, max_seconds: float, cache: Cache | None = None
) -> dict[str, ValidationClips]:
    """The held-out clips below `data`, by section: every ``test_*`` subset of a packed corpus (``valid``
    where it has none), or `data` itself.

    Args:
        data: folder, URL or pattern.
        limit: most clips of a section, as for `ValidationClips`.
        max_seconds: of each clip, as for `ValidationClips`.
        cache: for copies of what lies at a URL; None is the default one.

    Raises:
        UserError: no such folder, no held-out pairs in it, or damaged shards.
    """
    cache = cache or Cache()
    folders = locate("--data", data, cache)
    sections = {locations.name(str(folders[0])): folders}
    if _is_corpus(folders[0]):
        corpus = Corpus("--data", data, cache)
        names = corpus.names
        tests = [name for name in names if name.startswith("test_")] or [n for n in names if n == "valid"]
        if not tests:
            raise UserError(f"{data} has no subset test_* or valid to score on; it has {', '.join(names)}")
        sections = {name: corpus.subset(name) for name in tests}
    return {
        name: ValidationClips(its, limit=limit, max_seconds=max_seconds) for name, its in sections.items()
    }


def _is_corpus(folder: Folder) -> bool:
    """Whether it is a packed corpus; what else it may be is judged by `ValidationClips`."""
    try:
        return "subsets" in read_manifest(folder, "a packed corpus")
    except RemoteError:
        raise
    except UserError:
        return False


def score_sections(
    networks: Mapping[str, LoadedModel],
    sets: Mapping[str, ValidationClips],
    metrics: Sequence[str],
    device: torch.device,
    processes: int,
) -> Iterator[Section]:
    """Score every network and the noisy input on every test set, with progress on stderr."""
    models = {name: network.model.to(device) for name, network in networks.items()}
    total = sum(map(len, sets.values())) * (len(models) + 1)
    with tqdm(total=total, unit="utterance", desc="scoring") as bar:
        for name, clips in sets.items():
            rows = validate(
                models, clips, metrics, device=device, noisy=True, processes=processes, progress=bar.update
            )
            yield Section(name, rows, summarise(rows, metrics))


def table(
    section: Section, networks: Mapping[str, LoadedModel], costs: Mapping[str, Cost], metrics: Sequence[str]
) -> str:
    """Markdown: one line per network, then one per kind of failure."""
    score_heads = [f"{METRICS[name].label} {METRICS[name].unit}".strip() + " ↑" for name in metrics]
    heads = ["network", *score_heads, "parameters M ↓", f"GMAC at {COST_SECONDS:g} s ↓", "RTF ↓"]
    lines = [
        [
            _label(model, networks),
            *(_cell(scores[name], METRICS[name].decimals) for name in metrics),
            *_cost_cells(costs.get(model)),
        ]
        for model, scores in section.summaries.items()
    ]
    failures = [
        f"- {model}, {METRICS[name].label}: {count} of {section.clips} clips without a score, {reason}"
        for model, scores in section.summaries.items()
        for name in metrics
        for reason, count in scores[name].failed.items()
    ]
    title = f"## {section.name}: {section.clips} clips, {section.seconds:.0f} s\n"
    body = tabulate(lines, heads, tablefmt="github", disable_numparse=True)
    return "\n".join([title, body, *([""] if failures else []), *failures, ""])


def _label(model: str, networks: Mapping[str, LoadedModel]) -> str:
    """The name in the rows, and the name of the network where that is another: ``teacher (manner-b)``."""
    own = networks[model].name if model in networks else model
    return model if own == model else f"{model} ({own})"


def _cell(summary: Summary, decimals: int) -> str:
    if summary.mean is None:
        return "-"
    shown = f"{summary.mean:.{decimals}f} [{summary.low:.{decimals}f}, {summary.high:.{decimals}f}]"
    return f"{shown} n={summary.clips}" if summary.failed else shown


def _cost_cells(known: Cost | None) -> list[str]:
    if known is None:
        return ["-"] * 3
    return [f"{known.parameters / 1e6:.2f}", f"{known.gmac_at_4_s:.2f}", f"{known.real_time_factor:.3f}"]


_LEGEND = """\
↑ higher is better, ↓ lower is better. Means over the clips that have a score, with 95 % bootstrap
intervals over clips in brackets; n where some clips have none. RTF: processing time over audio duration
on one CPU thread.
"""


def _write(
    out: Path,
    arguments: argparse.Namespace,
    networks: Mapping[str, LoadedModel],
    costs: Mapping[str, Cost],
    sections: Sequence[Section],
    text: str,
) -> None:
    """``rows.jsonl``, ``scores.json`` and ``scores.md`` in `out`."""
    lines = [json.dumps({"subset": one.name, **row}) for one in sections for row in one.rows]
    write_text(out / "rows.jsonl", "".join(line + "\n" for line in lines))
    record = {
        "run": str(arguments.run.absolute()),
        "data": locations.absolute(arguments.data),
        "weights": arguments.weights,
        "time": clock.now(),
        "machine": f"{platform.node()} {platform.machine()}, torch {torch.__version__}",
        "networks": {
            name: {
                "name": network.name,
                "step": network.step,
                "size": asdict(network.model.size),
                **asdict(costs[name]),
            }
            for name, network in networks.items()
        },
        "sections": {one.name: _section_record(one) for one in sections},
    }
    write_json(out / "scores.json", record)
    write_text(out / "scores.md", text)


def _section_record(section: Section) -> dict[str, Any]:
    scores = {
        model: {metric: asdict(summary) for metric, summary in by_metric.items()}
        for model, by_metric in section.summaries.items()
    }
    return {"clips": section.clips, "seconds": section.seconds, "scores": scores}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "python -m mvat_dist.evaluate",
        "Score a run on held-out clips: noisy input, teacher and every student, as rows and as a table.",
        "python -m mvat_dist.evaluate runs/mvat-all-1a2b3c4d --data shards/dns --limit 100",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, a student's folder or a model file")
    data = (
        "packed corpus (its test_* subsets, else valid) or packed subset, as a folder, URL or quoted "
        "pattern; or a folder with noisy/ and clean/"
    )
    add("--data", required=True, help=data)
    add("--cache-dir", default="", help="folder for copies of what lies at URLs (default: as in training)")
    add("--metrics", default=DEFAULT_METRICS, help=f"of {', '.join(METRICS)} (default: %(default)s)")
    add("--limit", type=int, default=0, help="most clips of each test set (default: all)")
    add(
        "--max-seconds",
        type=float,
        default=0.0,
        help="score only the start of each clip (default: all of it)",
    )
    add("--weights", choices=("best", "last"), default="best", help="which weights (default: %(default)s)")
    add("--out", type=Path, help="folder for rows and tables (default: RUN/evaluate/DATA-WEIGHTS)")
    add("--processes", type=int, default=0, help="scoring processes (default: one per available CPU)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the networks run")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that needs no file.

    Raises:
        UserError: a negative number.
    """
    arguments = _parser().parse_args(argv)
    for name in ("limit", "max_seconds", "processes"):
        if getattr(arguments, name) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it cannot be negative"
            )
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Score a run, print the table, and write rows and table below its folder."""
    arguments = parse(argv)
    metrics = metric_table.select(arguments.metrics)
    device = _device(arguments.device)
    networks = networks_of(arguments.run, arguments.weights)
    cache = Cache(arguments.cache_dir)
    sets = held_out(arguments.data, arguments.limit, arguments.max_seconds, cache)
    out = arguments.out or _default_out(arguments)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    # Now rather than after an hour of scoring, when the place turns out to be read-only.
    make_folder(out)
    # Before the scoring processes take the CPUs.
    costs = {name: cost(network.model) for name, network in networks.items()}
    # Threads that spin for work would take the cores of the scoring processes: half of them are enough.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    sections = list(score_sections(networks, sets, metrics, device, arguments.processes))
    text = "\n".join([*(table(section, networks, costs, metrics) for section in sections), _LEGEND])
    _write(out, arguments, networks, costs, sections, text)
    print(text)
    print(f"rows and tables: {out}")


def _device(choice: str) -> torch.device:
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def _default_out(arguments: argparse.Namespace) -> Path:
    run: Path = arguments.run
    folder = run if run.is_dir() else run.parent
    return folder / "evaluate" / f"{locations.name(arguments.data)}-{arguments.weights}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
