"""List the files of a corpus: which is speech, noise, a room, or half of a pair.

Nothing is opened here. Every WAV or FLAC file below the corpus ends up in exactly one of the lists
of a `Listing`, so packed files and files left out add up to all files.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mvat_dist.data.prepare.reading import Reason
from mvat_dist.errors import UserError

SUFFIXES = (".wav", ".flac")
Role = Literal["clean", "noise", "rir"]
Side = Literal["clean", "noisy"]
Halves = dict[tuple[str, str], dict[Side, list[str]]]
"""(folder or set, name of the pair) -> side -> files."""


@dataclass(frozen=True, slots=True)
class Source:
    """A recording for dynamic mixing."""

    path: str
    role: Role
    group: str
    """Files of one group stay together in training or validation: a speaker, a noise recording."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A pre-mixed recording, and its clean speech."""

    clean: str
    noisy: str
    subset: str
    group: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """A file that is left out, and why."""

    path: str
    role: str
    reason: Reason
    detail: str


@dataclass
class Listing:
    """The files of a corpus. Paths are relative to it, with forward slashes, in sorted order."""

    corpus: Path
    found: int
    """WAV and FLAC files below the corpus."""
    fingerprint: str
    """Hash of all their paths and sizes."""
    sources: list[Source] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def list_dns(corpus: Path) -> Listing:
    """List a corpus in DNS-Challenge layout: sources, training pairs and test sets, anywhere below `corpus`.

    - below ``clean_fullband`` or ``clean``, ``noise_fullband`` or ``noise``, ``impulse_responses``: sources;
    - ``noisy`` and ``clean`` side by side: pairs, matched by ``fileid_N`` at the end of the name, or by the
      full name where there is no such number;
    - pairs below a folder named like ``test_set`` or ``dev_testset``: the test set ``test_<name>``.

    Raises:
        UserError: no such folder, or nothing in it that this layout knows.
    """
    paths, fingerprint = _find(corpus)
    listing = Listing(corpus, len(paths), fingerprint)
    folders = {folder for path in paths for folder in _parents(path)}
    halves: Halves = {}
    for path in paths:
        if half := _dns_half(path, folders):
            side, place = half
            inside = path[len(_join(place, side)) + 1 :]
            halves.setdefault((place, pair_name(inside)), {}).setdefault(side, []).append(path)
        elif role := _dns_source(path, folders):
            listing.sources.append(Source(path, role, sys.intern(group_of(role, path))))
        else:
            detail = "in no folder that the DNS-Challenge layout trains or tests with"
            listing.rejected.append(Rejection(path, "none", "not-used", detail))
    tests = _test_names(corpus, {place for place, _ in halves})
    match_pairs(listing, halves, lambda place: tests.get(place, "train_pairs"))
    if not listing.sources and not listing.pairs:
        raise UserError(_nothing_found(corpus, paths, "DNS-Challenge", _DNS_LAYOUT))
    return listing


_DNS_LAYOUT = (
    "clean_fullband/, noise_fullband/ and impulse_responses/ with recordings, or noisy/ and clean/ side by "
    "side with names ending in fileid_N"
)
_DNS_SOURCES: dict[str, Role] = {
    "clean_fullband": "clean",
    "noise_fullband": "noise",
    "impulse_responses": "rir",
    "clean": "clean",
    "noise": "noise",
}
_TEST_CORPORA = ("test_set", "testset", "dev_testset")
_TEST_FOLDER = re.compile(r"(^|[_-])test([_-]?sets?)?($|[_-])|testsets?")


def _dns_half(path: str, folders: set[str]) -> tuple[Side, str] | None:
    """(side, folder with both sides) of a file that lies in ``noisy`` beside ``clean``, or the reverse."""
    for folder in _parents(path):
        above, _, name = folder.rpartition("/")
        if name in ("clean", "noisy") and _holds_pairs(above, folders):
            return ("clean" if name == "clean" else "noisy"), above
    return None


def _dns_source(path: str, folders: set[str]) -> Role | None:
    """The role of a recording; None for anything inside a test set."""
    for folder in reversed([*_parents(path)]):
        above, _, name = folder.rpartition("/")
        if _TEST_FOLDER.search(name.lower()):
            return None
        if name == "noise" and _holds_pairs(above, folders):
            return None  # the synthesizer's third output: noisy minus clean
        if role := _DNS_SOURCES.get(name.lower()):
            return role
    return None


def _holds_pairs(folder: str, folders: set[str]) -> bool:
    return {_join(folder, "clean"), _join(folder, "noisy")} <= folders


def group_of(role: Role, path: str) -> str:
    """The group of a recording: its speaker, or its name without a number at the end."""
    return speaker(path) if role == "clean" else re.sub(r"_\d+$", "", path.rsplit(".", 1)[0])


def speaker(path: str) -> str:
    """The speaker as far as the file name tells, else the file itself.

    Known are LibriVox readers as DNS names them (``..._reader_06709_...``), LibriSpeech
    (``1034-121119-0000``), VCTK and Valentini (``p226_001``) and CREMA-D (``1001_DFA_ANG_XX``).
    """
    stem = Path(path).stem
    for pattern in (r"(reader_\d+)", r"^(\d+)-\d+-\d+", r"^([ps]\d+)_\d+", r"^(\d{4})_[A-Z]{3}_[A-Z]{3}_"):
        if known := re.search(pattern, stem):
            return known.group(1)
    return path.rsplit(".", 1)[0]


def collection(path: str) -> str:
    """The collection that a file belongs to: the folder of its role and the next one below.

    Where nothing lies below, or no role is known, it is the last two folders. Recordings in a tar belong to
    the collection of the tar.
    """
    folders = path.partition(".tar/")[0].split("/")[:-1]
    for depth, name in enumerate(folders[:-1]):
        if name.lower() in _DNS_SOURCES:
            return "/".join(folders[depth : depth + 2])
    return "/".join(folders[-2:]) or "."


def pair_name(path: str) -> str:
    """The common name of both halves of a pair: their folder, and ``fileid_N`` or the stem."""
    folder, _, name = path.rpartition("/")
    stem = name.rsplit(".", 1)[0]
    known = re.search(r"fileid_(\d+)$", stem)
    return _join(folder, f"fileid_{int(known.group(1))}" if known else stem)


def _test_names(corpus: Path, places: Iterable[str]) -> dict[str, str]:
    """Folder with pairs of a test set -> ``test_<name>``, with the full path where names clash."""
    tests: dict[str, tuple[str, str]] = {}
    for place in places:
        parts = place.split("/")
        if any(_TEST_FOLDER.search(part.lower()) for part in parts) or corpus.name in _TEST_CORPORA:
            tests[place] = _name(parts[-1] or corpus.name), _name(place)
    short = Counter(name for name, _ in tests.values())
    return {
        place: "test_" + (name if short[name] == 1 else full).removeprefix("test_")
        for place, (name, full) in tests.items()
    }


def list_valentini(corpus: Path, trainsets: Iterable[str], valid_speakers: Iterable[str]) -> Listing:
    """List VoiceBank+DEMAND (Valentini-Botinhao): ``{clean,noisy}_<set>_wav``, at any depth.

    Args:
        corpus: folder anywhere above the sets.
        trainsets: of ``trainset_28spk`` and ``trainset_56spk``, those to train with.
        valid_speakers: their training utterances become `valid`.

    Raises:
        UserError: no such folder, or none of the wanted sets in it.
    """
    paths, fingerprint = _find(corpus)
    listing = Listing(corpus, len(paths), fingerprint)
    wanted, valid = {*trainsets, "testset"}, set(valid_speakers)
    halves: Halves = {}
    for path in paths:
        side, name = _valentini_half(path)
        if side and name in wanted:
            halves.setdefault((name, Path(path).stem), {}).setdefault(side, []).append(path)
        else:
            detail = f"{name} was not asked for" if side else "in no folder of the Valentini layout"
            listing.rejected.append(Rejection(path, "none", "not-used", detail))
    match_pairs(listing, halves, lambda name: "test_valentini" if name == "testset" else "train_pairs")
    listing.pairs = [_held_out(pair, valid) for pair in listing.pairs]
    if not listing.pairs:
        raise UserError(_nothing_found(corpus, paths, "Valentini", _VALENTINI_LAYOUT))
    return listing


_VALENTINI_LAYOUT = (
    "clean_<set>_wav/ and noisy_<set>_wav/ with <set> trainset_28spk, trainset_56spk or testset"
)


def _valentini_half(path: str) -> tuple[Side | None, str]:
    for folder in _parents(path):
        name = folder.rpartition("/")[2]
        if known := re.fullmatch(r"(clean|noisy)_(trainset_28spk|trainset_56spk|testset)_wav", name):
            return ("clean" if known.group(1) == "clean" else "noisy"), known.group(2)
    return None, ""


def _held_out(pair: Pair, valid_speakers: set[str]) -> Pair:
    held_out = pair.subset == "train_pairs" and pair.group in valid_speakers
    return Pair(pair.clean, pair.noisy, "valid", pair.group) if held_out else pair


def match_pairs(listing: Listing, halves: Halves, subset: Callable[[str], str]) -> None:
    """Turn files of the same place and name into pairs; reject those without exactly one counterpart."""
    for (place, name), sides in halves.items():
        clean, noisy = sides.get("clean", []), sides.get("noisy", [])
        if len(clean) == len(noisy) == 1:
            listing.pairs.append(Pair(clean[0], noisy[0], subset(place), speaker(noisy[0])))
            continue
        detail = f"{len(clean)} clean and {len(noisy)} noisy files are called {name}"
        for path in sorted(clean + noisy):
            listing.rejected.append(Rejection(path, subset(place), "unmatched", detail))


def _find(corpus: Path) -> tuple[list[str], str]:
    """Sorted relative paths of all audio files below `corpus`, and a hash of the paths and sizes."""
    if not corpus.is_dir():
        raise UserError(f"no such corpus folder: {corpus}")
    files = sorted(audio_files(str(corpus)))
    return [path for path, _ in files], fingerprint_of(files)


def fingerprint_of(files: Iterable[tuple[str, int]]) -> str:
    """Hash of the paths and sizes of a corpus's audio files."""
    digest = hashlib.blake2b(digest_size=16)
    for path, size in files:
        digest.update(f"{path}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def audio_files(corpus: str, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of every audio file; linked folders are followed, each folder at most once."""
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        status = os.stat(os.path.join(corpus, folder))  # noqa: PTH116, PTH118 - a Path per file is slow
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(corpus, folder)) as entries:  # noqa: PTH118
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                path = _join(folder, entry.name)
                if entry.is_dir():
                    waiting.append(path)
                elif entry.name.lower().endswith(suffixes):
                    # A dangling link is listed too: inspection reports that it cannot be read.
                    yield path, entry.stat().st_size if entry.is_file() else -1


def _nothing_found(corpus: Path, paths: list[str], name: str, layout: str) -> str:
    if not paths:
        return f"{corpus} holds no WAV or FLAC file; the {name} layout is {layout}"
    tops = Counter("/".join(path.split("/")[:-1][:2]) or "." for path in paths)
    seen = ", ".join(f"{folder} ({count})" for folder, count in tops.most_common(4))
    return (
        f"nothing in {corpus} is in the {name} layout: looked for {layout}; found {len(paths)} audio files, "
        f"in {seen}"
    )


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rsplit("/", 1)[0]
        yield path


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _name(text: str) -> str:
    return re.sub(r"[^0-9a-z]+", "_", text.lower()).strip("_")
