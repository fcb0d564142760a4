"""What a transmission does to the noisy side: a narrower band, a lossy codec. The target stays as it is.

Both keep the length and add no delay, so that input and target stay aligned.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import Draws

_BLOCK = SAMPLE_RATE
"""Samples given to an encoder at a time: libsndfile's Vorbis keeps a whole call's samples on the stack."""


class Codec(NamedTuple):
    """A codec as libsndfile names it."""

    container: str
    subtype: str
    rate: int
    """Hz at which it is used."""


CODECS = {
    "mu-law": Codec("WAV", "ULAW", 8_000),
    "gsm": Codec("WAV", "GSM610", 8_000),
    "mp3": Codec("MP3", "MPEG_LAYER_III", SAMPLE_RATE),
    "opus": Codec("OGG", "OPUS", SAMPLE_RATE),
    "vorbis": Codec("OGG", "VORBIS", SAMPLE_RATE),
}
"""Telephone codecs (ITU-T G.711, GSM 06.10) at 8 kHz, the others at 16 kHz and their default quality."""


def codec_names(config: DataConfig) -> list[str]:
    """The codecs asked for."""
    return [name.strip() for name in config.codecs.split(",") if name.strip()]


@lru_cache(maxsize=1)
def writable() -> frozenset[str]:
    """Names of the codecs that this machine's libsndfile writes."""
    containers = soundfile.available_formats()
    return frozenset(
        name
        for name, codec in CODECS.items()
        if codec.container in containers and codec.subtype in soundfile.available_subtypes(codec.container)
    )


def limit_bandwidth(audio: Audio, edge: float) -> Audio:
    """`audio` (T,) without what lies above `edge` Hz: resampled to twice that rate and back by soxr."""
    return _resample(_resample(audio, SAMPLE_RATE, 2.0 * edge), 2.0 * edge, SAMPLE_RATE, audio.size)


def through_codec(audio: Audio, name: str) -> Audio:
    """`audio` (T,) encoded and decoded by the codec `name` of `CODECS`, in memory.

    libsndfile takes the codecs' own delay off again; the length is kept. Equal on every rank of a machine;
    another libsndfile may give other samples.
    """
    codec = CODECS[name]
    sent = audio if codec.rate == SAMPLE_RATE else _resample(audio, SAMPLE_RATE, codec.rate)
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", codec.rate, 1, codec.subtype, format=codec.container) as encoder:
        for start in range(0, sent.size, _BLOCK):
            encoder.write(sent[start : start + _BLOCK])
    stream.seek(0)
    received, _ = soundfile.read(stream, dtype="float32")
    if codec.rate == SAMPLE_RATE:
        return _fit(received, audio.size)
    return _resample(received, codec.rate, SAMPLE_RATE, audio.size)


def transmit(noisy: Audio, config: DataConfig, draws: Draws) -> tuple[Audio, dict[str, Any]]:
    """`noisy` as the other end hears it, at most full scale, and the recipe: ``bandwidth_hz`` and ``codec``.

    Each is None where it was not applied. Where both are, the band is limited first.
    """
    edge = draws.uniform(*config.bandwidth_hz) if draws.chance(config.bandwidth_probability) else None
    codec = None
    if draws.chance(config.codec_probability):
        names = codec_names(config)
        codec = names[draws.integer(len(names))]
    if edge is not None:
        noisy = limit_bandwidth(noisy, edge)
    if codec is not None:
        noisy = through_codec(noisy, codec)
    if edge is not None or codec is not None:
        noisy = np.clip(noisy, -1.0, 1.0)
    return noisy, {"bandwidth_hz": edge, "codec": codec}


def _resample(audio: Audio, rate_in: float, rate_out: float, length: int | None = None) -> Audio:
    resampled: Audio = soxr.resample(audio, rate_in, rate_out)
    return resampled if length is None else _fit(resampled, length)


def _fit(audio: Audio, length: int) -> Audio:
    """The first `length` samples, with zeros after the last where there are fewer."""
    return np.pad(audio[:length], (0, max(0, length - audio.size)))
