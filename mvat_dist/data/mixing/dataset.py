"""The training segments of a packed corpus, each a pure function of its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing.bad_samples import SUBSTITUTES
from mvat_dist.data.mixing.bandwidth import transmit
from mvat_dist.data.mixing.checks import check_config, training_mode
from mvat_dist.data.mixing.fingerprint import choices
from mvat_dist.data.mixing.opening import open_maker
from mvat_dist.data.mixing.sampler import LARGEST_SEED, Draws, epoch_order
from mvat_dist.data.mixing.segments import Segment
from mvat_dist.data.shards.reader import ShardError
from mvat_dist.data.shards.targets import Lessons
from mvat_dist.errors import UserError


class TrainingData:
    """The training segments of a packed corpus. Picklable; holds no random state.

    The segments are either made anew in every epoch, or there is a fixed number of them, `variants` of every
    item, which the epochs take in turn. In the second case they can be numbered and cached: segment
    ``variant * N + item`` is that item in the epochs of which `variant` is the remainder.

    Attributes:
        mode: `sources` or `pairs`, as chosen.
        iterated: the subset whose utterances are visited in turn.
        variants: different segments of every item; 0 where every epoch makes new ones. A grid of pairs to
            which nothing random is done has 1, whatever was asked for.
    """

    def __init__(self, config: DataConfig, seed: int, lessons: Lessons | None = None) -> None:
        """Open the corpus at ``config.train``; reads manifests and indices, no audio.

        Args:
            config: what is read and how segments are made.
            seed: of the order and of every choice.
            lessons: a teacher cache; its lessons then come with the segments.

        Raises:
            UserError: a senseless value, no packed corpus, one that lacks what `config` asks for, or a
                cache of other segments.
        """
        check_config(config)
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seed {seed}: choose one from 0 to {LARGEST_SEED}")
        self.config = config
        self.seed = seed
        self.mode = training_mode(config)
        self._maker = open_maker(config, self.mode)
        self.iterated = self._maker.iterated
        self._fixed = self._maker.fixed and config.bandwidth_probability == config.codec_probability == 0.0
        self.variants = 1 if self._fixed else config.variants
        self._lessons = lessons
        if lessons is not None:
            self.check_numbered()
            lessons.check(self.identity())

    def __len__(self) -> int:
        """Items an epoch: clean utterances, pairs, or places of the grid of segments."""
        return len(self._maker)

    @property
    def segments_per_corpus(self) -> int | None:
        """How many different segments there are, V * N; None where every epoch makes new ones."""
        return self.variants * len(self) if self.variants else None

    @property
    def utterances(self) -> NDArray[np.int64]:
        """(N,) the utterance, by its place in `iterated`, that each item begins with."""
        return self._maker.utterances

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
            ShardError: damaged data, where the configuration does not bear it.
        """
        if number not in range(self.segments_per_corpus or 0):
            raise IndexError(f"segment {number} of {self.segments_per_corpus}")
        return self._bear(partial(self._numbered, number))

    def item(self, epoch: int, position: int) -> Segment:
        """The segment at `position` (0 to N - 1) of `epoch`: a pure function, wherever it is called.

        Its recipe has ``epoch``, ``position`` and ``segment``, its number or None, ``bandwidth_hz`` and
        ``codec`` (`channel.transmit`), and what the maker of the segment says. ``damage`` lists what was
        found damaged, a line each that names shard and key: the segment is a substitute then.

        Raises:
            ShardError: damaged data, where the configuration does not bear it.
        """
        number = self.segment_number(epoch, position)
        if number is not None:
            segment = self.segment(number)
        else:
            segment = self._bear(partial(self._new, epoch, position))
        place = {"mode": self.mode, "epoch": epoch, "position": position, "segment": None}
        return replace(segment, recipe=place | segment.recipe)

    def _item_at(self, epoch: int, position: int) -> int:
        return int(epoch_order(self.seed, epoch, len(self))[position])

    def _new(self, epoch: int, position: int, attempt: int) -> Segment:
        """The segment at a place of an epoch; at the second and later attempts of an item drawn instead."""
        draws = Draws(self.seed, epoch, position, attempt=attempt)
        item = draws.integer(len(self)) if attempt else self._item_at(epoch, position)
        return self._made(item, draws)

    def _numbered(self, number: int, attempt: int) -> Segment:
        """Segment `number`; at the second and later attempts another numbered one, with its own lesson."""
        if attempt:
            variant, item = divmod(number, len(self))
            drawn = Draws(self.seed, variant, item, "variant", attempt)
            number = drawn.integer(self.variants * len(self))
        variant, item = divmod(number, len(self))
        made = self._made(item, Draws(self.seed, variant, item, "variant"))
        lesson = self._lessons.read(number, made.noisy) if self._lessons is not None else None
        recipe = {"mode": self.mode, "segment": number} | made.recipe
        return replace(made, recipe=recipe, lesson=lesson)

    def _made(self, item: int, draws: Draws) -> Segment:
        made = self._maker.make(item, draws)
        noisy, channel = transmit(made.noisy, self.config, draws)
        return Segment(noisy, made.clean, made.recipe | channel)

    def _bear(self, make: Callable[[int], Segment]) -> Segment:
        """What `make` gives at the first attempt that meets no damage, where the configuration bears any."""
        damage: list[str] = []
        for attempt in range(1 + SUBSTITUTES):
            try:
                made = make(attempt)
            except ShardError as error:
                if self.config.on_damage == "fatal":
                    raise
                damage.append(str(error))
                continue
            return replace(made, recipe=made.recipe | {"damage": damage})
        raise ShardError(f"{len(damage)} segments in a row met damaged data, the last: {damage[-1]}")

    def identity(self) -> dict[str, Any]:
        """What decides every sample, as plain values: equal for equal streams, wherever the corpus lies.

        ``corpus`` is a hash of the subsets' utterances (keys, lengths and what their manifests say of the
        shards), of joined ones in their order; ``choices`` what the configuration says of making segments.
        ``seed`` is None where nothing is drawn, so that the segments are those of any seed.
        """
        digest = hashlib.sha256()
        for part in (part for subset in self._maker.subsets for part in subset.parts):
            # A part's own keys: those of joined corpora tell where they lie.
            about = [part.name, part.keys, part.samples.tolist(), part.manifest["shards"]]
            digest.update(json.dumps(about, sort_keys=True).encode())
        chosen = choices(self.config) | {"mode": self.mode, "variants": self.variants}
        seed = None if self._fixed else self.seed
        found = {"corpus": digest.hexdigest(), "items": len(self), "seed": seed, "choices": chosen}
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain
