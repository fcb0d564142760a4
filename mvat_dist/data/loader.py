"""Packed shards to training batches: the same global batches on any number of ranks and workers.

What comes when is arithmetic (`data.mixing.sampler`), so that a stream's whole state is the number of
its next step: a run that continues from step k, on whatever number of ranks, gets what it would have got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mvat_dist.data import workers as readers
from mvat_dist.data.batch import Batch, collate
from mvat_dist.data.mixing.dataset import BadSampleLog
from mvat_dist.data.mixing.dataset import TrainingData as TrainingData
from mvat_dist.data.mixing.fingerprint import differences, with_newer_fields
from mvat_dist.data.mixing.sampler import RankSampler, micro_batch_size
from mvat_dist.errors import UserError

PREFETCH = 4
"""Micro-batches that each worker keeps ready: reverberation, tempo and long files make their cost uneven."""


def check_batch(data: TrainingData, batch: int) -> None:
    """Refuse an optimiser step that is longer than an epoch: it would hold the same utterance twice.

    Raises:
        UserError: with the largest batch.
    """
    if batch > len(data):
        raise UserError(
            f"--train.batch {batch} is more than an epoch of {data.iterated.where} has: use at most "
            f"{len(data)}, or more data"
        )


def split_batch(batch: int, world_size: int, micro_batch: int) -> tuple[int, int]:
    """(segments of a rank's micro-batch, accumulation steps) for `batch` segments an optimiser step.

    The micro-batch is the largest one that is at most `micro_batch` and divides the rank's local batch.

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
    local_batch = batch // world_size
    micro = micro_batch_size(local_batch, micro_batch)
    return micro, local_batch // micro


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
        return collate(segments)


class BatchStream(Iterator[list[Batch]]):
    """A rank's micro-batches, one list per optimiser step; see `batches`."""

    def __init__(
        self,
        data: TrainingData,
        sampler: RankSampler,
        workers: int,
        bad_sample_log: BadSampleLog | None = None,
    ) -> None:
        self._data = data
        self._sampler = sampler
        self._workers = workers
        self._bad_sample_log = bad_sample_log or BadSampleLog()
        self._fingerprint: dict[str, Any] | None = None
        self._micro_batches: Iterator[Batch | UserError] | None = None

    def __next__(self) -> list[Batch]:
        if not self._sampler.steps:
            raise StopIteration
        if self._micro_batches is None:
            self._micro_batches = self._start()
        step: list[Batch] = []
        for _ in range(self._sampler.accumulation):
            batch = next(self._micro_batches)
            if isinstance(batch, UserError):
                self._micro_batches = None  # the next call starts this step again
                raise batch
            step.append(batch)
            self._bad_sample_log.warn(line for recipe in batch.recipes for line in recipe["bad_samples"])
        self._go_to(self._sampler.first_step + 1)
        return step

    def state_dict(self) -> dict[str, Any]:
        """The next step and the fingerprint of the stream, as plain values; the same on every rank."""
        return {"step": self._sampler.first_step, **self._subject()}

    def _subject(self) -> dict[str, Any]:
        if self._fingerprint is None:
            self._fingerprint = self._data.fingerprint()
        # The fingerprint leaves the seed out where no segment depends on it; the order always does.
        return {**self._fingerprint, "batch": self._sampler.batch, "seed": self._data.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream of the same data was, on whatever ranks, micro-batches and workers.

        The last step stays the one that this stream was made for.

        Raises:
            UserError: the state of a stream of other data, with what differs.
        """
        saved = with_newer_fields({name: value for name, value in state.items() if name != "step"})
        if differing := list(differences(saved, self._subject())):
            raise UserError(
                f"the saved stream is of other data ({'; '.join(differing)}): give it what it began with, or "
                "begin a new run"
            )
        self._micro_batches = None
        self._go_to(state["step"])

    def _go_to(self, step: int) -> None:
        last = self._sampler.first_step + self._sampler.steps
        self._sampler = replace(self._sampler, first_step=step, steps=max(0, last - step))

    def _start(self) -> Iterator[Batch | UserError]:
        workers = self._workers
        loader = DataLoader(
            _MicroBatches(self._data),
            sampler=self._sampler,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=readers.START_METHOD if workers else None,
            worker_init_fn=readers.initialise if workers else None,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # DataLoader draws a number; not from the generator of the run
        )
        if workers == 0:
            return iter(loader)
        with readers.starting():
            return iter(loader)


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
) -> BatchStream:
    """This rank's micro-batches of `steps` optimiser steps from `first_step`, one list per step.

    Workers start with the first step and end with the iterator; they serve all epochs. `workers` 0 reads in
    this process. A micro-batch on a machine with CUDA lies in page-locked memory.

    Raises:
        UserError: at once where `batch` cannot be shared or is larger than an epoch.
        ShardError: while iterating, for a bad sample that is not skipped; it names the shard and the key.
    """
    micro, accumulation = split_batch(batch, world_size, micro_batch)
    check_batch(data, batch)
    sampler = RankSampler(batch, micro, accumulation, rank, world_size, first_step, steps)
    return BatchStream(data, sampler, workers)
