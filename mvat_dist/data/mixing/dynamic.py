"""Training segments mixed on the fly from speech, noise and rooms, as the DNS-Challenge synthesizer does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.mixing import augment, mix, reverb
from mvat_dist.data.mixing.activity import active_share, ratio_samples
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import Draws
from mvat_dist.data.mixing.segments import (
    Segment,
    Stretch,
    described,
    draw_tempo,
    needed_length,
    segment_length,
)
from mvat_dist.data.shards.reader import ShardSet

GAP = round(0.2 * SAMPLE_RATE)
"""Silence between two joined utterances, in samples: the DNS synthesizer's 0.2 s."""

FADE = round(0.005 * SAMPLE_RATE)
"""Fade at an inner end of a joined piece, in samples (design choice)."""

ATTEMPTS = 5
"""Stretches drawn before the most active of them is accepted as it is, and the recipe says so: every
utterance has its turn, whereas the DNS synthesizer looks for another one."""


class _Drawn(NamedTuple):
    """Audio that fills a segment."""

    audio: Audio
    parts: list[Stretch]
    silent: bool
    activity: float | None
    """Share of active frames; None where nobody asked."""


class SourceSegments:
    """Clean speech, noise and room impulse responses, mixed anew in every epoch.

    An item is a clean utterance: a random crop of it or, where it is shorter than the segment, all of it and
    further random utterances after a pause of 0.2 s each. The clean target is the speech as the room
    gives it back, with its reverberation, as in the DNS synthesizer, or less of it (``reverb_target``);
    what the room did to speech before the crop is not heard. The ratio is that of the speech as heard, with
    all its reverberation, to the noise. Noise is cut or joined in the same way, without pauses.

    Recipe: ``speech`` and ``noise`` list their stretches (key, first sample, samples), ``tempo`` is the
    factor applied to the speech, ``rir`` a key, the values of a `MadeUpRoom` or None, ``target`` what of the
    room the clean side keeps, ``snr_db`` and ``level_dbfs`` are the values drawn, ``snr_kind`` is where the
    ratio was taken (`whole` also where `active` found no active noise together with speech); ``noisy =
    speech_gain * speech + noise_gain * noise``, with ``peak_gain`` (1 where the peak was low enough)
    contained in both gains. ``silent`` names the sides for which no audible stretch was found; ``snr_db`` is
    None then, and the noise keeps its own level. ``activity`` is the share of active frames, where a
    threshold asks for one.
    """

    def __init__(self, config: DataConfig, clean: ShardSet, noise: ShardSet, rirs: ShardSet | None) -> None:
        self.iterated = clean
        self.subsets: Sequence[ShardSet] = [clean, noise, *([rirs] if rirs else [])]
        self.utterances = np.arange(len(clean))
        self.fixed = False
        self._config = config
        self._length = segment_length(config)
        self._noise = noise
        self._rirs = rirs

    def __len__(self) -> int:
        return len(self.iterated)

    def make(self, item: int, draws: Draws) -> Segment:
        """The mixture whose first utterance is `item`."""
        config = self._config
        tempo = draw_tempo(config, draws)
        room, impulse_response = self._draw_room(draws)
        snr_db: float | None = draws.uniform(*config.snr_db)
        level = draws.uniform(*config.level_dbfs)
        needed = needed_length(self._length, tempo)
        found = _draw_audible(self.iterated, item, needed, GAP, draws, config.activity_threshold)
        noise = _draw_audible(self._noise, None, self._length, 0, draws)
        if found.silent or noise.silent:
            snr_db = None

        speech = target = augment.change_tempo([found.audio], self._length, tempo)[0]
        if impulse_response is not None:
            wet = reverb.reverberate(speech, impulse_response)
            speech, target = wet, reverb.target(speech, wet, impulse_response, config.reverb_target)
        measured = ratio_samples(speech, noise.audio) if config.snr_kind == "active" else None
        mixture = mix.mix(speech, noise.audio, snr_db, level, target=target, measured=measured)
        recipe = {
            "speech": described(self.iterated, found.parts),
            "activity": found.activity,
            "tempo": tempo,
            "rir": room,
            "target": config.reverb_target,
            "noise": described(self._noise, noise.parts),
            "snr_db": snr_db,
            "snr_kind": "whole" if measured is None else "active",
            "level_dbfs": level,
            "speech_gain": mixture.speech_gain,
            "noise_gain": mixture.noise_gain,
            "peak_gain": mixture.peak_gain,
            "silent": [side for side, drawn in (("speech", found), ("noise", noise)) if drawn.silent],
        }
        return Segment(mixture.noisy, mixture.clean, recipe)

    def _draw_room(self, draws: Draws) -> tuple[str | dict[str, float] | None, Audio | None]:
        """What a recipe says of a room, and its impulse response; or twice None."""
        made_up = self._config.made_up_rooms
        if not draws.chance(self._config.reverb_probability):
            return None, None
        # No number is drawn where there is nothing to choose: segments without made-up rooms stay what they
        # were before there were any.
        if made_up == 1.0 or (made_up and draws.chance(made_up)):
            room = reverb.MadeUpRoom(
                draws.uniform(*reverb.T60), draws.uniform(*reverb.DRR_DB), draws.integer(1 << 32)
            )
            return room._asdict(), room.impulse_response()
        assert self._rirs is not None, "rooms of the corpus are asked for, and it was opened without"
        index = draws.integer(len(self._rirs))
        return self._rirs.key(index), self._rirs.read(index)


def _draw_audible(
    sources: ShardSet, first: int | None, length: int, gap: int, draws: Draws, least_activity: float = 0.0
) -> _Drawn:
    """`length` samples that are not silent and active enough, or the most active of `ATTEMPTS`.

    `first` is the utterance to begin with; None draws that one, too.
    """
    found: list[_Drawn] = []
    for _ in range(ATTEMPTS):
        parts = _draw_stretches(sources, first, length, gap, draws)
        pieces = [sources.read(part.utterance, "audio", part.start, part.frames) for part in parts]
        joined = mix.join(pieces, gap, FADE)
        # Where the last pause reaches the end of the segment, no utterance follows it.
        audio = np.pad(joined, (0, length - joined.size))
        activity = active_share(audio) if least_activity > 0.0 else None
        drawn = _Drawn(audio, parts, mix.is_silent(joined), activity)
        if not drawn.silent and (activity or 0.0) >= least_activity:
            return drawn
        found.append(drawn)
    return max(found, key=lambda drawn: (not drawn.silent, drawn.activity or 0.0))


def _draw_stretches(
    sources: ShardSet, first: int | None, length: int, gap: int, draws: Draws
) -> list[Stretch]:
    """Stretches that fill `length` samples with `gap` samples between them."""
    parts = []
    index = draws.integer(len(sources)) if first is None else first
    while length > 0:
        available = int(sources.samples[index])
        frames = min(available, length)
        parts.append(Stretch(index, draws.integer(available - frames + 1), frames))
        length -= frames + gap
        index = draws.integer(len(sources))
    return parts
