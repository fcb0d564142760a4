"""Refuse training data that cannot be used, before anything is opened; needs no torch.

A login node checks before a job waits in a queue, and the trainer checks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mvat_dist.config.schema import DataConfig
from mvat_dist.data.mixing.augment import CODECS, codec_names, writable_codecs
from mvat_dist.data.mixing.segments import segment_length, stride_length
from mvat_dist.data.shards.corpus import Corpus, remote_bytes, shard_count
from mvat_dist.data.shards.manifest import Folder
from mvat_dist.errors import UserError, nearest

Mode = Literal["dynamic", "premixed"]
ITERATED: dict[Mode, str] = {"dynamic": "train_clean", "premixed": "train_pairs"}
"""The subset whose utterances are visited in turn."""
_NEEDED: dict[Mode, tuple[str, ...]] = {
    "dynamic": ("train_clean", "train_noise"),
    "premixed": ("train_pairs",),
}


def reads_rooms(config: DataConfig) -> bool:
    """Whether dynamic mixing takes rooms of the corpus."""
    return config.reverb_probability > 0.0 and config.synthetic_rooms < 1.0


def _subsets_read(config: DataConfig, mode: Mode) -> tuple[str, ...]:
    """The subsets that training reads."""
    return (*_NEEDED[mode], "train_rir") if mode == "dynamic" and reads_rooms(config) else _NEEDED[mode]


def check_config(config: DataConfig) -> None:
    """Refuse values that contradict each other or that no corpus can serve.

    The types of the options bound each of them alone.

    Raises:
        UserError: names the option, its value and what is allowed.
    """
    for name in ("snr_db", "level_dbfs", "tempo_range", "gain_db", "bandwidth_hz"):
        low, high = getattr(config, name)
        if not low <= high:
            raise UserError(f"--data.{name} [{low}, {high}]: give the lower bound first")
    if segment_length(config) < 1:
        raise UserError(f"--data.segment_seconds {config.segment_seconds}: shorter than one sample at 16 kHz")
    if config.stride_seconds > 0 and stride_length(config) < 1:
        raise UserError(f"--data.stride_seconds {config.stride_seconds:g}: shorter than one sample at 16 kHz")
    if config.codec_probability > 0.0:
        _check_codecs(config)


def _check_codecs(config: DataConfig) -> None:
    names = codec_names(config)
    if not names:
        raise UserError("--data.codecs is empty: name some, or set --data.codec_probability 0")
    for name in names:
        if name not in CODECS:
            raise UserError(f"--data.codecs: no codec {name!r}; did you mean {nearest(name, CODECS)}?")
        if name not in writable_codecs():
            raise UserError(
                f"--data.codecs: this machine's libsndfile does not write {name}; it writes "
                f"{', '.join(sorted(writable_codecs()))}"
            )


def training_mode(config: DataConfig) -> Mode:
    """The mode asked for, or the one that the corpus offers.

    Raises:
        UserError: no packed corpus, one without what the mode needs, or a grid in mode `dynamic`.
    """
    corpus = Corpus.of(config)
    names = corpus.names
    missing = {mode: [name for name in subsets if name not in names] for mode, subsets in _NEEDED.items()}
    if config.mode != "auto" and missing[config.mode]:
        raise UserError(
            f"--data.mode {config.mode} needs {' and '.join(_NEEDED[config.mode])}, but {config.train} "
            f"has only {', '.join(names)}; use --data.mode auto, or pack that part with "
            "python -m mvat_dist.pack"
        )
    for mode in _NEEDED:
        if config.mode in ("auto", mode) and not missing[mode]:
            _check_all_used(corpus, mode, _subsets_read(config, mode))
            if mode == "dynamic" and config.stride_seconds > 0:
                raise UserError(
                    f"--data.stride_seconds {config.stride_seconds:g}: {config.train} is mixed dynamically, "
                    "which has no grid of segments: leave it out, or read pairs with --data.mode premixed"
                )
            return mode
    raise UserError(
        f"{config.train} has nothing to train on: neither train_clean with train_noise nor train_pairs, only "
        f"{', '.join(names) or 'an empty manifest'}; pack a training corpus with python -m mvat_dist.pack"
    )


def _check_all_used(corpus: Corpus, mode: Mode, read: Sequence[str]) -> None:
    """Refuse several corpora of which one would not be read at all."""
    if idle := corpus.without(read):
        raise UserError(
            f"{idle[0]} has nothing for --data.mode {mode}, which reads {', '.join(read)} of {corpus.data}: "
            "leave it out, or choose the mode"
        )


def check_readers(config: DataConfig, world_size: int) -> None:
    """Refuse fewer shards than processes that read them at once.

    The order does not depend on shards, and any reader opens any of them, so the data would be the same. But
    with more readers than files many nodes read one file at the same time, which neither a parallel file
    system (striped by file) nor a cache (filled by file) serves well. Refusing at the start is better than a
    slow run. The subset that is visited in turn counts; noise and rooms are small.

    Raises:
        UserError: with the three ways out.
    """
    mode = training_mode(config)
    corpus = Corpus.of(config)
    count = readable_shards(config)
    needed = world_size * max(1, config.workers)
    if count < needed:
        raise UserError(
            f"{' and '.join(map(str, corpus.subset(ITERATED[mode])))} has {count} "
            f"{'shard' if count == 1 else 'shards'} for {needed} readers "
            f"({world_size} ranks x {max(1, config.workers)} workers): pack it into more shards "
            "(python -m mvat_dist.pack ... --min-shards), or use fewer ranks, or fewer --data.workers"
        )
    _check_cache(config, [folder for name in _subsets_read(config, mode) for folder in corpus.subset(name)])


def readable_shards(config: DataConfig) -> int:
    """Shards of the subset that is visited in turn, which is the most readers that it can serve."""
    return shard_count(Corpus.of(config).subset(ITERATED[training_mode(config)]))


def _check_cache(config: DataConfig, folders: Sequence[Folder]) -> None:
    # Every epoch visits the utterances of all shards in one shuffled order: with less room, almost every
    # utterance would fetch a shard.
    size = remote_bytes(folders) / 1e9
    if size > config.cache_gb:
        raise UserError(
            f"the shards of {config.train} that training reads have {size:.1f} GB, and --data.cache_gb is "
            f"{config.cache_gb:g}: give them room for all, on each node, at --data.cache_dir"
        )
