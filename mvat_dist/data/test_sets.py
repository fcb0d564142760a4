"""The test sets of a place: packed shards, DNS and Valentini corpora as they come, any two folders."""

from __future__ import annotations

from pathlib import Path

from mvat_dist.config import locations
from mvat_dist.data.clips import FilePairs, ValidationClips
from mvat_dist.data.prepare import corpora
from mvat_dist.data.shards.corpus import Corpus, locate
from mvat_dist.data.shards.manifest import Folder, is_corpus
from mvat_dist.data.shards.remote_cache import MANIFEST, Cache
from mvat_dist.errors import UserError

TestSets = dict[str, ValidationClips]
"""By name, in the order of the tables."""

SUFFIXES = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")
"""Endings of the audio files in a pair of folders."""


def held_out(data: Path | str, limit: int, max_seconds: float, cache: Cache | None = None) -> TestSets:
    """The held-out clips below `data`.

    Args:
        data: folder, URL or pattern: a packed corpus (its ``test_*`` subsets, else ``valid``), a packed
            subset, a corpus in the DNS or Valentini layout (its test sets), or ``noisy`` beside ``clean``.
        limit: most clips of a set, as for `ValidationClips`.
        max_seconds: of each clip, as for `ValidationClips`.
        cache: for copies of what lies at a URL; None is the default one.

    Raises:
        UserError: no such folder, no held-out pairs in it, or damaged shards.
    """
    cache = cache or Cache()
    folders = locate("--data", data, cache)
    first, name = folders[0], locations.name(str(folders[0]))
    sets: dict[str, list[Folder] | FilePairs] = {name: folders}
    if is_corpus(first):
        sets = {**_of_corpus(Corpus("--data", data, cache), data)}
    elif len(folders) == 1 and isinstance(first, Path) and not (first / MANIFEST).is_file():
        sets = {**_as_they_come(first, name)}
    return {
        name: ValidationClips(pairs, limit=limit, max_seconds=max_seconds) for name, pairs in sets.items()
    }


def _of_corpus(corpus: Corpus, data: Path | str) -> dict[str, list[Folder]]:
    names = corpus.names
    tests = [name for name in names if name.startswith("test_")] or [n for n in names if n == "valid"]
    if not tests:
        raise UserError(f"{data} has no subset test_* or valid to score on; it has {', '.join(names)}")
    return {name: corpus.subset(name) for name in tests}


def _as_they_come(folder: Path, name: str) -> dict[str, FilePairs]:
    """Test sets by name; where a folder has pairs, but none of them in a test set, a set for each place."""
    try:
        pairs = corpora.list_valentini(folder, trainsets=(), valid_speakers=()).pairs
    except UserError:
        pairs = corpora.list_dns(folder).pairs
    if not pairs:
        raise UserError(
            f"{folder} has no pairs of noisy and clean recordings: give a corpus or its test set, or two "
            "folders with --noisy and --clean"
        )
    tests = [pair for pair in pairs if pair.subset.startswith("test_")]
    sets: dict[str, list[tuple[str, str]]] = {}
    for pair in tests or pairs:
        place = pair.subset if tests else f"/{pair.noisy}".rpartition("/noisy/")[0].strip("/")
        sets.setdefault(place.replace("/", "_") or name, []).append((pair.noisy, pair.clean))
    return {place: FilePairs(folder, folder, sets[place]) for place in sorted(sets)}


def folder_pair(noisy: Path, clean: Path, limit: int, max_seconds: float) -> tuple[TestSets, list[str]]:
    """The clips that two folders hold both halves of, and the files that have no counterpart.

    Files belong together by their place below the folders and their name without its ending, or by the
    ``fileid_N`` at the end of it, as in DNS.

    Raises:
        UserError: a folder that is not there, or no file with a counterpart.
    """
    ours, theirs = _by_name("--noisy", noisy), _by_name("--clean", clean)
    matched = [key for key in ours if len(ours[key]) == len(theirs.get(key, [])) == 1]
    if not matched:
        raise UserError(
            f"no file in {noisy} ({_count(ours)} audio files) has its twin in {clean} ({_count(theirs)}): "
            "the halves of a pair need equal names, or names ending in the same fileid_N"
        )
    chosen = set(matched)
    unmatched = [
        str(folder / path)
        for folder, files in ((noisy, ours), (clean, theirs))
        for key, paths in files.items()
        if key not in chosen
        for path in paths
    ]
    pairs = FilePairs(noisy, clean, [(ours[key][0], theirs[key][0]) for key in matched])
    clips = ValidationClips(pairs, limit=limit, max_seconds=max_seconds)
    return {pair_name(noisy): clips}, unmatched


def pair_name(noisy: Path) -> str:
    """The name of a pair of folders: the noisy one's, or where that is just ``noisy``, its parent's."""
    folder = noisy.resolve()
    return locations.name(str(folder.parent if folder.name == "noisy" else folder))


def _by_name(option: str, folder: Path) -> dict[str, list[str]]:
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: no such folder")
    files: dict[str, list[str]] = {}
    for path, _ in sorted(corpora.audio_files(str(folder), SUFFIXES)):
        files.setdefault(corpora.pair_name(path), []).append(path)
    return files


def _count(files: dict[str, list[str]]) -> int:
    return sum(map(len, files.values()))
