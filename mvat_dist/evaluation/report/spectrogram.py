"""A picture of sound, as a small PNG."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from mvat_dist.config.schema import SAMPLE_RATE

FLOOR_DB, CEILING_DB = -110.0, -30.0
"""Range of the colours: two-sided power per Hz at full scale 1; the same in all pictures."""

_WINDOW, _HOP = 512, 256
# Lightness rises evenly from black to pale yellow, so it reads without colour, too. After "magma" (CC0).
_COLOURS = (
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
    (254, 194, 135), (252, 253, 191),
)  # fmt: skip


def picture(sound: npt.NDArray[np.floating]) -> bytes:
    """Spectrogram of `sound` (T,) at 16 kHz as PNG: 32 ms windows every 16 ms, 0 to 8 kHz upwards."""
    padded = np.pad(sound, (0, max(0, _WINDOW - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    taper = np.hanning(_WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames * taper))) / (np.square(taper).sum() * SAMPLE_RATE)
    # 256 frequencies, two to a line: the picture is shown smaller than that.
    lines = power[:, 1:].reshape(len(power), -1, 2).max(axis=2).T[::-1]
    shade = (10 * np.log10(lines + 1e-20) - FLOOR_DB) / (CEILING_DB - FLOOR_DB)
    return _png(np.round(255 * np.clip(shade, 0, 1)).astype(np.uint8))


def _png(shades: npt.NDArray[np.uint8]) -> bytes:
    """A PNG with a palette (ISO/IEC 15948)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        framed = kind + content
        return struct.pack(">I", len(content)) + framed + struct.pack(">I", zlib.crc32(framed))

    height, width = shades.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    rows = np.pad(shades, ((0, 0), (1, 0))).tobytes()  # each row begins with the number of its filter, 0
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", _palette())
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


def _palette() -> bytes:
    anchors = np.array(_COLOURS, np.float64)
    places = np.linspace(0, len(anchors) - 1, 256)
    columns = [np.interp(places, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    return np.round(np.stack(columns, axis=1)).astype(np.uint8).tobytes()
