"""Packed shards to training batches: the same global batches on any number of ranks and workers.

The stream is the concatenation of all epochs. Its sample i is (epoch, position) = divmod(i, N), optimiser
step s takes the samples ``s * batch`` to ``(s + 1) * batch - 1``, and a rank takes its slices of these by
arithmetic. So no state has to be saved: a run that goes on from step k, on whatever number of ranks, asks
for ``first_step=k`` and gets what it would have got. A batch may straddle two epochs, nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mvat_dist.config import SAMPLE_RATE, DataConfig
from mvat_dist.data import workers as readers
from mvat_dist.data.checks import check_config, training_mode
from mvat_dist.data.order import LARGEST_SEED, Draws, epoch_order
from mvat_dist.data.segments import Maker, PairSegments, Segment, SourceSegments, segment_length
from mvat_dist.data.shards import ShardSet, subset_names
from mvat_dist.errors import UserError

PREFETCH = 4
"""Micro-batches that each worker keeps ready: reverberation, tempo and long files make their cost uneven."""


class TrainingData:
    """The training segments of a packed corpus. Picklable; holds no random state.

    Attributes:
        mode: `sources` or `pairs`, as chosen.
        iterated: the subset whose utterances are visited in turn.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        """Open the corpus at ``config.train``; reads manifests and indices, no audio.

        Raises:
            UserError: a senseless value, no packed corpus, or one that lacks what `config` asks for.
        """
        check_config(config)
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seed {seed}: choose one from 0 to {LARGEST_SEED}")
        self.config = config
        self.seed = seed
        self.mode = training_mode(config)
        self._maker: Maker = _open_sources(config) if self.mode == "sources" else _open_pairs(config)
        self.iterated = self._maker.iterated

    def __len__(self) -> int:
        """Items an epoch: clean utterances, pairs, or places of the grid of segments."""
        return len(self._maker)

    def item(self, epoch: int, position: int) -> Segment:
        """The segment at `position` (0 to N - 1) of `epoch`: a pure function, wherever it is called."""
        item = int(epoch_order(self.seed, epoch, len(self))[position])
        segment = self._maker.make(item, Draws(self.seed, epoch, position))
        place = {"mode": self.mode, "epoch": epoch, "position": position}
        return Segment(segment.noisy, segment.clean, place | segment.recipe)


def _open(config: DataConfig, name: str) -> ShardSet:
    subset = ShardSet.open(Path(config.train) / name)
    if len(subset) == 0:
        raise UserError(
            f"{subset.folder} holds no utterances: its manifest lists what packing left out, and why; "
            "mend the corpus and pack it again with python -m mvat_dist.pack"
        )
    return subset


def _open_sources(config: DataConfig) -> SourceSegments:
    clean, noise = _open(config, "train_clean"), _open(config, "train_noise")
    _check_length(config, int(clean.samples.sum()), f"all speech of {clean.folder} together")
    rirs = None
    if config.reverb_probability > 0.0:
        if "train_rir" not in subset_names(config.train):
            raise UserError(
                f"{config.train} has no room impulse responses (train_rir), but --data.reverb_probability is "
                f"{config.reverb_probability}: set --data.reverb_probability 0 or pack a corpus that has some"
            )
        rirs = _open(config, "train_rir")
    return SourceSegments(config, clean, noise, rirs)


def _open_pairs(config: DataConfig) -> PairSegments:
    pairs = _open(config, "train_pairs")
    _check_length(config, int(pairs.samples.max()), f"the longest pair of {pairs.folder}")
    return PairSegments(config, pairs)


def _check_length(config: DataConfig, samples: int, what: str) -> None:
    if samples < segment_length(config):
        seconds = samples / SAMPLE_RATE
        raise UserError(
            f"--data.segment_seconds {config.segment_seconds:g} is longer than {what} ({seconds:.2f} s): "
            f"choose at most {seconds:.2f}"
        )


def check_batch(data: TrainingData, batch: int) -> None:
    """Refuse an optimiser step that is longer than an epoch: it would hold the same utterance twice.

    Raises:
        UserError: with the largest batch.
    """
    if batch > len(data):
        raise UserError(
            f"--train.batch {batch} is more than an epoch of {data.iterated.folder} has: use at most "
            f"{len(data)}, or more data"
        )


def split_batch(batch: int, world_size: int, micro_batch: int) -> tuple[int, int]:
    """(segments of a rank's micro-batch, accumulation steps) for `batch` segments an optimiser step.

    The micro-batch is the largest one that is at most `micro_batch` and divides the rank's share.

    Raises:
        UserError: the ranks cannot share the batch evenly.
    """
    if batch < 1 or micro_batch < 1:
        raise UserError(f"--train.batch {batch}, --train.micro_batch {micro_batch}: both must be at least 1")
    if batch % world_size:
        near = [
            size for size in (batch - batch % world_size, batch - batch % world_size + world_size) if size
        ]
        raise UserError(
            f"--train.batch {batch} does not divide by {world_size} ranks: use --train.batch "
            f"{' or '.join(map(str, near))}, or a number of ranks that divides {batch}"
        )
    share = batch // world_size
    micro = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
    return micro, share // micro


@dataclass(frozen=True)
class Batch:
    """A rank's micro-batch."""

    noisy: torch.Tensor
    """(b, T) float32: the network's input."""
    clean: torch.Tensor
    """(b, T) float32: the target."""
    recipes: list[dict[str, Any]]
    """How each segment was made."""

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader calls this where there is a GPU."""
        return Batch(self.noisy.pin_memory(), self.clean.pin_memory(), self.recipes)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, copied without waiting where its memory is page-locked."""
        noisy, clean = (signal.to(device, non_blocking=True) for signal in (self.noisy, self.clean))
        return Batch(noisy, clean, self.recipes)


@dataclass(frozen=True)
class _Slices:
    """The global sample numbers of a rank's micro-batches, in order: arithmetic, so resuming costs nothing.

    Accumulation step a of rank r takes the ``micro`` samples from ``(a * world_size + r) * micro`` of each
    global batch, so that the samples of one forward pass over all ranks are neighbours.
    """

    batch: int
    micro: int
    accumulation: int
    rank: int
    world_size: int
    first_step: int
    steps: int

    def __iter__(self) -> Iterator[range]:
        for step in range(self.first_step, self.first_step + self.steps):
            for turn in range(self.accumulation):
                first = step * self.batch + (turn * self.world_size + self.rank) * self.micro
                yield range(first, first + self.micro)

    def __len__(self) -> int:
        return self.steps * self.accumulation


class _MicroBatches(Dataset["Batch | UserError"]):
    """Map from a range of global sample numbers to their micro-batch."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __getitem__(self, numbers: range) -> Batch | UserError:
        try:
            segments = [self._data.item(*divmod(number, len(self._data))) for number in numbers]
        except UserError as error:
            # A damaged shard. Returned, for DataLoader would wrap its one clear line in a worker's traceback.
            return error
        noisy = torch.from_numpy(np.stack([segment.noisy for segment in segments]))
        clean = torch.from_numpy(np.stack([segment.clean for segment in segments]))
        return Batch(noisy, clean, [segment.recipe for segment in segments])


def batches(
    data: TrainingData,
    *,
    batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    steps: int,
    workers: int,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of `steps` optimiser steps from `first_step`, one list per step.

    Workers start in this call and end with the iterator; they serve all epochs. `workers` 0 reads in this
    process. A micro-batch on a machine with CUDA lies in page-locked memory.

    Raises:
        UserError: at once where `batch` cannot be shared or is larger than an epoch.
        ShardError: while iterating, for a damaged shard; the message names it and the key.
    """
    micro, accumulation = split_batch(batch, world_size, micro_batch)
    check_batch(data, batch)
    slices = _Slices(batch, micro, accumulation, rank, world_size, first_step, steps)
    loader = DataLoader(
        _MicroBatches(data),
        sampler=slices,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=readers.START_METHOD if workers else None,
        worker_init_fn=readers.initialise if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # DataLoader draws a number; not from the generator of the run
    )
    if workers == 0:
        return _by_step(iter(loader), accumulation)
    with readers.starting():
        return _by_step(iter(loader), accumulation)


def _by_step(micro_batches: Iterator[Batch | UserError], accumulation: int) -> Iterator[list[Batch]]:
    step: list[Batch] = []
    for made in micro_batches:
        if isinstance(made, UserError):
            raise made
        step.append(made)
        if len(step) == accumulation:
            yield step
            step = []
