"""What is refused about the training data before anything is opened; needs no torch.

A login node asks these questions before a job waits in a queue, the trainer asks them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mvat_dist.config import DataConfig
from mvat_dist.data.segments import segment_length
from mvat_dist.data.shards import read_manifest, subset_names
from mvat_dist.errors import UserError

Mode = Literal["sources", "pairs"]
ITERATED: dict[Mode, str] = {"sources": "train_clean", "pairs": "train_pairs"}
"""The subset whose utterances are visited in turn."""


def check_config(config: DataConfig) -> None:
    """Refuse values that no corpus can serve.

    Raises:
        UserError: names the option, its value and what is allowed.
    """
    for name in ("snr_db", "level_dbfs", "tempo_range", "gain_db"):
        low, high = getattr(config, name)
        if not low <= high:
            raise UserError(f"--data.{name} [{low}, {high}]: give the lower bound first")
    for name in ("reverb_probability", "tempo_probability", "remix_probability"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise UserError(f"--data.{name} {getattr(config, name)}: a probability lies between 0 and 1")
    if config.level_dbfs[1] > 0.0:
        raise UserError(f"--data.level_dbfs {list(config.level_dbfs)}: full scale is 0 dBFS, so at most 0")
    if not 0.5 <= config.tempo_range[0] <= config.tempo_range[1] <= 2.0:
        raise UserError(f"--data.tempo_range {list(config.tempo_range)}: factors lie between 0.5 and 2")
    if segment_length(config) < 1:
        raise UserError(f"--data.segment_seconds {config.segment_seconds}: must be above 0")
    if config.stride_seconds < 0.0:
        raise UserError(f"--data.stride_seconds {config.stride_seconds}: must be 0 or above")
    if config.workers < 0:
        raise UserError(f"--data.workers {config.workers}: must be 0 or above")


def training_mode(config: DataConfig) -> Mode:
    """The mode asked for, or the one that the corpus offers.

    Raises:
        UserError: no packed corpus, or one without what the mode needs.
    """
    names = subset_names(config.train)
    needed: dict[Mode, tuple[str, ...]] = {
        "sources": ("train_clean", "train_noise"),
        "pairs": ("train_pairs",),
    }
    missing = {mode: [name for name in subsets if name not in names] for mode, subsets in needed.items()}
    if config.mode != "auto":
        if missing[config.mode]:
            raise UserError(
                f"--data.mode {config.mode} needs {' and '.join(needed[config.mode])}, but {config.train} "
                f"has only {', '.join(names)}; use --data.mode auto, or pack that part with "
                "python -m mvat_dist.pack"
            )
        return config.mode
    for mode, absent in missing.items():
        if not absent:
            return mode
    raise UserError(
        f"{config.train} has nothing to train on: neither train_clean with train_noise nor train_pairs, only "
        f"{', '.join(names) or 'an empty manifest'}; pack a training corpus with python -m mvat_dist.pack"
    )


def check_readers(config: DataConfig, world_size: int) -> None:
    """Refuse fewer shards than processes that read them at once.

    The order does not depend on shards, and any reader opens any of them, so the data would be the same. But
    more readers than files means that many nodes pull on one file at the same time, which neither a parallel
    file system (striped by file) nor a cache (filled by file) serves well: it is noticed at the start, not
    as a slow run. The subset that is visited in turn counts; noise and rooms are small.

    Raises:
        UserError: with the three ways out.
    """
    folder = Path(config.train) / ITERATED[training_mode(config)]
    count = len(read_manifest(folder, "a packed subset")["shards"])
    needed = world_size * max(1, config.workers)
    if count < needed:
        raise UserError(
            f"{folder} has {count} {'shard' if count == 1 else 'shards'} for {needed} readers "
            f"({world_size} ranks x {max(1, config.workers)} workers): pack it into more shards "
            "(python -m mvat_dist.pack ... --min-shards), or use fewer ranks, or fewer --data.workers"
        )
