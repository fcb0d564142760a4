"""Plan what is left out, what is held out and which shard holds what, before anything is written.

A plan depends on the corpus and the recipe alone. So any number of workers, in any order, and a run that was
interrupted in between, write the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mvat_dist.data.prepare.corpora import Listing, Pair, Rejection, Source
from mvat_dist.data.prepare.held_out import (
    VALID,
    hold_out,
    hold_out_pairs,
    mixtures,
    stable_hash,
    without_speakers,
)
from mvat_dist.data.prepare.inspection import Inspection
from mvat_dist.data.prepare.reading import Reason
from mvat_dist.data.prepare.recipes import DnsRecipe, Recipe
from mvat_dist.data.prepare.utterances import Signal, Utterance
from mvat_dist.data.shards.format import Kind
from mvat_dist.errors import UserError

LENGTH_TOLERANCE = 0.01
"""Seconds by which two halves of a pair may differ; both are cut to the shorter."""
KEPT_IN_TESTS: tuple[Reason, ...] = ("clipped", "too-short")
"""A test set stays complete, so that scores can be compared: only what cannot be scored is left out of it."""

_END_OF_TAR = 10240


@dataclass
class SubsetPlan:
    """The shards of one subset."""

    name: str
    kind: Kind
    shards: list[list[Utterance]]


@dataclass
class Plan:
    """Everything that packing will write."""

    subsets: list[SubsetPlan]
    rejected: list[Rejection]
    counts: dict[str, int]
    """Files: found = packed + held_out + rejected."""
    notes: list[str]
    """What the user should know before training."""

    @property
    def digest(self) -> str:
        """Hash of everything that decides the bytes of the shards."""
        digest = hashlib.blake2b(digest_size=16)
        for subset in self.subsets:
            for number, shard in enumerate(subset.shards):
                for utterance in shard:
                    digest.update(
                        f"{subset.name} {number} {utterance!r}\n".encode("utf-8", "surrogateescape")
                    )
        return digest.hexdigest()


def make_plan(listing: Listing, inspections: Mapping[str, Inspection], recipe: Recipe) -> Plan:
    """Sort the inspected files of a corpus into subsets and shards.

    Raises:
        UserError: not one file can be packed.
    """
    rejected = list(listing.rejected)
    notes: list[str] = []
    sources = _usable_sources(listing.sources, inspections, rejected)
    pairs = _usable_pairs(listing.pairs, inspections, rejected)
    if not sources and not pairs:
        raise UserError(_nothing_left(listing, rejected))
    contents: dict[str, list[Utterance]] = {}
    held: set[str] = set()
    validating = recipe if isinstance(recipe, DnsRecipe) and recipe.validates else None
    if validating and {"clean", "noise"} <= {source.role for source in sources}:
        speech, noise = (hold_out(role, sources, validating, notes) for role in ("clean", "noise"))
        held = speech.held | noise.held
        speech_signals, noise_signals = (
            [(source, signal) for source in part.used for signal in signals(source, inspections)]
            for part in (speech, noise)
        )
        contents[VALID] = mixtures(speech_signals, noise_signals, validating)
        held_speakers = {source.group for source in sources if source.path in held}
        pairs = without_speakers(pairs, held_speakers, rejected)
    elif validating:
        pairs = hold_out_pairs(pairs, validating, notes)
    for source in (source for source in sources if source.path not in held):
        for signal in signals(source, inspections):
            contents.setdefault(f"train_{source.role}", []).append(Utterance(source.group, (signal,)))
    for pair in pairs:
        halves = tuple(full_signal(inspections[path]) for path in (pair.clean, pair.noisy))
        contents.setdefault(pair.subset, []).append(Utterance(pair.group, halves))
    subsets = [_deal(name, contents[name], recipe) for name in sorted(contents, key=_order)]
    counts = _count(listing, sources, pairs, held, rejected)
    return Plan(
        subsets, sorted(rejected, key=lambda rejection: rejection.path), counts, notes + _warnings(contents)
    )


def signals(source: Source, inspections: Mapping[str, Inspection]) -> list[Signal]:
    """The pieces of a recording to pack; a single one where it is short."""
    file = inspections[source.path]
    return [
        Signal(file.path, *piece, file.rate, file.channels, file.content, source.role == "rir")
        for piece in file.pieces
    ]


def full_signal(file: Inspection) -> Signal:
    """All of one half of a pair."""
    return Signal(file.path, 0, file.frames, file.rate, file.channels, file.content)


def _warnings(contents: Mapping[str, object]) -> list[str]:
    """Reasons why these subsets cannot be trained with as they are."""
    warnings = []
    if ("train_clean" in contents) != ("train_noise" in contents):
        missing = "noise" if "train_clean" in contents else "clean speech"
        warnings.append(f"there is no {missing}: the sources cannot be mixed")
    if any(name.startswith("train_") for name in contents) and VALID not in contents:
        warnings.append("there is no subset `valid`: give training another pairs subset with --data.valid")
    return warnings


def _usable_sources(
    sources: Iterable[Source], inspections: Mapping[str, Inspection], rejected: list[Rejection]
) -> list[Source]:
    """The sources without fault; of equal ones the first."""
    first: dict[tuple[str, bytes], str] = {}
    usable = []
    for source in sources:
        file = inspections[source.path]
        if file.reason:
            rejected.append(Rejection(source.path, source.role, file.reason, file.detail))
        elif (equal := first.setdefault((source.role, file.content), source.path)) != source.path:
            rejected.append(Rejection(source.path, source.role, "duplicate", f"of {equal}"))
        else:
            usable.append(source)
    return usable


def _usable_pairs(
    pairs: Iterable[Pair], inspections: Mapping[str, Inspection], rejected: list[Rejection]
) -> list[Pair]:
    """The pairs without fault; of equal noisy files the first, those of test sets before all others."""
    first: dict[bytes, Pair] = {}
    usable = []
    for pair in sorted(pairs, key=lambda pair: (not pair.subset.startswith("test_"), pair.noisy)):
        faults = _faults(pair, inspections)
        noisy = inspections[pair.noisy].content
        if not faults and first.setdefault(noisy, pair) is not pair:
            faults = {pair.noisy: ("duplicate", f"of {first[noisy].noisy}")}
        for path in (pair.clean, pair.noisy) if faults else ():
            reason, detail = faults.get(path, ("unmatched", "its other half is left out"))
            rejected.append(Rejection(path, pair.subset, reason, detail))
        if not faults:
            usable.append(pair)
    return usable


def _faults(pair: Pair, inspections: Mapping[str, Inspection]) -> dict[str, tuple[Reason, str]]:
    """Path -> (reason, detail) of each bad half of a pair; empty where it can be packed."""
    tolerated = KEPT_IN_TESTS if pair.subset.startswith("test_") else ()
    halves = [inspections[pair.clean], inspections[pair.noisy]]
    faults = {
        half.path: (half.reason, half.detail)
        for half in halves
        if half.reason and half.reason not in tolerated
    }
    if not faults:
        clean, noisy = (half.frames / half.rate for half in halves)
        if abs(clean - noisy) > LENGTH_TOLERANCE:
            detail = f"clean has {clean:.3f} s, noisy {noisy:.3f} s"
            return {half.path: ("length-mismatch", detail) for half in halves}
    return faults


def _nothing_left(listing: Listing, rejected: Sequence[Rejection]) -> str:
    reasons = Counter(rejection.reason for rejection in rejected)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    example = next((rejection for rejection in rejected if rejection.reason != "not-used"), rejected[0])
    return (
        f"nothing in {listing.corpus} can be packed: all {listing.found} audio files are left out ({why}), "
        f"for example {example.path}: {example.reason}, {example.detail}"
    )


def _count(
    listing: Listing,
    sources: Sequence[Source],
    pairs: Sequence[Pair],
    held: set[str],
    rejected: Sequence[Rejection],
) -> dict[str, int]:
    """Count files by what became of them, and check that the counts add up."""
    valid = sum(pair.subset == VALID for pair in pairs)
    packed = len(sources) - len(held) + 2 * (len(pairs) - valid)
    counts = {
        "found": listing.found,
        "packed": packed,
        "held_out": len(held) + 2 * valid,
        "rejected": len(rejected),
    }
    assert counts["found"] == counts["packed"] + counts["held_out"] + counts["rejected"], counts
    return counts


def _order(name: str) -> tuple[int, str]:
    """Training subsets, then `valid`, then the tests."""
    return (["train", VALID, "test"].index(name.split("_")[0]), name)


def _deal(name: str, utterances: Sequence[Utterance], recipe: Recipe) -> SubsetPlan:
    """Shuffle the utterances of a subset, and fill one shard after the other.

    A corpus is sorted by speaker and by source, and a shard should be a fair sample of it.
    """
    random = np.random.default_rng([recipe.seed, int.from_bytes(stable_hash(0, name), "little")])
    largest = recipe.max_shard_size * 1e6 - _END_OF_TAR
    if name in ("train_clean", "train_pairs"):
        largest = min(largest, sum(utterance.largest_bytes for utterance in utterances) / recipe.min_shards)
    shards: list[list[Utterance]] = [[]]
    filled = 0
    for index in random.permutation(len(utterances)):
        utterance = utterances[index]
        if shards[-1] and filled + utterance.largest_bytes > largest:
            shards.append([])
            filled = 0
        shards[-1].append(utterance)
        filled += utterance.largest_bytes
    kind: Kind = "sources" if name in ("train_clean", "train_noise", "train_rir") else "pairs"
    return SubsetPlan(name, kind, shards)
