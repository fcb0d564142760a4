"""Speech-like signals for tests that need no corpus."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mvat_dist.config.schema import SAMPLE_RATE

Audio = npt.NDArray[np.float32]


def syllables(seconds: float, per_second: float = 3.0, seed: int = 0) -> Audio:
    """(T,) voiced bursts with pauses between them: enough for PESQ's and STOI's speech detection."""
    generator = np.random.default_rng(seed)
    samples = round(seconds * SAMPLE_RATE)
    time = np.arange(samples) / SAMPLE_RATE
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    voice = sum(np.sin(k * phase + generator.uniform(0, 6)) / k for k in range(1, 25))
    envelope = np.clip(np.sin(2 * np.pi * per_second * time), 0, None)
    return (0.1 * voice * envelope + 1e-4 * generator.standard_normal(samples)).astype(np.float32)


def noise_at(clean: Audio, snr_db: float, seed: int = 1) -> Audio:
    """(T,) white noise whose energy lies `snr_db` below that of `clean`."""
    noise = np.random.default_rng(seed).standard_normal(clean.size)
    noise *= np.sqrt(np.sum(clean.astype(np.float64) ** 2) / np.sum(noise**2)) * 10 ** (-snr_db / 20)
    return noise.astype(np.float32)


def bursts(count: int, seconds: float) -> Audio:
    """(T,) `count` noise bursts of equal length with equal pauses: that many utterances for PESQ."""
    samples = round(seconds * SAMPLE_RATE)
    audio = 0.1 * np.random.default_rng(0).standard_normal(samples)
    audio[(np.arange(samples) * count / samples) % 1 > 0.5] = 0
    return audio.astype(np.float32)


def streamed(flac: bytes) -> bytes:
    """A FLAC whose writer did not know its length: 36 bits of STREAMINFO are 0 (RFC 9639, section 8.2)."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]
