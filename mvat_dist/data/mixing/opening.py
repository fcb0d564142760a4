"""Open the subsets that a configuration trains with."""

from __future__ import annotations

from mvat_dist.config.schema import SAMPLE_RATE, DataConfig
from mvat_dist.data.mixing.checks import Mode, reads_rooms
from mvat_dist.data.mixing.dynamic import SourceSegments
from mvat_dist.data.mixing.premixed import PairSegments
from mvat_dist.data.mixing.segments import Maker, segment_length
from mvat_dist.data.shards.corpus import Corpus, open_subset
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.errors import UserError


def open_maker(config: DataConfig, mode: Mode) -> Maker:
    """What makes the segments of ``config.train`` in `mode`; reads manifests and indices, no audio.

    Raises:
        UserError: the corpus lacks what `config` asks for.
    """
    return _open_sources(config) if mode == "sources" else _open_pairs(config)


def _open(corpus: Corpus, name: str) -> ShardSet:
    subset = open_subset(corpus.subset(name))
    if len(subset) == 0:
        raise UserError(
            f"{subset.where} holds no utterances: its manifest lists what packing left out, and why; "
            "mend the corpus and pack it again with python -m mvat_dist.pack"
        )
    return subset


def _open_sources(config: DataConfig) -> SourceSegments:
    corpus = Corpus.of(config)
    clean, noise = _open(corpus, "train_clean"), _open(corpus, "train_noise")
    for what, subset in (("speech", clean), ("noise", noise)):
        _check_length(config, int(subset.samples.sum()), f"all {what} of {subset.where} together")
    rirs = None
    if reads_rooms(config):
        if "train_rir" not in corpus.names:
            raise UserError(
                f"{config.train} has no room impulse responses (train_rir), but --data.reverb_probability is "
                f"{config.reverb_probability}: set --data.reverb_probability 0 or --data.made_up_rooms 1, or "
                "pack a corpus that has some"
            )
        rirs = _open(corpus, "train_rir")
    return SourceSegments(config, clean, noise, rirs)


def _open_pairs(config: DataConfig) -> PairSegments:
    pairs = _open(Corpus.of(config), "train_pairs")
    _check_length(config, int(pairs.samples.max()), f"the longest pair of {pairs.where}")
    return PairSegments(config, pairs)


def _check_length(config: DataConfig, samples: int, what: str) -> None:
    if samples < segment_length(config):
        seconds = samples / SAMPLE_RATE
        raise UserError(
            f"--data.segment_seconds {config.segment_seconds:g} is longer than {what} ({seconds:.2f} s): "
            f"choose at most {seconds:.2f}"
        )
