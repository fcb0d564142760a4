"""Pack a corpus by its plan: inspect, write shards side by side, and put the manifests last.

A killed run leaves inspections, finished shards and the marker `UNFINISHED`. No reader takes them for a
corpus, and the same command continues from there.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import soundfile
from tqdm import tqdm

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.audio import known_frames
from mvat_dist.data.pool import Map, parallel_map
from mvat_dist.data.prepare.corpora import Listing
from mvat_dist.data.prepare.inspection import INSPECTIONS, inspect_all
from mvat_dist.data.prepare.manifests import PackedCorpus, Packing, PackingProgress, write_manifests
from mvat_dist.data.prepare.plan import Plan, make_plan
from mvat_dist.data.prepare.reading import UnusableError, locate, open_recording
from mvat_dist.data.prepare.recipes import Recipe
from mvat_dist.data.prepare.utterances import Utterance, render
from mvat_dist.data.shards.codecs import Codec
from mvat_dist.data.shards.format import Kind, audio_layout, finished_rows, load_index, shard_name
from mvat_dist.data.shards.manifest import ShardRecord, describe_shard
from mvat_dist.data.shards.remote_cache import MANIFEST
from mvat_dist.data.shards.writer import write_shard
from mvat_dist.errors import UserError
from mvat_dist.io import (
    TEMPORARY_SUFFIX,
    existing_folder,
    make_folder,
    only_writer,
    read_record,
    write_record,
)

UNFINISHED = "packing.json"
"""Marker of a folder in which packing has begun and not ended."""

_STORED_SHARE: dict[Codec, float] = {"flac": 0.6, "int16": 1.0}
"""Stored bytes per byte of 16-bit audio: FLAC of speech 0.5, of noise up to 0.8."""
_UTTERANCE_OVERHEAD = 3072
"""Bytes of an utterance's headers, padding, JSON and index."""
_PROBED_FILES = 200
_ROUGH_SHARE = 0.5
"""Share of the rough forecast that must fit: what will be left out, and how FLAC compresses, is not known."""


@dataclass(frozen=True)
class Packed:
    """The result of a packing."""

    manifest: PackedCorpus
    already: bool
    """Whether the corpus had been packed before."""
    kept_inspections: int = 0
    """Files that an interrupted run had inspected."""
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
    packing = Packing(layout, listing.fingerprint, dataclasses.asdict(recipe))
    finished, progress = _state(out, packing, recipe)
    if finished:
        _tidy(out)
        return Packed(finished, True)
    _check_space_roughly(listing, out, recipe.codec)
    new_folders = _begin(out, packing, progress)
    with only_writer(out, f"packing into {out}"), parallel_map(workers) as run:
        plan, inspected = _plan(listing, recipe, out, new_folders, run)
        _check_space(out, plan, recipe.codec)
        kept = _settle(out, packing, plan)
        shards = _write_shards(listing.corpus, out, plan, recipe.codec, run)
    manifest = write_manifests(listing, out, plan, shards, recipe.codec, packing)
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


def _state(out: Path, packing: Packing, recipe: Recipe) -> tuple[PackedCorpus | None, PackingProgress | None]:
    """The finished corpus in `out`, and the progress of an unfinished one; neither where `out` is new.

    Raises:
        UserError: `out` holds something that this command did not begin.
    """
    try:
        blocking = next((path for path in (out, *out.parents) if path.is_file()), None)
        exists = out.exists()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give another folder") from error
    if blocking:
        raise UserError(f"--out {out}: {blocking} is a file; give a folder")
    if not exists:
        return None, None
    if (out / MANIFEST).exists():
        corpus = read_record(out / MANIFEST, PackedCorpus)
        _check_same(out, corpus, packing, recipe, "finished")
        return corpus, None
    if (out / UNFINISHED).exists():
        progress = read_record(out / UNFINISHED, PackingProgress)
        _check_same(out, progress, packing, recipe, "unfinished")
        return None, progress
    if any(out.iterdir()):
        raise UserError(f"--out {out} is not empty and was not made by this command; give another folder")
    return None, None


def _check_same(out: Path, stored: Packing, packing: Packing, recipe: Recipe, state: str) -> None:
    for key, what in (("layout", "with another layout"), ("fingerprint", "from other files")):
        if getattr(stored, key) != getattr(packing, key):
            raise UserError(
                f"--out {out} holds a {state} corpus packed {what}; remove it or give another folder"
            )
    # The shards were packed with today's default of any setting that was added since.
    settings = {field.name: field.default for field in dataclasses.fields(recipe)} | stored.recipe
    if changed := [key for key, value in packing.recipe.items() if settings[key] != value]:
        values = ", ".join(f"{key} {settings[key]}, not {packing.recipe[key]}" for key in changed)
        raise UserError(
            f"--out {out} holds a {state} corpus packed with other settings ({values}); remove it or give "
            "another folder"
        )


def _begin(out: Path, packing: Packing, progress: PackingProgress | None) -> list[Path]:
    """Make `out` and leave the marker; a place that cannot be written to is refused before any reading.

    Returns:
        The folders that were made, deepest first.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    make_folder(out)
    if progress is None:
        write_record(out / UNFINISHED, PackingProgress(packing.layout, packing.fingerprint, packing.recipe))
    return missing


def _plan(
    listing: Listing, recipe: Recipe, out: Path, new_folders: Sequence[Path], run: Map
) -> tuple[Plan, int]:
    """The plan, and how many files an earlier try had inspected.

    The inspections, of hundreds of thousands of files perhaps, are freed before anything is written. Where
    nothing can be packed, `new_folders` are removed again.
    """
    inspections, inspected = inspect_all(listing, recipe, out / INSPECTIONS, run)
    try:
        return make_plan(listing, inspections, recipe), inspected
    except UserError:
        for name in (UNFINISHED, INSPECTIONS):
            (out / name).unlink(missing_ok=True)
        for folder in new_folders:
            folder.rmdir()
        raise


def _settle(out: Path, packing: Packing, plan: Plan) -> int:
    """Note the plan, and keep only the shards of an earlier try that it would write again.

    Returns:
        Number of the shards that are kept.
    """
    progress = read_record(out / UNFINISHED, PackingProgress)
    if progress.plan != plan.digest:
        for name in progress.subsets:
            shutil.rmtree(out / name, ignore_errors=True)
    names = [subset.name for subset in plan.subsets]
    planned = PackingProgress(
        packing.layout, packing.fingerprint, packing.recipe, plan=plan.digest, subsets=names
    )
    write_record(out / UNFINISHED, planned)
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
    """Write all shards; subset -> the manifest's record of each of its shards."""
    jobs = [*_jobs(out, plan, codec)]
    shards: dict[str, list[ShardRecord]] = {subset.name: [] for subset in plan.subsets}
    total = sum(len(job.utterances) for job in jobs)
    with tqdm(desc="packing", total=total, unit="utt", smoothing=0.05) as bar:
        for job, shard in zip(jobs, run(partial(_write_shard, corpus), jobs), strict=True):
            shards[job.path.parent.name].append(shard)
            bar.update(shard.rows)
    return shards


def _jobs(out: Path, plan: Plan, codec: Codec) -> Iterator[_ShardJob]:
    for subset in plan.subsets:
        first = 0
        for number, utterances in enumerate(subset.shards):
            path = out / subset.name / shard_name(number)
            yield _ShardJob(path, subset.kind, codec, first, utterances)
            first += len(utterances)


def _write_shard(corpus: Path, job: _ShardJob) -> ShardRecord:
    """Write one shard unless an earlier try did."""
    layout = audio_layout(job.kind, job.codec)
    rows = finished_rows(job.path, layout)
    if rows is None or len(rows) != len(job.utterances):
        samples = (
            render(corpus, f"{job.path.parent.name}_{number:07d}", utterance, job.codec)
            for number, utterance in enumerate(job.utterances, job.first)
        )
        try:
            write_shard(job.path, layout, samples)
        except UnusableError as error:
            raise UserError(
                f"a file of {corpus} changed while it was packed ({error.reason}, {error.detail}); run again"
            ) from error
        rows = load_index(job.path, layout).rows
    return describe_shard(job.path, len(rows), int(rows["samples"].sum()))


def _check_space_roughly(listing: Listing, out: Path, codec: Codec) -> None:
    """Refuse a disk that is clearly too small, from the headers of a few files of the corpus.

    Raises:
        UserError: not even half of what the shards seem to need is free.
    """
    paths = [source.path for source in listing.sources]
    paths += [path for pair in listing.pairs for path in (pair.clean, pair.noisy)]
    probed = [_seconds(listing.corpus, path) for path in paths[:: max(1, len(paths) // _PROBED_FILES)]]
    if known := [seconds for seconds in probed if seconds]:
        forecast = _stored_bytes(len(paths) * sum(known) / len(known), len(paths), codec)
        _refuse_if_short(out, forecast, _ROUGH_SHARE * forecast)


def _check_space(out: Path, plan: Plan, codec: Codec) -> None:
    """Refuse a disk that is too small for what will be written, less what an earlier try wrote.

    Raises:
        UserError: it does not fit.
    """
    utterances = [utterance for subset in plan.subsets for shard in subset.shards for utterance in shard]
    seconds = sum(len(utterance.signals) * utterance.signals[0].seconds for utterance in utterances)
    forecast = _stored_bytes(seconds, len(utterances), codec)
    _refuse_if_short(out, forecast, forecast)


def _stored_bytes(seconds: float, utterances: int, codec: Codec) -> float:
    return 2 * SAMPLE_RATE * _STORED_SHARE[codec] * seconds + utterances * _UTTERANCE_OVERHEAD


def _seconds(corpus: Path, path: str) -> float:
    """Duration by the file's header; 0 where it has none that can be read, or leaves its length open."""
    try:
        with open_recording(locate(corpus, path)) as sound:
            return (known_frames(sound.frames) or 0) / float(sound.samplerate)
    except (soundfile.SoundFileRuntimeError, OSError):
        return 0.0


def _refuse_if_short(out: Path, forecast: float, needed: float) -> None:
    folder = existing_folder(out)
    kept = sum(path.stat().st_size for path in out.rglob("audio-*.tar"))
    free = shutil.disk_usage(folder).free
    if needed - kept > free:
        raise UserError(
            f"the shards need about {(forecast - kept) / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB "
            "free: free space or give another --out"
        )
