"""List a corpus of WebDataset tars, whose audio members become recordings and pairs as files do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mvat_dist.config.locations import expand
from mvat_dist.data.prepare.corpora import (
    SUFFIXES,
    Halves,
    Listing,
    Rejection,
    Role,
    Side,
    Source,
    fingerprint_of,
    group_of,
    match_pairs,
)
from mvat_dist.data.prepare.reading import tar_recordings
from mvat_dist.data.prepare.recipes import WebDatasetRecipe
from mvat_dist.errors import UserError


def list_webdataset(corpus: Path, recipe: WebDatasetRecipe) -> Listing:
    """List the audio members of the tars that the recipe names; reads the tars' headers, no audio.

    Paths are those of the tar and of the member: ``speech/000.tar/utt_1.flac``. The other members of a
    sample (JSON, text) are passed over.

    Raises:
        UserError: no such folder, a pattern without tars, no pattern at all, or a tar named twice.
        ShardError: a damaged tar.
    """
    if not corpus.is_dir():
        raise UserError(f"no such corpus folder: {corpus}")
    roles: dict[Role, str] = {"clean": recipe.speech, "noise": recipe.noise, "rir": recipe.rooms}
    subsets = {"train_pairs": recipe.pairs, "test_webdataset": recipe.test_pairs}
    tars = {role: _tars(corpus, pattern) for role, pattern in roles.items()}
    pair_tars = {subset: _tars(corpus, pattern) for subset, pattern in subsets.items()}
    _check_named(corpus, [tar for names in (*tars.values(), *pair_tars.values()) for tar in names])

    files: list[tuple[str, int]] = []
    sources: list[Source] = []
    rejected: list[Rejection] = []
    halves: Halves = {}
    for role, names in tars.items():
        for path, size in _audio_members(corpus, names):
            files.append((path, size))
            sources.append(Source(path, role, group_of(role, path)))
    for subset, names in pair_tars.items():
        for path, size in _audio_members(corpus, names):
            files.append((path, size))
            key, side = _pair_half(path, recipe)
            if side is None:
                detail = f"is neither .{recipe.clean} nor .{recipe.noisy}"
                rejected.append(Rejection(path, subset, "not-used", detail))
            else:
                halves.setdefault((subset, key), {}).setdefault(side, []).append(path)
    listing = Listing(corpus, len(files), fingerprint_of(files), sources, rejected=rejected)
    match_pairs(listing, halves, lambda subset: subset)
    if not listing.sources and not listing.pairs:
        raise UserError(f"the tars of {corpus} hold no recordings and no pairs in WAV or FLAC")
    return listing


def _tars(corpus: Path, pattern: str) -> list[str]:
    """The tars that a pattern with braces and globs names, relative to the corpus and sorted."""
    names: set[str] = set()
    for part in expand(pattern) if pattern else ():
        if part.startswith("/") or ".." in part.split("/"):
            raise UserError(f"{part}: name tars by patterns below the corpus {corpus}")
        tars = [path for path in corpus.glob(part) if path.suffix == ".tar" and path.is_file()]
        if not tars:
            raise UserError(f"{corpus} has no tar called {part}")
        names.update(path.relative_to(corpus).as_posix() for path in tars)
    return sorted(names)


def _check_named(corpus: Path, tars: list[str]) -> None:
    if not tars:
        raise UserError(
            f"which tars of {corpus} hold what? give --speech and --noise, or --pairs: 'speech/*.tar'"
        )
    if twice := [tar for tar in tars if tars.count(tar) > 1]:
        raise UserError(f"{corpus / twice[0]} is named for two purposes: name every tar once")


def _audio_members(corpus: Path, tars: list[str]) -> Iterator[tuple[str, int]]:
    """(path, bytes) of every audio member."""
    for tar in tars:
        for name, recording in sorted(tar_recordings(corpus / tar).items()):
            if name.lower().endswith(SUFFIXES):
                yield f"{tar}/{name}", recording.size


def _pair_half(path: str, recipe: WebDatasetRecipe) -> tuple[str, Side | None]:
    """(key, side) of a member of a pair: ``a.noisy.flac`` is the noisy side of ``a``."""
    folder, _, name = path.rpartition("/")
    key, _, extension = name.partition(".")
    field = re.sub(r"\.?(wav|flac)$", "", extension.lower())
    sides: dict[str, Side] = {recipe.clean.lower(): "clean", recipe.noisy.lower(): "noisy"}
    return f"{folder}/{key}", sides.get(field)
