"""How a shard stores 16-bit audio: as FLAC, or as a NumPy array.

``flac`` is about half as large and is for disks and networks that are slow or small. ``int16`` is for fast
local disks and scarce cores: nothing is decoded, and of a long recording only the wanted part is read.
Both give the same samples.
"""

from __future__ import annotations

import io
import struct
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import soundfile

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.audio import OnePassFile

Codec = Literal["flac", "int16"]
Audio = npt.NDArray[np.float32]
Pcm = npt.NDArray[np.int16]

SUFFIXES: dict[Codec, str] = {"flac": "flac", "int16": "npy"}
ARRAY_HEADER = 128
"""Bytes before the samples of a ``.npy`` member."""
BLOCK = 8192
"""Samples under one checksum: a part of a member is checked without reading the rest (design choice:
a crop of 4 s reads 6 % more than it needs, and 500 hours need 14 MB of checksums)."""

_FLAC_LEVEL = 0.25
"""Of 0 to 1: 2 % larger than libsndfile's own choice, and decoded 10 % faster (``benchmarks/loader.py``)."""


def encode(pcm: Pcm, codec: Codec) -> bytes:
    """Content of the member that stores `pcm` (T,); the same bytes for the same samples."""
    return encode_flac(pcm) if codec == "flac" else encode_int16(pcm)


def encode_flac(pcm: Pcm) -> bytes:
    """16-bit mono 16 kHz FLAC of `pcm` (T,)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=_FLAC_LEVEL)
    return buffer.getvalue()


def encode_int16(pcm: Pcm) -> bytes:
    """Version 1.0 ``.npy`` of `pcm` (T,), little-endian, with a header of `ARRAY_HEADER` bytes.

    The header is written here because `numpy.save` may pad it differently in another version.
    """
    text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': ({pcm.size},), }}"
    room = ARRAY_HEADER - 10
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + text.ljust(room - 1).encode("ascii") + b"\n"
    return head + pcm.astype("<i2").tobytes()


def decode_flac(content: bytes, samples: int, start: int, frames: int) -> Audio:
    """`frames` samples (T,) in [-1, 1) from sample `start` of a FLAC member that holds `samples`.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if not content.startswith(b"fLaC"):
        raise ValueError("is not FLAC")
    try:
        with OnePassFile(io.BytesIO(content)) as sound:
            found = (sound.samplerate, sound.channels, sound.frames)
            if found != (SAMPLE_RATE, 1, samples):
                raise ValueError(f"has (rate, channels, samples) {found}, not {(SAMPLE_RATE, 1, samples)}")
            sound.seek(start)
            audio = cast(Audio, sound.read(frames, dtype="float32"))
    except soundfile.SoundFileRuntimeError as error:
        raise ValueError(f"does not decode: {error}") from error
    if audio.shape != (frames,):
        raise ValueError(f"decodes to {audio.size} samples where {frames} were wanted")
    return audio


def decode_int16(content: bytes | memoryview) -> Audio:
    """Samples (T,) in [-1, 1) of the bytes after the header of a ``.npy`` member."""
    return np.frombuffer(content, dtype="<i2").astype(np.float32) * np.float32(1 / 32768)
