"""Spectrograms, read back from their PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mvat_dist.evaluation.spectrogram import CEILING_DB, FLOOR_DB, spectrogram_png


def shades(png: bytes) -> np.ndarray:
    """[lines, frames]: places in the palette, 0 to 255."""
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "P")
    return np.asarray(image)


def test_a_tone_is_a_bright_line_at_its_frequency():
    time = np.arange(32_000) / 16_000
    tone = (10 ** (-20 / 20) * np.sin(2 * np.pi * 2000 * time)).astype(np.float32)
    picture = shades(spectrogram_png(tone))
    height, width = picture.shape
    assert (height, width) == (128, 124)  # 8 kHz down to 0; windows of 32 ms every 16 ms
    # 2 kHz is a quarter up from the bottom.
    loudest = picture.mean(axis=1).argmax()
    assert abs(loudest - height * 3 / 4) <= 1
    # A sine of amplitude -20 dB has a power of -23 dB, half of it at the negative frequency, and the Hann
    # window spreads it over 1.5 bins of 31.25 Hz.
    expected = -26.02 - 10 * np.log10(1.5 * 31.25)
    shade = (expected - FLOOR_DB) / (CEILING_DB - FLOOR_DB) * 255
    assert picture[loudest].mean() == pytest.approx(min(255, shade), abs=2)


def test_louder_is_lighter_and_silence_is_black():
    palette = Image.open(io.BytesIO(spectrogram_png(np.zeros(10, np.float32)))).convert("L")
    assert np.asarray(palette).max() <= 1
    noise = np.random.default_rng(0).standard_normal(16_000)
    grey = [
        np.asarray(Image.open(io.BytesIO(spectrogram_png(level * noise))).convert("L")).mean()
        for level in (0.001, 0.01, 0.1)
    ]
    assert grey == sorted(grey)
    assert grey[2] > grey[0] + 50


def test_equal_samples_give_equal_bytes():
    noise = np.random.default_rng(1).standard_normal(8_000)
    assert spectrogram_png(noise) == spectrogram_png(noise.copy())
