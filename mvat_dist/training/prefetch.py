"""Read the next step's micro-batches ahead; a rank's failure to read waits until all ranks can act on it."""

from __future__ import annotations

from collections.abc import Iterator

from mvat_dist.config.schema import DataConfig, TrainConfig
from mvat_dist.data.batch import Batch
from mvat_dist.data.loader import batches
from mvat_dist.data.mixing.dataset import BadSampleLimit, TrainingData
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError


class Prefetcher:
    """This rank's micro-batches of the remaining steps."""

    def __init__(
        self,
        data: TrainingData,
        data_config: DataConfig,
        train_config: TrainConfig,
        ranks: Ranks,
        first_step: int,
    ) -> None:
        """Prepare to read from step `first_step` on; the readers start with the first `fetch_next`."""
        self._batch, self._rank = train_config.batch, ranks.rank
        self._steps: Iterator[list[Batch]] = batches(
            data,
            batch=train_config.batch,
            micro_batch=train_config.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            first_step=first_step,
            steps=train_config.steps - first_step,
            workers=data_config.workers,
        )
        self._limit: BadSampleLimit | None = None
        if data_config.on_bad_sample == "skip":
            self._limit = BadSampleLimit(data_config.max_bad_samples, len(data))
        self._next: list[Batch] = []
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not read the next step's micro-batches."""
        return self._error is not None

    @property
    def bad_samples(self) -> int | None:
        """Segments replaced so far on all ranks; None where a bad sample ends the run."""
        return None if self._limit is None else self._limit.replaced

    def fetch_next(self) -> None:
        """Have the next step's micro-batches ready; a failure is kept until `raise_failure`.

        A rank that raised it here would leave the others waiting in the next collective.
        """
        try:
            self._next = next(self._steps)
        except Exception as error:
            self._error = error

    def raise_failure(self) -> None:
        """Raise what kept this rank from reading, if anything did: for `collectives.run_on_all_ranks`."""
        if self._error:
            raise self._error

    def take(self) -> list[Batch]:
        """The micro-batches that were fetched last."""
        micro_batches, self._next = self._next, []
        return micro_batches

    def count_bad_samples(self, replaced: int) -> None:
        """Count the segments of one step that replaced bad samples, on all ranks.

        Raises:
            UserError: more than `data.max_bad_samples` so far, on every rank at the same step.
        """
        if self._limit is None:
            return
        self._limit.count(replaced, self._batch)
        if refusal := self._limit.refusal():
            raise UserError(refusal, say=self._rank == 0)
