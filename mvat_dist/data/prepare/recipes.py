"""What the user decides about packing; ``shards/*.yaml`` are recipes in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mvat_dist.data.shards.codecs import Codec


@dataclass
class Recipe:
    """What decides the content of the shards."""

    seed: int = 0
    """Seed of the order of the utterances and of what is held out."""
    max_shard_size: float = 64.0
    """Largest shard in MB (10^6 bytes), reckoned without compression; most come out half as large."""
    min_shards: int = 32
    """Fewest shards of a training subset, as far as it has utterances: readers share them out, and a
    small corpus in two large files could feed only two."""
    min_seconds: float = 1.0
    """Shorter recordings are left out, in seconds."""
    piece_seconds: float = 30.0
    """Longer recordings of speech and noise are cut into equal pieces of at most this many seconds."""
    codec: Codec = "flac"
    """How audio is stored: `flac`, half as large, for slow or small disks and networks; `int16`, NumPy
    arrays that need no decoding, for fast local disks. Both hold the same samples."""


@dataclass
class DnsRecipe(Recipe):
    """How a corpus in the DNS-Challenge layout is packed."""

    valid_fraction: float = 0.1
    """Largest share of the speakers and of the noise recordings held out of training for validation."""
    valid_clips: int = 64
    """Most validation clips mixed from them (or held-out pairs, where there are only pairs)."""
    valid_seconds: float = 10.0
    """Longest validation clip in seconds."""

    @property
    def validates(self) -> bool:
        """Whether anything is held out."""
        return self.valid_fraction > 0 and self.valid_clips > 0


@dataclass
class ValentiniRecipe(Recipe):
    """How the VoiceBank+DEMAND corpus is packed."""

    trainset: Literal["28spk", "56spk", "both"] = "28spk"
    """Training set; `both` is the 84 speakers together."""
    valid_speakers: str = "p282,p287"
    """Comma-separated speakers of the training set whose utterances become `valid`."""


@dataclass
class WebDatasetRecipe(DnsRecipe):
    """How a corpus of WebDataset tars is packed; tars are named by patterns below the corpus."""

    speech: str = ""
    """Tars with clean speech, with braces and globs: 'speech/*.tar', 'en-{000..099}.tar'."""
    noise: str = ""
    """Tars with noise."""
    rooms: str = ""
    """Tars with room impulse responses."""
    pairs: str = ""
    """Tars with pairs of noisy and clean recordings to train with."""
    test_pairs: str = ""
    """Tars with pairs that become the test set test_webdataset."""
    clean: str = "clean"
    """Extension of the clean half of a pair, before .flac or .wav: KEY.clean.flac."""
    noisy: str = "noisy"
    """Extension of the noisy half of a pair, before .flac or .wav."""
