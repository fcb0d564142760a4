"""Whether the shards will fit on the disk: a rough look before any file is read, a closer one after."""

from __future__ import annotations

import shutil
from pathlib import Path

import soundfile

from mvat_dist.config.schema import SAMPLE_RATE
from mvat_dist.data.audio import known_frames
from mvat_dist.data.prepare.corpora import Listing
from mvat_dist.data.prepare.plan import Plan
from mvat_dist.data.prepare.reading import locate, open_recording
from mvat_dist.data.shards.codecs import Codec
from mvat_dist.errors import UserError
from mvat_dist.io import existing_folder

_SHARE: dict[Codec, float] = {"flac": 0.6, "int16": 1.0}
"""Stored bytes per byte of 16-bit audio: FLAC of speech 0.5, of noise up to 0.8."""
_BESIDE_AUDIO = 3072
"""Bytes of an utterance's headers, padding, JSON and index."""
_PROBED = 200
_CERTAIN = 0.5
"""Share of the rough forecast that must fit: it knows neither what will be left out nor how FLAC does."""


def check_roughly(listing: Listing, out: Path, codec: Codec) -> None:
    """Refuse a disk that is clearly too small, from the headers of a few files of the corpus.

    Raises:
        UserError: not even half of what the shards seem to need is free.
    """
    paths = [one.path for one in listing.sources]
    paths += [path for pair in listing.pairs for path in (pair.clean, pair.noisy)]
    probed = [
        seconds for path in paths[:: max(1, len(paths) // _PROBED)] if (seconds := _seconds(listing, path))
    ]
    if probed:
        mean = sum(probed) / len(probed)
        needed = len(paths) * (mean * _bytes_per_second(codec) + _BESIDE_AUDIO)
        _refuse_if_short(out, needed, _CERTAIN * needed)


def check_plan(out: Path, plan: Plan, codec: Codec) -> None:
    """Refuse a disk that is too small for what will be written, less what an earlier try wrote.

    Raises:
        UserError: it does not fit.
    """
    utterances = [one for subset in plan.subsets for shard in subset.shards for one in shard]
    seconds = sum(len(one.signals) * one.signals[0].seconds for one in utterances)
    needed = seconds * _bytes_per_second(codec) + len(utterances) * _BESIDE_AUDIO
    _refuse_if_short(out, needed, needed)


def _bytes_per_second(codec: Codec) -> float:
    return 2 * SAMPLE_RATE * _SHARE[codec]


def _seconds(listing: Listing, path: str) -> float:
    """Duration by the file's header; 0 where it has none that can be read, or leaves its length open."""
    try:
        with open_recording(locate(listing.corpus, path)) as sound:
            return (known_frames(sound.frames) or 0) / float(sound.samplerate)
    except (soundfile.SoundFileRuntimeError, OSError):
        return 0.0


def _refuse_if_short(out: Path, forecast: float, needed: float) -> None:
    place = existing_folder(out)
    kept = sum(path.stat().st_size for path in out.rglob("audio-*.tar"))
    free = shutil.disk_usage(place).free
    if needed - kept > free:
        raise UserError(
            f"the shards need about {(forecast - kept) / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB "
            "free: free space or give another --out"
        )
