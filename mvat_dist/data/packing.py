"""Carry out a plan: inspect, write shards side by side, and put the manifests last.

What a killed run leaves behind is whole shards and the marker `UNFINISHED`; no reader takes them for a
corpus, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mvat_dist.config import SAMPLE_RATE
from mvat_dist.data.corpora import Listing, Rejection
from mvat_dist.data.inspection import Inspection, UnusableError, inspect
from mvat_dist.data.planning import Plan, SubsetPlan, make_plan
from mvat_dist.data.pool import Map, processes
from mvat_dist.data.recipes import Recipe
from mvat_dist.data.shards import (
    FIELDS,
    FORMAT,
    MANIFEST,
    Kind,
    index_path,
    load_index,
    shard_name,
    write_shard,
)
from mvat_dist.data.utterances import Utterance, render
from mvat_dist.errors import UserError
from mvat_dist.files import TEMPORARY_SUFFIX, read_json, sha256, write_json, write_text

UNFINISHED = "packing.json"
"""Marker of a folder in which packing has begun and not ended."""
REJECTED = "rejected.jsonl"
MIN_RIR_SECONDS = 0.01

_FLAC_RATIO = 0.6
"""FLAC bytes per byte of 16-bit audio, for the forecast of the disk space; speech 0.5, noise up to 0.8."""
_INSPECT_AT_ONCE = 16
_ROLES = {"train_clean": "clean", "train_noise": "noise", "train_rir": "rir"}


def pack(
    listing: Listing, layout: str, recipe: Recipe, out: Path, workers: int
) -> tuple[dict[str, Any], bool]:
    """Pack a corpus into `out`; return its manifest, and whether it had been there before.

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
    state = _state(out, identity)
    if state == "finished":
        (out / UNFINISHED).unlink(missing_ok=True)
        return read_json(out / MANIFEST), True
    with processes(workers) as run:
        inspections = _inspect_all(listing, recipe, run)
        plan = make_plan(listing, inspections, recipe)
        _begin(out, identity, plan, state)
        records = _write_shards(listing.corpus, out, plan, run)
    manifest = identity | _write_manifests(listing, out, plan, records)
    write_json(out / MANIFEST, manifest)
    (out / UNFINISHED).unlink()
    return manifest, False


def _check_recipe(recipe: Recipe) -> None:
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, int | float) and value < 0:
            raise UserError(f"--{field.name} must not be negative, it is {value}")
    for name in ("max_shard_size", "min_shards", "piece_seconds"):
        if getattr(recipe, name) == 0:
            raise UserError(f"--{name} must be above 0")


def _state(out: Path, identity: dict[str, Any]) -> Literal["fresh", "unfinished", "finished"]:
    """What `out` holds; refuses everything that this command did not begin."""
    if blocking := next((one for one in (out, *out.parents) if one.is_file()), None):
        raise UserError(f"--out {out}: {blocking} is a file; give a folder")
    if not out.exists():
        return "fresh"
    for name, state in ((MANIFEST, "finished"), (UNFINISHED, "unfinished")):
        if (out / name).exists():
            _check_same(out, read_json(out / name), identity, state)
            return cast(Literal["finished", "unfinished"], state)
    if any(out.iterdir()):
        raise UserError(f"--out {out} is not empty and was not made by this command; give another folder")
    return "fresh"


def _check_same(out: Path, there: Any, identity: dict[str, Any], state: str) -> None:
    there = there if isinstance(there, dict) else {}
    for key in ("format", "layout", "fingerprint"):
        if there.get(key) != identity[key]:
            what = "from other files" if key == "fingerprint" else f"with another {key}"
            raise UserError(
                f"--out {out} holds a {state} corpus packed {what}; remove it or give another folder"
            )
    recipe = identity["recipe"]
    if changed := [key for key in recipe if there["recipe"].get(key) != recipe[key]]:
        values = ", ".join(f"{key} {there['recipe'].get(key)}, not {recipe[key]}" for key in changed)
        raise UserError(
            f"--out {out} holds a {state} corpus packed with other settings ({values}); remove it or give "
            "another folder"
        )


def _inspect_all(listing: Listing, recipe: Recipe, run: Map) -> dict[str, Inspection]:
    """Path -> what it holds, for every file that may be packed."""
    long = {"first_channel": False, "piece_seconds": recipe.piece_seconds, "min_seconds": recipe.min_seconds}
    whole = long | {"piece_seconds": math.inf}
    room = {"first_channel": True, "piece_seconds": math.inf, "min_seconds": MIN_RIR_SECONDS}
    jobs = [(one.path, room if one.role == "rir" else long) for one in listing.sources]
    jobs += [(path, whole) for pair in listing.pairs for path in (pair.clean, pair.noisy)]
    found = run(partial(_inspect_one, listing.corpus), jobs, _INSPECT_AT_ONCE)
    return {one.path: one for one in tqdm(found, "inspecting", len(jobs), unit="file", smoothing=0.05)}


def _inspect_one(corpus: Path, job: tuple[str, dict[str, Any]]) -> Inspection:
    path, how = job
    return inspect(corpus, path, **how)


def _begin(out: Path, identity: dict[str, Any], plan: Plan, state: str) -> None:
    """Leave the marker, and only those shards of an earlier try that this plan would write again."""
    _check_disk(out, plan)
    marker = identity | {"plan": plan.digest, "subsets": [subset.name for subset in plan.subsets]}
    if state == "unfinished":
        before = read_json(out / UNFINISHED)
        if before["plan"] != marker["plan"]:
            for name in before["subsets"]:
                shutil.rmtree(out / name, ignore_errors=True)
        for leftover in out.rglob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
    write_json(out / UNFINISHED, marker)


def _check_disk(out: Path, plan: Plan) -> None:
    seconds = sum(
        len(one.signals) * one.signals[0].seconds
        for subset in plan.subsets
        for shard in subset.shards
        for one in shard
    )
    kept = sum(path.stat().st_size for path in out.rglob("audio-*.tar"))
    needed = seconds * SAMPLE_RATE * 2 * _FLAC_RATIO - kept
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the shards need about {needed / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free: "
            "free space or give another --out"
        )


@dataclass(frozen=True)
class _ShardJob:
    path: Path
    kind: Kind
    utterances: list[Utterance]


def _write_shards(corpus: Path, out: Path, plan: Plan, run: Map) -> dict[str, list[dict[str, Any]]]:
    """Subset -> the manifest's record of each of its shards."""
    jobs = [
        _ShardJob(out / subset.name / shard_name(number), subset.kind, utterances)
        for subset in plan.subsets
        for number, utterances in enumerate(subset.shards)
    ]
    records: dict[str, list[dict[str, Any]]] = {subset.name: [] for subset in plan.subsets}
    total = sum(len(job.utterances) for job in jobs)
    with tqdm(desc="packing", total=total, unit="utt", smoothing=0.05) as bar:
        for job, record in zip(jobs, run(partial(_write_one, corpus), jobs), strict=True):
            records[job.path.parent.name].append(record)
            bar.update(record["utterances"])
    return records


def _write_one(corpus: Path, job: _ShardJob) -> dict[str, Any]:
    """Write one shard unless an earlier try did; the index comes last, so its presence says so."""
    if not index_path(job.path).exists():
        try:
            write_shard(job.path, job.kind, (render(corpus, one) for one in job.utterances))
        except UnusableError as error:
            raise UserError(
                f"a file of {corpus} changed while it was packed ({error.reason}, {error.detail}); run again"
            ) from error
    rows = load_index(job.path, job.kind)
    return {
        "name": job.path.name,
        "utterances": len(rows),
        "samples": int(rows["samples"].sum()),
        "bytes": job.path.stat().st_size,
        "sha256": sha256(job.path),
        "index_sha256": sha256(index_path(job.path)),
    }


def _write_manifests(
    listing: Listing, out: Path, plan: Plan, records: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Each subset's manifest and the list of what was left out; returns the corpus's own manifest."""
    subsets = {}
    for subset in plan.subsets:
        manifest = _describe(subset, out / subset.name, records[subset.name], plan.rejected)
        write_json(out / subset.name / MANIFEST, manifest)
        subsets[subset.name] = {key: manifest[key] for key in ("kind", "utterances", "hours", "bytes")}
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
    subset: SubsetPlan, folder: Path, shards: Sequence[dict[str, Any]], rejected: Sequence[Rejection]
) -> dict[str, Any]:
    """The manifest of one subset."""
    rows = np.concatenate([load_index(folder / shard["name"], subset.kind) for shard in shards])
    used = [signal for shard in subset.shards for one in shard for signal in one.signals]
    role = _ROLES.get(subset.name, subset.name)
    return {
        "format": FORMAT,
        "subset": subset.name,
        "kind": subset.kind,
        "fields": list(FIELDS[subset.kind]),
        "codec": "flac",
        "sample_rate": SAMPLE_RATE,
        "utterances": len(rows),
        "hours": round(int(rows["samples"].sum()) / SAMPLE_RATE / 3600, 4),
        "bytes": sum(shard["bytes"] for shard in shards),
        "seconds": _spread(rows["samples"] / SAMPLE_RATE, 5),
        "level_dbfs": _spread(rows["level_dbfs"], 5),
        **({"snr_db": _spread(rows["snr_db"], 5)} if subset.kind == "pairs" else {}),
        "source_rates": {str(rate): count for rate, count in sorted(Counter(s.rate for s in used).items())},
        "source_channels": {
            str(channels): count for channels, count in sorted(Counter(s.channels for s in used).items())
        },
        "rejected": dict(Counter(one.reason for one in rejected if one.role == role).most_common()),
        "shards": list(shards),
    }


def _spread(values: npt.NDArray[np.floating[Any]], width: float) -> dict[str, Any]:
    """Quantiles, and counts in bins of `width` (lower edge -> count), of the finite values."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {"quantiles": {}, "histogram": {}}
    shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles = {f"{share:g}": round(float(np.quantile(finite, share)), 2) for share in shares}
    bins = Counter((np.floor(finite / width) * width).tolist())
    return {"quantiles": quantiles, "histogram": {f"{edge:g}": bins[edge] for edge in sorted(bins)}}
