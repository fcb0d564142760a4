"""Dynamic mixing of speech, noise and rooms to training segments, after the DNS-Challenge synthesizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.mixing import augment, mix, reverb
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import CounterRandom
from mvat_dist.data.mixing.segments import (
    Segment,
    Span,
    describe_span,
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
"""Tries before the most active one is accepted as it is, which the recipe says: every utterance has its turn,
whereas the DNS synthesizer looks for another one."""


class _Joined(NamedTuple):
    """Audio that fills a segment, joined of one or more spans."""

    audio: Audio
    spans: list[Span]
    silent: bool
    activity: float | None
    """Share of active frames; None where no threshold asks for it."""


class DynamicMixing:
    """Clean speech, noise and room impulse responses, mixed anew in every epoch.

    An item is a clean utterance: a random crop of it or, where it is shorter than the segment, all of it and
    further random utterances after a pause of 0.2 s each. The clean target is the speech as the room
    gives it back, with its reverberation, as in the DNS synthesizer, or less of it (``reverb_target``). What
    the room would carry over from speech before the crop is missing. The SNR is that of the reverberant
    speech to the noise. Noise is cut or joined in the same way, without pauses.

    Recipe: ``speech`` and ``noise`` list their spans (key, first sample, samples), ``tempo`` is the
    factor applied to the speech, ``rir`` a key, the values of a `SyntheticRoom` or None, ``target`` what of
    the room the clean side keeps, ``snr_db`` and ``level_dbfs`` are the values drawn, ``snr_kind`` is where
    the ratio was taken (`whole` also where `active` found no active noise together with speech); ``noisy =
    speech_gain * speech + noise_gain * noise``, with ``peak_gain`` (1 where the peak was low enough)
    contained in both gains. ``silent`` names the sides for which no audible span was found; ``snr_db`` is
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

    def make(self, item: int, random: CounterRandom) -> Segment:
        """The mixture whose first utterance is `item`."""
        config = self._config
        tempo = draw_tempo(config, random)
        room, impulse_response = self._draw_room(random)
        snr_db: float | None = random.uniform(*config.snr_db)
        level = random.uniform(*config.level_dbfs)
        needed = needed_length(self._length, tempo)
        speech = _draw_audible(self.iterated, item, needed, GAP, random, config.activity_threshold)
        noise = _draw_audible(self._noise, None, self._length, 0, random)
        if speech.silent or noise.silent:
            snr_db = None

        wet = target = augment.change_tempo([speech.audio], self._length, tempo)[0]
        if impulse_response is not None:
            dry = wet
            wet = reverb.reverberate(dry, impulse_response)
            target = reverb.target(dry, wet, impulse_response, config.reverb_target)
        snr_mask = mix.active_noise_samples(wet, noise.audio) if config.snr_kind == "active" else None
        mixture = mix.mix(wet, noise.audio, snr_db, level, target=target, snr_mask=snr_mask)
        recipe = {
            "speech": [describe_span(self.iterated, span) for span in speech.spans],
            "activity": speech.activity,
            "tempo": tempo,
            "rir": room,
            "target": config.reverb_target,
            "noise": [describe_span(self._noise, span) for span in noise.spans],
            "snr_db": snr_db,
            "snr_kind": "whole" if snr_mask is None else "active",
            "level_dbfs": level,
            "speech_gain": mixture.speech_gain,
            "noise_gain": mixture.noise_gain,
            "peak_gain": mixture.peak_gain,
            "silent": [side for side, joined in (("speech", speech), ("noise", noise)) if joined.silent],
        }
        return Segment(mixture.noisy, mixture.clean, recipe)

    def _draw_room(self, random: CounterRandom) -> tuple[str | dict[str, float] | None, Audio | None]:
        """A room as a recipe names it, and its impulse response; or twice None."""
        synthetic = self._config.synthetic_rooms
        if not random.chance(self._config.reverb_probability):
            return None, None
        # No number is drawn where there is nothing to choose: segments without synthetic rooms stay what
        # they were before there were any.
        if synthetic == 1.0 or (synthetic and random.chance(synthetic)):
            room = reverb.SyntheticRoom(
                random.uniform(*reverb.T60), random.uniform(*reverb.DRR_DB), random.integer(1 << 32)
            )
            return room._asdict(), room.impulse_response()
        assert self._rirs is not None, "rooms of the corpus are asked for, but it was opened without"
        index = random.integer(len(self._rirs))
        return self._rirs.key(index), self._rirs.read(index)


def _draw_audible(
    subset: ShardSet,
    first: int | None,
    length: int,
    gap: int,
    random: CounterRandom,
    least_activity: float = 0.0,
) -> _Joined:
    """`length` samples that are not silent and active enough, or the most active of `ATTEMPTS` tries.

    `first` is the utterance to begin with; None draws that one, too.
    """
    tries: list[_Joined] = []
    for _ in range(ATTEMPTS):
        spans = _draw_spans(subset, first, length, gap, random)
        pieces = [subset.read(span.utterance, "audio", span.start, span.frames) for span in spans]
        sound = mix.join(pieces, gap, FADE)
        # Where the last pause reaches the end of the segment, no utterance follows it.
        audio = np.pad(sound, (0, length - sound.size))
        activity = mix.active_share(audio) if least_activity > 0.0 else None
        joined = _Joined(audio, spans, mix.is_silent(sound), activity)
        if not joined.silent and (activity or 0.0) >= least_activity:
            return joined
        tries.append(joined)
    return max(tries, key=lambda joined: (not joined.silent, joined.activity or 0.0))


def _draw_spans(
    subset: ShardSet, first: int | None, length: int, gap: int, random: CounterRandom
) -> list[Span]:
    """Random spans that fill `length` samples with `gap` samples between them."""
    spans = []
    utterance = random.integer(len(subset)) if first is None else first
    while length > 0:
        available = int(subset.samples[utterance])
        frames = min(available, length)
        spans.append(Span(utterance, random.integer(available - frames + 1), frames))
        length -= frames + gap
        utterance = random.integer(len(subset))
    return spans
