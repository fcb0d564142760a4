"""How long a sound file says that it is, and whether all of that is there.

Decoders of files that were cut off give what there is and say nothing of the rest; only FLAC's fails.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import soundfile

from mvat_dist.data.audio import known_frames

_SAID_AND_THERE = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE
)
"""In libsndfile's log: sizes of the audio in WAV, AIFF and AU, and of the whole in W64 and RF64."""
_STREAMED_BYTES = 0x7FFFF000
"""Programs that write into a pipe cannot know the size, and put a huge number there."""
_PADDING_BYTES = 1
"""Often left out after an odd number of bytes."""

_SAMPLE_BYTES = {
    "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1,
}  # fmt: skip
_WAV_BYTES = 1 << 32
_OTHER_CHUNKS = 1 << 20
"""Bytes that a WAV may have besides its audio."""

_OGG_PAGE = 27 + 255 + 255 * 255
"""Largest page in bytes (RFC 3533, section 6)."""
_OGG_LAST = 4
"""Flag of a page that ends its stream."""

_ESTIMATED = 0.01
"""Part by which the length of an MP3 without a table of contents may be off."""


def missing(source: Path, sound: soundfile.SoundFile, read: int) -> str:
    """What is not there of a file that was read to its end, in words; empty where nothing is missing.

    Args:
        source: the file.
        sound: the same, still open.
        read: frames that came out of it.
    """
    if sound.format == "OGG":
        return "" if _ogg_has_its_end(source) else "its last page is missing"
    if told := _SAID_AND_THERE.search(sound.extra_info):
        said, there = int(told[1]), int(told[2])
        if there + _PADDING_BYTES < said < _STREAMED_BYTES:
            return f"its header promises {said} bytes and {there} are there"
    promised = known_frames(sound.frames)
    if promised is not None and read < promised * (1 - _ESTIMATED):
        return f"its header promises {promised} frames and {read} are there"
    return ""


def out_of_reach(source: Path, sound: soundfile.SoundFile) -> bool:
    """Whether a WAV holds more than its sizes of 32 bits can say, as a recorder or a pipe may write it.

    libsndfile stops at what they say, and nothing would tell the rest from other chunks.
    """
    frame = _SAMPLE_BYTES.get(sound.subtype, 0) * sound.channels
    if sound.format not in ("WAV", "WAVEX") or not frame:
        return False
    size = source.stat().st_size
    return size > _WAV_BYTES and size - sound.frames * frame > _OTHER_CHUNKS


def _ogg_has_its_end(source: Path) -> bool:
    with source.open("rb") as opened:
        opened.seek(max(0, os.fstat(opened.fileno()).st_size - _OGG_PAGE))
        tail = opened.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & _OGG_LAST:
        return False
    segments = page[26]
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])
