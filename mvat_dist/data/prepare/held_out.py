"""Hold speakers, noises or pairs out of training, and plan the validation clips that are mixed from them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mvat_dist.data.prepare.corpora import Pair, Rejection, Source
from mvat_dist.data.prepare.recipes import DnsRecipe
from mvat_dist.data.prepare.utterances import Signal, Utterance, ValidationMix

VALID = "valid"
TRAIN_PAIRS = "train_pairs"
VALID_SNR_DB = (0.0, 20.0)
VALID_LEVEL_DBFS = (-35.0, -15.0)
VALID_REUSE = 4
"""Most mixtures made of one held-out piece of speech."""


@dataclass
class HeldOut:
    """Recordings for validation (`used`), and the paths of those that training must not see (`held`)."""

    used: list[Source]
    held: set[str]


def hold_out(role: str, sources: Iterable[Source], recipe: DnsRecipe, notes: list[str]) -> HeldOut:
    """Choose speakers or noise recordings for validation; a single recording stays in training, too."""
    candidates = [source for source in sources if source.role == role]
    chosen = _choose({source.path: source.group for source in candidates}, recipe)
    if not chosen:
        what = "speech" if role == "clean" else "noise"
        notes.append(f"there is only one {what} recording: validation uses the one that training uses")
        return HeldOut(candidates, set())
    return HeldOut([source for source in candidates if source.path in chosen], chosen)


def hold_out_pairs(pairs: Sequence[Pair], recipe: DnsRecipe, notes: list[str]) -> list[Pair]:
    """Make some of the training pairs validation pairs; returns all pairs."""
    chosen = _choose({pair.noisy: pair.group for pair in pairs if pair.subset == TRAIN_PAIRS}, recipe)
    if chosen:
        notes.append(
            "validation pairs are apart from training in speakers, as far as names tell, not in noise"
        )
    return [
        Pair(pair.clean, pair.noisy, VALID, pair.group) if pair.noisy in chosen else pair for pair in pairs
    ]


def without_speakers(pairs: Iterable[Pair], held: set[str], rejected: list[Rejection]) -> list[Pair]:
    """Leave out training pairs of speakers that are held out, and add them to `rejected`."""
    kept = []
    for pair in pairs:
        if pair.subset == TRAIN_PAIRS and pair.group in held:
            for path in (pair.clean, pair.noisy):
                rejected.append(Rejection(path, pair.subset, "held-out-speaker", pair.group))
        else:
            kept.append(pair)
    return kept


def mixtures(
    speech: Sequence[tuple[Source, Signal]], noise: Sequence[tuple[Source, Signal]], recipe: DnsRecipe
) -> list[Utterance]:
    """Validation clips: pieces of speech, each with a random piece of a random noise recording."""
    random = np.random.default_rng([recipe.seed, 1])
    recordings: dict[str, list[Signal]] = {}
    for source, signal in noise:
        recordings.setdefault(source.group, []).append(signal)
    names = sorted(recordings)
    order = [index for _ in range(VALID_REUSE) for index in random.permutation(len(speech)).tolist()]
    clips = []
    for index in order[: recipe.valid_clips]:
        source, speech_signal = speech[index]
        recording = recordings[names[random.integers(len(names))]]
        noise_signal = recording[random.integers(len(recording))]
        snr_db, level_dbfs = random.uniform(*VALID_SNR_DB), random.uniform(*VALID_LEVEL_DBFS)
        mixing = ValidationMix(snr_db, level_dbfs, recipe.valid_seconds, int(random.integers(2**32)))
        clips.append(Utterance(source.group, (speech_signal, noise_signal), mixing))
    return clips


def stable_hash(seed: int, name: str) -> bytes:
    """Eight bytes that depend on seed and name alone, in any process on any machine."""
    return hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _choose(groups: Mapping[str, str], recipe: DnsRecipe) -> set[str]:
    """Files to hold out of `groups` (file -> group): complete groups, until there are enough; never all.

    Groups are taken in the order of a hash, so that a group keeps its place when the corpus grows.
    """
    names = set(groups.values())
    if len(names) == 1:  # names that differ in nothing but a number: each file is its own group
        groups = {path: path for path in groups}
        names = set(groups)
    if len(names) < 2:
        return set()
    sizes = Counter(groups.values())
    most = min(max(1, round(recipe.valid_fraction * len(names))), len(names) - 1)
    chosen: set[str] = set()
    files = 0
    for name in sorted(names, key=lambda name: stable_hash(recipe.seed, name))[:most]:
        if files >= recipe.valid_clips:
            break
        chosen.add(name)
        files += sizes[name]
    return {path for path, name in groups.items() if name in chosen}
