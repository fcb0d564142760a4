"""Draw the spectrogram of a clip as a small PNG. Needs no torch."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from mvat_dist.config.schema import SAMPLE_RATE

FLOOR_DB, CEILING_DB = -110.0, -30.0
"""Range of the colours: two-sided power per Hz at full scale 1; the same in all pictures."""

_WINDOW, _HOP = 512, 256


def spectrogram_png(samples: npt.NDArray[np.floating]) -> bytes:
    """Spectrogram of `samples` (T,) at 16 kHz: 32 ms Hann windows every 16 ms, 0 to 8 kHz upwards.

    The colours are matplotlib's "magma", whose lightness rises evenly, so that it reads without colour too.
    Written with a palette: the PNGs of matplotlib, of four channels, have three times the bytes.
    """
    # Here, because a training that keeps no examples needs neither.
    from matplotlib import colormaps
    from PIL import Image

    padded = np.pad(samples, (0, max(0, _WINDOW - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    window = np.hanning(_WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames * window))) / (np.square(window).sum() * SAMPLE_RATE)
    # [frames, 257] -> [128, frames]: two frequencies to a line, as the picture is shown smaller than that.
    lines = power[:, 1:].reshape(len(power), -1, 2).max(axis=2).T[::-1]
    shade = (10 * np.log10(lines + 1e-20) - FLOOR_DB) / (CEILING_DB - FLOOR_DB)
    image = Image.fromarray(np.round(255 * np.clip(shade, 0, 1)).astype(np.uint8))
    image.putpalette(colormaps["magma"](np.arange(256), bytes=True)[:, :3].tobytes())
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return png.getvalue()
