"""Tempo, bandwidth and codec augmentation.

Tempo is changed by WSOLA: other speed, same pitch (Verhelst and Roelands, ICASSP 1993). Frames of the input
are read at another pace than they are written, each from the place near its due position where it best
continues the frame before it, and are overlap-added. The search runs once, on one reference signal; `splice`
then applies the same places to any signal. It is linear in the signal, so stretched clean + stretched noise =
stretched mixture, and both stay aligned. Frame 40 ms, hop 20 ms and search range +-10 ms (a whole period down
to 50 Hz) are design choices.

Bandwidth and codec augmentation changes the noisy side alone. Both keep the length and add no delay, so input
and target stay aligned.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.mixing.mix import Audio
from mvat_dist.data.mixing.sampler import CounterRandom

HOP = 320
FRAME = 2 * HOP
SEARCH = 160

# Periodic Hann: the falling half of one frame and the rising half of the next sum to one.
_WINDOW = (0.5 - 0.5 * np.cos(np.pi * np.arange(FRAME) / HOP)).astype(np.float32)


def _frame_count(length: int) -> int:
    return -(-length // HOP)


def input_length(length: int, factor: float) -> int:
    """Samples that must be read to make `length` samples at `factor` times the tempo."""
    return round((_frame_count(length) - 1) * HOP * factor) + SEARCH + FRAME


def splice_points(reference: Audio, length: int, factor: float) -> NDArray[np.int64]:
    """Sample of `reference` at which each output frame is read: shape (ceil(length / HOP),).

    Within +-`SEARCH` samples of its due position, a frame is read where the signal is most like the natural
    continuation of the frame before (normalised correlation). While that continuation itself is in reach it
    is the maximum by Cauchy-Schwarz, so a search is needed only where it is not.

    Args:
        reference: ``input_length(length, factor)`` samples.
        length: samples to be written.
        factor: tempo; above 1 is faster.
    """
    points = np.zeros(_frame_count(length), np.int64)
    energies = np.concatenate(([0.0], np.cumsum(np.square(reference, dtype=np.float64))))
    for frame in range(1, points.size):
        due = round(frame * HOP * factor)
        follow = int(points[frame - 1]) + HOP
        in_reach = abs(follow - due) <= SEARCH
        points[frame] = follow if in_reach else _most_similar(reference, energies, follow, due)
    return points


def _most_similar(reference: Audio, energies: NDArray[np.float64], follow: int, due: int) -> int:
    """The start within `SEARCH` of `due` whose next `HOP` samples are most similar to those at `follow`."""
    low, high = max(due - SEARCH, 0), due + SEARCH + 1
    products = np.correlate(reference[low : high + HOP - 1], reference[follow : follow + HOP], "valid")
    norms = np.sqrt(energies[low + HOP : high + HOP] - energies[low:high] + 1e-9)
    correlations = products / norms
    best = int(np.argmax(correlations))
    # Digital silence correlates with nothing: keep the due position then.
    return low + best if correlations[best] > 0.0 else due


def splice(signal: Audio, points: NDArray[np.int64], length: int) -> Audio:
    """Overlap-add the frames of `signal` that start at `points`; shape (length,)."""
    frames = sliding_window_view(signal, FRAME)[points] * _WINDOW
    blocks = frames[:, :HOP]
    blocks[0] += (
        signal[:HOP] * _WINDOW[HOP:]
    )  # as if a frame came before the first, which starts at full level
    blocks[1:] += frames[:-1, HOP:]
    return blocks.reshape(-1)[:length]


def change_tempo(signals: list[Audio], length: int, factor: float) -> list[Audio]:
    """Change the tempo of `signals`, which stay aligned, and keep their pitch.

    Args:
        signals: each of ``input_length(length, factor)`` samples; the first is the reference of the search.
        length: samples of each result.
        factor: tempo; above 1 is faster, 1 gives the input back exactly.
    """
    if factor == 1.0:
        return [signal[:length] for signal in signals]
    points = splice_points(signals[0], length, factor)
    return [splice(signal, points, length) for signal in signals]


_BLOCK = SAMPLE_RATE
"""Samples given to an encoder at a time, because libsndfile's Vorbis keeps those of a call on the stack."""


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
    """The codecs that the configuration names."""
    return [name.strip() for name in config.codecs.split(",") if name.strip()]


@lru_cache(maxsize=1)
def writable_codecs() -> frozenset[str]:
    """Names of the codecs that this machine's libsndfile writes."""
    containers = soundfile.available_formats()
    return frozenset(
        name
        for name, codec in CODECS.items()
        if codec.container in containers and codec.subtype in soundfile.available_subtypes(codec.container)
    )


def limit_bandwidth(audio: Audio, edge: float) -> Audio:
    """Remove what lies above `edge` Hz from `audio` (T,): soxr resamples it to twice that rate and back."""
    return _resample(_resample(audio, SAMPLE_RATE, 2.0 * edge), 2.0 * edge, SAMPLE_RATE, audio.size)


def through_codec(audio: Audio, name: str) -> Audio:
    """Encode and decode `audio` (T,) with the codec `name` of `CODECS`, in memory.

    libsndfile removes the codecs' own delay; the length is kept. The result is equal on every rank of a
    machine; another libsndfile may give other samples.
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


def degrade(noisy: Audio, config: DataConfig, random: CounterRandom) -> tuple[Audio, dict[str, Any]]:
    """Limit the bandwidth of `noisy` and pass it through a lossy codec, each with its probability.

    The target stays as it is. Where both happen, the band is limited first.

    Returns:
        The signal, at most full scale, as long as before and without delay, and the recipe: ``bandwidth_hz``
        and ``codec``, each None where it was not applied.
    """
    edge = random.uniform(*config.bandwidth_hz) if random.chance(config.bandwidth_probability) else None
    codec = None
    if random.chance(config.codec_probability):
        names = codec_names(config)
        codec = names[random.integer(len(names))]
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
