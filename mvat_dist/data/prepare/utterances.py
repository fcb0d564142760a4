"""Render an utterance for a shard: read its signals, convert them to 16-bit audio, describe them in JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.mixing import mix
from mvat_dist.data.prepare.reading import Audio, locate, read_piece
from mvat_dist.data.shards.codecs import Codec, Pcm, encode
from mvat_dist.data.shards.format import META, Field, extension
from mvat_dist.data.shards.writer import Sample

_FULL_SCALE = 32768
_DRAWS = 10
_FLOOR_DBFS = -120.0


@dataclass(frozen=True, slots=True)
class Signal:
    """A part of one recording."""

    path: str
    """Relative to the corpus."""
    start: int
    """Samples at `rate`, as `stop`."""
    stop: int
    rate: int
    """Hz, as stored."""
    channels: int
    content: bytes
    """Hash of all audio of the recording."""
    first_channel: bool = False
    """Take the first channel, not the mean of all, because the mean of several rooms is no room."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return (self.stop - self.start) / self.rate


@dataclass(frozen=True, slots=True)
class ValidationMix:
    """How a validation clip is mixed of a speech and a noise signal."""

    snr_db: float
    level_dbfs: float
    """RMS of the mixture."""
    max_seconds: float
    seed: int
    """Seed of the two offsets."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One sample of a shard: one signal; or clean and noisy; or, with `mixing`, speech and noise."""

    group: str
    """Speaker or recording."""
    signals: tuple[Signal, ...]
    mixing: ValidationMix | None = None

    @property
    def largest_bytes(self) -> int:
        """An upper bound of its bytes in a tar with any codec, as if FLAC saved nothing."""
        seconds = self.mixing.max_seconds if self.mixing else max(signal.seconds for signal in self.signals)
        return 4096 + len(self.signals) * int(10240 + 1.02 * 2 * SAMPLE_RATE * seconds)


def render(corpus: Path, key: str, utterance: Utterance, codec: Codec = "flac") -> Sample:
    """Read, convert and encode one utterance; the result has the same bytes on every machine.

    Nothing is clipped: where a signal passes full scale (a float file, or the ripple of resampling), all
    signals of the utterance are scaled down by one gain, which its JSON states.

    Raises:
        UnusableError: a file changed since it was inspected.
    """
    signals = [
        read_piece(locate(corpus, signal.path), signal.start, signal.stop, first_channel=signal.first_channel)
        for signal in utterance.signals
    ]
    fields: tuple[Field, ...] = ("audio",) if len(signals) == 1 else ("clean", "noisy")
    names = ("speech", "noise") if utterance.mixing else fields
    meta: dict[str, Any] = {
        "key": key,
        "group": utterance.group,
        "source": {name: _origin(signal) for name, signal in zip(names, utterance.signals, strict=True)},
    }
    if utterance.mixing:
        speech, noise = signals
        signals, meta["mixing"] = _mix(utterance.mixing, speech, noise)
    pcm, meta["gain"] = _quantise(signals)
    levels = [_levels(samples) for samples in pcm]
    meta |= {
        "samples": pcm[0].size,
        "sample_rate": SAMPLE_RATE,
        "levels": dict(zip(fields, levels, strict=True)),
    }
    snr = _snr_db(*pcm) if len(pcm) == 2 else float("nan")
    if len(pcm) == 2:
        meta["snr_db"] = round(snr, 3) if np.isfinite(snr) else None
    members = {
        extension(field, codec): encode(samples, codec) for field, samples in zip(fields, pcm, strict=True)
    }
    members[META] = json.dumps(meta, separators=(",", ":")).encode()
    return Sample(key, members, pcm[0].size, levels[-1]["rms_dbfs"], snr)


def _origin(signal: Signal) -> dict[str, Any]:
    origin = {
        "path": signal.path,
        "sample_rate": signal.rate,
        "channels": signal.channels,
        "start": signal.start,
        "frames": signal.stop - signal.start,
        "content": signal.content.hex(),
    }
    return origin | ({"channel": 0} if signal.first_channel and signal.channels > 1 else {})


def _quantise(signals: list[Audio]) -> tuple[list[Pcm], float]:
    """16-bit samples of equal length, and the one gain that kept all of them below full scale.

    16-bit input at 16 kHz passes through unchanged.
    """
    length = min(signal.size for signal in signals)
    signals = [signal[:length].astype(np.float64) for signal in signals]
    top = max(max(signal.max() * _FULL_SCALE / (_FULL_SCALE - 1), -signal.min()) for signal in signals)
    gain = min(1.0, 1.0 / top) if top > 0 else 1.0
    return [np.rint(signal * (gain * _FULL_SCALE)).astype(np.int16) for signal in signals], float(gain)


def _mix(mixing: ValidationMix, speech: Audio, noise: Audio) -> tuple[list[Audio], dict[str, Any]]:
    """([clean, noisy], recipe) of a validation clip; the noise is looped where it is shorter."""
    random = np.random.default_rng(mixing.seed)
    length = min(speech.size, int(mixing.max_seconds * SAMPLE_RATE))
    speech_offset, speech = _random_part(speech, length, random)
    noise_offset, noise = _random_part(np.resize(noise, max(noise.size, length)), length, random)
    mixed = mix.mix(speech, noise, mixing.snr_db, mixing.level_dbfs)
    recipe = {
        "snr_db": mixing.snr_db,
        "level_dbfs": mixing.level_dbfs,
        "speech_offset": speech_offset,
        "noise_offset": noise_offset,
        "speech_gain": mixed.speech_gain,
        "noise_gain": mixed.noise_gain,
    }
    return [mixed.clean, mixed.noisy], recipe


def _random_part(audio: Audio, length: int, random: np.random.Generator) -> tuple[int, Audio]:
    """(offset, `length` samples) of a random part that is not silent, or of the peak after `_DRAWS` tries."""
    last = audio.size - length
    for start in random.integers(last + 1, size=_DRAWS).tolist():
        if not mix.is_silent(audio[start : start + length]):
            return start, audio[start : start + length]
    start = int(np.clip(np.abs(audio).argmax() - length // 2, 0, last))
    return start, audio[start : start + length]


def _levels(pcm: Pcm) -> dict[str, float]:
    """RMS and peak in dB below full scale (a constant 1.0 has 0 dBFS)."""
    audio = pcm.astype(np.float32) / np.float32(_FULL_SCALE)
    peak = float(np.abs(audio).max())
    return {
        "rms_dbfs": round(max(_FLOOR_DBFS, mix.level_dbfs(audio)), 3),
        "peak_dbfs": round(20 * float(np.log10(peak)) if peak > 0 else _FLOOR_DBFS, 3),
    }


def _snr_db(clean: Pcm, noisy: Pcm) -> float:
    """10 log10(sum clean^2 / sum (noisy - clean)^2), exact in integers; infinite where both are equal."""
    speech = clean.astype(np.int64)
    noise = noisy.astype(np.int64) - speech
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.square(speech).sum() / np.square(noise).sum()))
