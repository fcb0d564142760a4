"""The training segments of a packed corpus, each a pure function of its place.

A bad sample, an utterance whose stored bytes are damaged, is fatal or skipped: then another segment takes the
place of each one that needs it, the same on every rank, and `BadSampleLimit` ends a run with too many.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.mixing.augment import degrade
from mvat_dist.data.mixing.checks import Mode, check_config, reads_rooms, training_mode
from mvat_dist.data.mixing.dynamic import DynamicMixing
from mvat_dist.data.mixing.fingerprint import choices
from mvat_dist.data.mixing.premixed import PremixedPairs
from mvat_dist.data.mixing.sampler import LARGEST_SEED, CounterRandom, epoch_permutation
from mvat_dist.data.mixing.segments import Segment, SegmentFactory, segment_length
from mvat_dist.data.shards.corpus import Corpus, open_subset
from mvat_dist.data.shards.format import ShardError
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.data.shards.targets import TeacherCache
from mvat_dist.errors import UserError

SUBSTITUTES = 8
"""Segments tried in place of one that needs a bad sample."""

_NAMED_AT_FIRST = 10
_logger = logging.getLogger(__name__)


class TrainingData:
    """The training segments of a packed corpus. Picklable; holds no random state.

    The segments are either made anew in every epoch, or there is a fixed number of them, `variants` of every
    item, which the epochs take in turn. In the second case they can be numbered and cached: segment
    ``variant * N + item`` is that item in the epochs of which `variant` is the remainder.

    Attributes:
        mode: `dynamic` or `premixed`.
        iterated: the subset whose utterances are visited in turn.
        variants: different segments of every item; 0 where every epoch makes new ones. A grid of pairs to
            which nothing random is done has 1, whatever was asked for.
    """

    def __init__(self, config: DataConfig, seed: int, teacher_cache: TeacherCache | None = None) -> None:
        """Open the corpus at ``config.train``; reads manifests and indices, no audio.

        Args:
            config: what is read and how segments are made.
            seed: of the order and of every choice.
            teacher_cache: segments then carry their teacher targets.

        Raises:
            UserError: a value that makes no sense, no packed corpus, one that lacks what `config` asks for,
                or a cache of other segments.
        """
        check_config(config)
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seed {seed}: choose one from 0 to {LARGEST_SEED}")
        self.config = config
        self.seed = seed
        self.mode = training_mode(config)
        self._factory = _open_factory(config, self.mode)
        self.iterated = self._factory.iterated
        self._fixed = self._factory.fixed and config.bandwidth_probability == config.codec_probability == 0.0
        self.variants = 1 if self._fixed else config.variants
        self._teacher_cache = teacher_cache
        if teacher_cache is not None:
            self.check_numbered()
            teacher_cache.check(self.fingerprint())

    def __len__(self) -> int:
        """Items per epoch: clean utterances, pairs, or places of the grid of segments."""
        return len(self._factory)

    @property
    def segments_per_corpus(self) -> int | None:
        """How many different segments there are, V * N; None where every epoch makes new ones."""
        return self.variants * len(self) if self.variants else None

    @property
    def utterances(self) -> NDArray[np.int64]:
        """(N,) the utterance, by its place in `iterated`, that each item begins with."""
        return self._factory.utterances

    def check_numbered(self) -> None:
        """Refuse segments that are made anew in every epoch, which no teacher cache can hold.

        Raises:
            UserError: with what would fix them.
        """
        if not self.variants:
            raise UserError(
                "a teacher cache needs segments that return, and every epoch would make new ones: give "
                "--data.variants N for N fixed segments of every utterance, or, with pairs, a grid without "
                "anything random (--data.stride_seconds 4 --data.tempo_probability 0)"
            )

    def segment_number(self, epoch: int, position: int) -> int | None:
        """Number of the segment at `position` of `epoch`; None where every epoch makes new ones."""
        if not self.variants:
            return None
        return epoch % self.variants * len(self) + self._item_at(epoch, position)

    def segment(self, number: int) -> Segment:
        """Segment `number`, 0 to ``segments_per_corpus - 1``: a pure function, wherever it is called.

        Raises:
            ShardError: a bad sample, where the configuration does not skip them.
        """
        if number not in range(self.segments_per_corpus or 0):
            raise IndexError(f"segment {number} of {self.segments_per_corpus}")
        return self._skip_bad_samples(partial(self._numbered, number))

    def item(self, epoch: int, position: int) -> Segment:
        """The segment at `position` (0 to N - 1) of `epoch`: a pure function, wherever it is called.

        Its recipe has ``mode``, ``epoch``, ``position`` and ``segment``, its number or None,
        ``bandwidth_hz`` and ``codec`` (`augment.degrade`), and what `DynamicMixing` or `PremixedPairs` adds.
        ``bad_samples`` has a line, with shard and key, for each bad sample that was met: the segment is a
        substitute where there are any.

        Raises:
            ShardError: a bad sample, where the configuration does not skip them.
        """
        number = self.segment_number(epoch, position)
        if number is not None:
            segment = self.segment(number)
        else:
            segment = self._skip_bad_samples(partial(self._new, epoch, position))
        place = {"mode": self.mode, "epoch": epoch, "position": position, "segment": None}
        return replace(segment, recipe=place | segment.recipe)

    def _item_at(self, epoch: int, position: int) -> int:
        return int(epoch_permutation(self.seed, epoch, len(self))[position])

    def _new(self, epoch: int, position: int, attempt: int) -> Segment:
        """The segment at a place of an epoch; at the second and later attempts of a random item."""
        random = CounterRandom(self.seed, epoch, position, attempt=attempt)
        item = random.integer(len(self)) if attempt else self._item_at(epoch, position)
        return self._make(item, random)

    def _numbered(self, number: int, attempt: int) -> Segment:
        """Segment `number`; at the second and later attempts a random one with its own teacher targets."""
        if attempt:
            variant, item = divmod(number, len(self))
            random = CounterRandom(self.seed, variant, item, "variant", attempt)
            number = random.integer(self.variants * len(self))
        variant, item = divmod(number, len(self))
        segment = self._make(item, CounterRandom(self.seed, variant, item, "variant"))
        cache = self._teacher_cache
        targets = cache.read(number, segment.noisy) if cache is not None else None
        recipe = {"mode": self.mode, "segment": number} | segment.recipe
        return replace(segment, recipe=recipe, teacher_targets=targets)

    def _make(self, item: int, random: CounterRandom) -> Segment:
        segment = self._factory.make(item, random)
        noisy, recipe = degrade(segment.noisy, self.config, random)
        return Segment(noisy, segment.clean, segment.recipe | recipe)

    def _skip_bad_samples(self, make: Callable[[int], Segment]) -> Segment:
        """The segment of the first attempt that meets no bad sample."""
        bad_samples: list[str] = []
        for attempt in range(1 + SUBSTITUTES):
            try:
                segment = make(attempt)
            except ShardError as error:
                if self.config.on_bad_sample == "fatal":
                    raise
                bad_samples.append(str(error))
                continue
            return replace(segment, recipe=segment.recipe | {"bad_samples": bad_samples})
        raise ShardError(
            f"{len(bad_samples)} segments in a row met damaged data, the last: {bad_samples[-1]}"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What decides every sample, as plain values: equal for equal streams, wherever the corpus lies.

        ``corpus`` is a hash of the subsets' utterances (keys, lengths and what their manifests say of the
        shards), of concatenated ones in their order; ``choices`` are the options that make segments.
        ``seed`` is None where nothing is random, so that the segments are those of any seed.
        """
        digest = hashlib.sha256()
        for part in (part for subset in self._factory.subsets for part in subset.parts):
            # A part's own keys: those of a concatenated dataset contain its location.
            content = [part.name, part.keys, part.samples.tolist(), [asdict(shard) for shard in part.shards]]
            digest.update(json.dumps(content, sort_keys=True).encode())
        options = choices(self.config) | {"mode": self.mode, "variants": self.variants}
        seed = None if self._fixed else self.seed
        values = {"corpus": digest.hexdigest(), "items": len(self), "seed": seed, "choices": options}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def _open_factory(config: DataConfig, mode: Mode) -> SegmentFactory:
    """Open what `mode` reads of ``config.train``: manifests and indices, no audio.

    Raises:
        UserError: the corpus lacks what `config` asks for.
    """
    return _open_dynamic(config) if mode == "dynamic" else _open_premixed(config)


def _open_dynamic(config: DataConfig) -> DynamicMixing:
    corpus = Corpus.of(config)
    clean, noise = _open(corpus, "train_clean"), _open(corpus, "train_noise")
    for what, subset in (("speech", clean), ("noise", noise)):
        _check_length(config, int(subset.samples.sum()), f"all {what} of {subset.where} together")
    rirs = None
    if reads_rooms(config):
        if "train_rir" not in corpus.names:
            raise UserError(
                f"{config.train} has no room impulse responses (train_rir), but --data.reverb_probability is "
                f"{config.reverb_probability}: set --data.reverb_probability 0 or --data.synthetic_rooms 1, "
                "or pack a corpus that has some"
            )
        rirs = _open(corpus, "train_rir")
    return DynamicMixing(config, clean, noise, rirs)


def _open_premixed(config: DataConfig) -> PremixedPairs:
    pairs = _open(Corpus.of(config), "train_pairs")
    _check_length(config, int(pairs.samples.max()), f"the longest pair of {pairs.where}")
    return PremixedPairs(config, pairs)


def _open(corpus: Corpus, name: str) -> ShardSet:
    subset = open_subset(corpus.subset(name))
    if len(subset) == 0:
        raise UserError(
            f"{subset.where} holds no utterances: its manifest lists what packing left out, and why; "
            "mend the corpus and pack it again with python -m mvat_dist.pack"
        )
    return subset


def _check_length(config: DataConfig, samples: int, what: str) -> None:
    if samples < segment_length(config):
        seconds = samples / SAMPLE_RATE
        raise UserError(
            f"--data.segment_seconds {config.segment_seconds:g} is longer than {what} ({seconds:.2f} s): "
            f"choose at most {seconds:.2f}"
        )


class BadSampleLog:
    """Warns of bad samples, of each once, and ever more rarely when there are many.

    The first ten are named, then the 20th, the 40th and so on; each of these lines has the count.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def warn(self, bad_samples: Iterable[str]) -> None:
        """Warn of the bad samples of one step; each entry names a shard and a key."""
        for bad_sample in bad_samples:
            if bad_sample in self._known:
                continue
            self._known.add(bad_sample)
            count = len(self._known)
            tens, rest = divmod(count, _NAMED_AT_FIRST)
            if count <= _NAMED_AT_FIRST or (rest == 0 and tens & (tens - 1) == 0):
                _logger.warning("damaged, another segment took its place (%d so far): %s", count, bad_sample)


class BadSampleLimit:
    """How many segments may be replaced because of bad samples, over all ranks since the run was started.

    Args:
        share: the largest share, of an epoch's segments or of all made so far, whichever is more. One
            replaced segment is always allowed.
        epoch: segments of one epoch.
    """

    def __init__(self, share: float, epoch: int) -> None:
        self._share = share
        self._epoch = epoch
        self.replaced = 0
        """Replaced segments counted so far."""
        self.segments = 0
        """All segments counted so far."""

    def count(self, replaced: int, segments: int) -> None:
        """Count `segments` more segments, of which `replaced` met bad samples."""
        self.replaced += replaced
        self.segments += segments

    def refusal(self) -> str | None:
        """The error message, where more segments were replaced than are allowed."""
        if self.replaced <= max(1.0, self._share * max(self.segments, self._epoch)):
            return None
        return (
            f"{self.replaced} of {self.segments} segments met damaged data, more than --data.max_bad_samples "
            f"{self._share:g} allows: find it with python -m mvat_dist.pack verify, and copy or pack again "
            "the files that it names"
        )
