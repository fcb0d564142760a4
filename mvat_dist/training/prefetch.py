"""A rank's batches, step by step: read ahead, counted where damaged, and refused by all ranks together."""

from __future__ import annotations

import torch

from mvat_dist.config.schema import Config
from mvat_dist.data.batch import Batch
from mvat_dist.data.loader import batches
from mvat_dist.data.mixing.dataset import BadSampleLimit, TrainingData
from mvat_dist.distributed import collectives
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError


class Intake:
    """The micro-batches of the remaining steps."""

    def __init__(self, config: Config, data: TrainingData, ranks: Ranks, first_step: int) -> None:
        self._batch, self._rank = config.train.batch, ranks.rank
        self._stream = batches(
            data,
            batch=config.train.batch,
            micro_batch=config.train.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            first_step=first_step,
            steps=config.train.steps - first_step,
            workers=config.data.workers,
        )
        self._budget: BadSampleLimit | None = None
        if config.data.on_bad_sample == "skip":
            self._budget = BadSampleLimit(config.data.max_bad_samples, len(data))
        self._upcoming: list[Batch] = []
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not read the next step's micro-batches."""
        return self._error is not None

    @property
    def damaged(self) -> int | None:
        """Segments replaced so far, of all ranks; None where damage ends the run."""
        return None if self._budget is None else self._budget.replaced

    def read_ahead(self) -> None:
        """Have the next step's micro-batches; a failure is kept until `check`.

        A rank that ended with it here would leave the others waiting in the next collective.
        """
        try:
            self._upcoming = next(self._stream)
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise what kept this rank from reading, if anything did: for `collectives.run_on_all_ranks`."""
        if self._error:
            raise self._error

    def take(self) -> list[Batch]:
        """The micro-batches that were read ahead."""
        taken, self._upcoming = self._upcoming, []
        return taken

    def count_damage(self, micro_batches: list[Batch], device: torch.device) -> None:
        """Count replaced segments over all ranks, so that all of them refuse at the same step.

        Raises:
            UserError: more than `data.max_bad_samples`.
        """
        if self._budget is None:
            return
        damaged = torch.tensor([float(sum(batch.replaced for batch in micro_batches))], device=device)
        collectives.all_reduce_sum([damaged])
        self._budget.count(int(damaged.item()), self._batch)
        if refusal := self._budget.refusal():
            raise UserError(refusal, say=self._rank == 0)
