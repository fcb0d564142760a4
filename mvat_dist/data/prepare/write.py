"""Carry out a plan: inspect, write shards side by side, and put the manifests last.

What a killed run leaves behind is inspections, whole shards and the marker `UNFINISHED`; no reader takes
them for a corpus, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.pool import Map, parallel_map
from mvat_dist.data.prepare.corpora import Listing, Rejection
from mvat_dist.data.prepare.disk_space import check_plan, check_roughly
from mvat_dist.data.prepare.inspection import INSPECTIONS, inspect_all
from mvat_dist.data.prepare.manifests import counted, measured
from mvat_dist.data.prepare.plan import Plan, SubsetPlan, make_plan
from mvat_dist.data.prepare.reading import UnusableError
from mvat_dist.data.prepare.recipes import Recipe
from mvat_dist.data.prepare.utterances import Utterance, render
from mvat_dist.data.shards.codecs import Codec
from mvat_dist.data.shards.format import FORMAT, Kind, audio_layout, finished_rows, load_index, shard_name
from mvat_dist.data.shards.manifest import ShardRecord, describe_shard
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.data.shards.writer import write_shard
from mvat_dist.errors import UserError
from mvat_dist.io import TEMPORARY_SUFFIX, make_folder, only_writer, read_json, sha256, write_json, write_text

UNFINISHED = "packing.json"
"""Marker of a folder in which packing has begun and not ended."""
REJECTED = "rejected.jsonl"
SUMMED_UP = ("kind", "utterances", "hours", "bytes")
"""What the corpus's manifest repeats of each subset's."""

_ROLES = {"train_clean": "clean", "train_noise": "noise", "train_rir": "rir"}


@dataclass(frozen=True)
class Packed:
    """What became of a packing."""

    manifest: dict[str, Any]
    already: bool
    """Everything had been there before."""
    kept_inspections: int = 0
    """Files that an interrupted run had read."""
    kept_shards: int = 0
    """Shards that it had written."""


def pack(listing: Listing, layout: str, recipe: Recipe, out: Path, workers: int) -> Packed:
    """Pack a corpus into `out`.

    Args:
        listing: the corpus.
        layout: its name in the manifest.
        recipe: what decides the content.
        out: folder of the packed corpus: missing, empty, or one that the same command left.
        workers: processes; 0 is one per core. Their number changes nothing in the shards.

    Raises:
        UserError: `out` holds something else, nothing can be packed, or the disk is too small.
    """
    _check_recipe(recipe)
    identity = {
        "format": FORMAT,
        "layout": layout,
        "fingerprint": listing.fingerprint,
        "recipe": dataclasses.asdict(recipe),
    }
    state = _state(out, identity, recipe)
    if state == "finished":
        _tidy(out)
        return Packed(_read(out / MANIFEST), True)
    check_roughly(listing, out, recipe.codec)
    made = _begin(out, identity, state)
    with only_writer(out, f"packing into {out}"), parallel_map(workers) as run:
        plan, inspected = _planned(listing, recipe, out, made, run)
        check_plan(out, plan, recipe.codec)
        kept = _settle(out, identity, plan)
        records = _write_shards(listing.corpus, out, plan, recipe.codec, run)
    manifest = identity | _write_manifests(listing, out, plan, records, recipe.codec)
    write_json(out / MANIFEST, manifest)
    _tidy(out)
    return Packed(manifest, False, inspected, kept)


def _check_recipe(recipe: Recipe) -> None:
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"--{field.name} must not be negative, it is {value}")
    for name in ("max_shard_size", "min_shards", "piece_seconds"):
        if getattr(recipe, name) == 0:
            raise UserError(f"--{name} must be above 0")


def _state(out: Path, identity: dict[str, Any], recipe: Recipe) -> Literal["fresh", "unfinished", "finished"]:
    """What `out` holds; refuses everything that this command did not begin."""
    try:
        blocking = next((one for one in (out, *out.parents) if one.is_file()), None)
        exists = out.exists()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give another folder") from error
    if blocking:
        raise UserError(f"--out {out}: {blocking} is a file; give a folder")
    if not exists:
        return "fresh"
    for name, state in ((MANIFEST, "finished"), (UNFINISHED, "unfinished")):
        if (out / name).exists():
            _check_same(out, _read(out / name), identity, recipe, state)
            return cast(Literal["finished", "unfinished"], state)
    if any(out.iterdir()):
        raise UserError(f"--out {out} is not empty and was not made by this command; give another folder")
    return "fresh"


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {path.parent} and pack again") from error


def _check_same(out: Path, there: Any, identity: dict[str, Any], recipe: Recipe, state: str) -> None:
    there = there if isinstance(there, dict) else {}
    for key in ("format", "layout", "fingerprint"):
        if there.get(key) != identity[key]:
            what = "from other files" if key == "fingerprint" else f"with another {key}"
            raise UserError(
                f"--out {out} holds a {state} corpus packed {what}; remove it or give another folder"
            )
    # A setting that is younger than the shards was then what is its default now.
    before = {field.name: field.default for field in dataclasses.fields(recipe)} | there["recipe"]
    wanted = dataclasses.asdict(recipe)
    if changed := [key for key in wanted if before[key] != wanted[key]]:
        values = ", ".join(f"{key} {before[key]}, not {wanted[key]}" for key in changed)
        raise UserError(
            f"--out {out} holds a {state} corpus packed with other settings ({values}); remove it or give "
            "another folder"
        )


def _begin(out: Path, identity: dict[str, Any], state: str) -> list[Path]:
    """Make `out` and leave the marker: a place that cannot be written to is refused before any reading.

    Returns the folders that were made, deepest first.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    make_folder(out)
    if state == "fresh":
        write_json(out / UNFINISHED, identity | {"plan": None, "subsets": []})
    return missing


def _planned(listing: Listing, recipe: Recipe, out: Path, made: Sequence[Path], run: Map) -> tuple[Plan, int]:
    """The plan, and how many files had been inspected before; `made` goes where nothing can be packed.

    The inspections, of hundreds of thousands of files perhaps, are freed before anything is written.
    """
    inspections, inspected = inspect_all(listing, recipe, out / INSPECTIONS, run)
    try:
        return make_plan(listing, inspections, recipe), inspected
    except UserError:
        _abandon(out, made)
        raise


def _abandon(out: Path, made: Sequence[Path]) -> None:
    """Leave nothing of a corpus of which nothing can be packed."""
    for name in (UNFINISHED, INSPECTIONS):
        (out / name).unlink(missing_ok=True)
    for folder in made:
        folder.rmdir()


def _settle(out: Path, identity: dict[str, Any], plan: Plan) -> int:
    """Note the plan and keep only those shards of an earlier try that it would write again; their number."""
    before = _read(out / UNFINISHED)
    digest = plan.digest
    if before["plan"] != digest:
        for name in before["subsets"]:
            shutil.rmtree(out / name, ignore_errors=True)
    names = [subset.name for subset in plan.subsets]
    write_json(out / UNFINISHED, identity | {"plan": digest, "subsets": names})
    return sum(1 for name in names for _ in (out / name).glob("audio-*.npy"))


def _tidy(out: Path) -> None:
    """Remove what only an unfinished corpus needs, and what killed writers left."""
    for leftover in out.rglob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)
    for name in (INSPECTIONS, UNFINISHED):
        (out / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class _ShardJob:
    path: Path
    kind: Kind
    codec: Codec
    first: int
    """Position in the subset of the first utterance."""
    utterances: list[Utterance]


def _write_shards(
    corpus: Path, out: Path, plan: Plan, codec: Codec, run: Map
) -> dict[str, list[ShardRecord]]:
    """Subset -> the manifest's record of each of its shards."""
    jobs = [*_jobs(out, plan, codec)]
    records: dict[str, list[ShardRecord]] = {subset.name: [] for subset in plan.subsets}
    total = sum(len(job.utterances) for job in jobs)
    with tqdm(desc="packing", total=total, unit="utt", smoothing=0.05) as bar:
        for job, record in zip(jobs, run(partial(_write_one, corpus), jobs), strict=True):
            records[job.path.parent.name].append(record)
            bar.update(record.rows)
    return records


def _jobs(out: Path, plan: Plan, codec: Codec) -> Iterator[_ShardJob]:
    for subset in plan.subsets:
        first = 0
        for number, utterances in enumerate(subset.shards):
            path = out / subset.name / shard_name(number)
            yield _ShardJob(path, subset.kind, codec, first, utterances)
            first += len(utterances)


def _write_one(corpus: Path, job: _ShardJob) -> ShardRecord:
    """Write one shard unless an earlier try did."""
    if not _is_whole(job):
        try:
            made = (
                render(corpus, f"{job.path.parent.name}_{number:07d}", one, job.codec)
                for number, one in enumerate(job.utterances, job.first)
            )
            write_shard(job.path, audio_layout(job.kind, job.codec), made)
        except UnusableError as error:
            raise UserError(
                f"a file of {corpus} changed while it was packed ({error.reason}, {error.detail}); run again"
            ) from error
    rows = load_index(job.path, audio_layout(job.kind, job.codec)).rows
    return describe_shard(job.path, len(rows), int(rows["samples"].sum()))


def _is_whole(job: _ShardJob) -> bool:
    rows = finished_rows(job.path, audio_layout(job.kind, job.codec))
    return rows is not None and len(rows) == len(job.utterances)


def _write_manifests(
    listing: Listing, out: Path, plan: Plan, records: dict[str, list[ShardRecord]], codec: Codec
) -> dict[str, Any]:
    """Each subset's manifest and the list of what was left out; returns the corpus's own manifest."""
    subsets = {}
    for subset in plan.subsets:
        manifest = _describe(subset, codec, out / subset.name, records[subset.name], plan.rejected)
        write_json(out / subset.name / MANIFEST, manifest)
        subsets[subset.name] = {key: manifest[key] for key in SUMMED_UP} | {
            "manifest_sha256": sha256(out / subset.name / MANIFEST)
        }
    rows = (json.dumps(dataclasses.asdict(one)) + "\n" for one in plan.rejected)
    write_text(out / REJECTED, "".join(rows))
    return {
        "corpus": str(listing.corpus),
        "files": plan.counts,
        "rejected": dict(Counter(one.reason for one in plan.rejected).most_common()),
        "notes": plan.notes,
        "subsets": subsets,
    }


def _describe(
    subset: SubsetPlan,
    codec: Codec,
    folder: Path,
    shards: Sequence[ShardRecord],
    rejected: Sequence[Rejection],
) -> dict[str, Any]:
    """The manifest of one subset."""
    layout = audio_layout(subset.kind, codec)
    rows = np.concatenate([load_index(folder / shard.name, layout).rows for shard in shards])
    used = [signal for shard in subset.shards for one in shard for signal in one.signals]
    role = _ROLES.get(subset.name, subset.name)
    return {
        "format": FORMAT,
        "subset": subset.name,
        "kind": subset.kind,
        "codec": codec,
        "sample_rate": SAMPLE_RATE,
        "bytes": sum(shard.bytes or 0 for shard in shards),
        **measured(rows, subset.kind),
        "source_rates": counted([one.rate for one in used]),
        "source_channels": counted([one.channels for one in used]),
        "rejected": dict(Counter(one.reason for one in rejected if one.role == role).most_common()),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
