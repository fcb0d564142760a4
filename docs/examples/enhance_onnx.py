"""Enhance a sound file with an exported ONNX file: onnxruntime, numpy and soundfile, no torch.

    pip install onnxruntime numpy soundfile soxr
    python enhance_onnx.py manner-s-2.0gf.onnx noisy.wav enhanced.wav

Any rate (other than 16 kHz: with soxr), channels and format. The whole file is in memory; the network hears
16 s at a time, as in `python -m mvat_dist.enhance`, which makes the same samples up to rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile

RATE = 16_000
WINDOW, OVERLAP = 16 * RATE, 2 * RATE
BLOCK = 1 << 16


class OnePassFile(soundfile.SoundFile):
    """soundfile seeks after each read, and fails at the end of a FLAC that does not say how long it is."""

    def seekable(self) -> bool:
        return False


def whole(sound: soundfile.SoundFile) -> np.ndarray:
    """(T, C) of all that is there, whatever the header says of its length."""
    blocks = [np.zeros((0, sound.channels), np.float32)]
    while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block)
    return np.concatenate(blocks)


def resampled(audio: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """(T, C) at another rate."""
    if rate_in == rate_out:
        return audio
    import soxr  # only where it is needed

    return soxr.resample(audio, rate_in, rate_out, quality="VHQ")


def enhanced(session: onnxruntime.InferenceSession, audio: np.ndarray) -> np.ndarray:
    """(T, C) at 16 kHz -> the same: channels as a batch, long input in windows that are cross-faded.

    Level and padding need no care: the graph divides by its input's deviation, and multiplies back.
    """
    out = np.zeros_like(audio)
    done = 0  # samples of `out` that are written
    rise = (0.5 - 0.5 * np.cos(np.pi * (np.arange(OVERLAP) + 0.5) / OVERLAP)).astype(np.float32)[:, None]
    while done < len(audio):
        # Each window shares OVERLAP with what is done; the last one begins earlier, so as not to be short.
        start = max(0, min(done - OVERLAP, len(audio) - WINDOW))
        heard = np.ascontiguousarray(audio[start : start + WINDOW].T)
        new = session.run(None, {"noisy": heard})[0].T
        if done:
            fade = slice(done - OVERLAP, done)
            new = new[done - OVERLAP - start :]
            new[:OVERLAP] = out[fade] + rise * (new[:OVERLAP] - out[fade])
            out[done - OVERLAP : done - OVERLAP + len(new)] = new
            done += len(new) - OVERLAP
        else:
            out[: len(new)] = new
            done = len(new)
    return out


def loaded(model: str) -> onnxruntime.InferenceSession:
    """The graph in a file.

    Raises:
        ValueError: it is none.
    """
    try:
        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no class in common
        raise ValueError(f"{model} cannot be read as ONNX: {error}") from error


def main(model: str, source: str, target: str) -> None:
    """Read, enhance, write."""
    for given in (model, source):
        Path(given).stat()  # names what is missing, of which libsndfile says "System error"
    session = loaded(model)
    with OnePassFile(source) as sound:
        kind = {"format": sound.format, "subtype": sound.subtype, "endian": sound.endian}
        rate, noisy = sound.samplerate, whole(sound)
    clean = resampled(enhanced(session, resampled(noisy, rate, RATE)), RATE, rate)
    # Resampling there and back may change the length by a few samples.
    exact = np.zeros_like(noisy)
    exact[: len(clean)] = clean[: len(noisy)]
    soundfile.write(target, exact, rate, **kind)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError, soundfile.SoundFileError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
