"""Collectives: equal BatchNorm statistics, sums, objects, and failures that end all ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mvat_dist.distributed.collectives import (
    all_gather_object,
    all_reduce_sum,
    average_batchnorm,
    broadcast_object,
    run_on_all_ranks,
    run_on_rank_zero,
)
from mvat_dist.errors import UserError
from tests.ranks_harness import on_ranks

RANKS = 3


def one_rank(rank: int) -> dict[str, object]:
    last_batch = nn.BatchNorm1d(4, momentum=1.0)  # its running statistics are the last batch's
    slow = nn.BatchNorm1d(4, momentum=0.01)
    for norm in (last_batch, slow):
        norm(rank_batch(rank))
    average_batchnorm([last_batch, slow])
    summed = torch.tensor([float(rank), 1.0])
    all_reduce_sum([summed])
    return {
        "mean": last_batch.running_mean,
        "var": last_batch.running_var,
        "slow_mean": slow.running_mean,
        "slow_var": slow.running_var,
        "sum": summed,
        "gather": all_gather_object(rank * 10),
        "zero": broadcast_object(rank + 5),
        "rank zero": run_on_rank_zero(lambda: rank + 5),
        "refused": [refused(rank, UserError), refused(rank, OSError), refused(rank, ZeroDivisionError)],
    }


def refused(rank: int, kind: type[Exception]) -> str:
    """What rank's `run_on_all_ranks` raises where rank 1 meets an error of `kind`."""

    def build() -> int:
        if rank == 1:
            raise OSError(28, "No space left on device", "here") if kind is OSError else kind("on rank 1")
        return rank

    try:
        return str(run_on_all_ranks(build))
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'say', True)}: {error}"


def rank_batch(rank: int) -> torch.Tensor:
    return torch.randn(64, 4, 50, generator=torch.Generator().manual_seed(rank)) * (rank + 1) + rank


def mixture(momentum: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over ranks of running statistics kept by hand, as a mixture of equal parts."""
    means, seconds = [], []
    for rank in range(RANKS):
        batch = rank_batch(rank).double()
        mean = momentum * batch.mean(dim=(0, 2))
        variance = (1 - momentum) + momentum * batch.var(dim=(0, 2))
        means.append(mean)
        seconds.append(variance + mean.square())
    mean = torch.stack(means).mean(0)
    return mean, torch.stack(seconds).mean(0) - mean.square()


def test_ranks_agree(tmp_path: Path) -> None:
    results = on_ranks(RANKS, one_rank, tmp_path)
    union = torch.cat([rank_batch(rank) for rank in range(RANKS)])
    for result in results:
        assert torch.equal(result["mean"], results[0]["mean"])
        assert torch.equal(result["var"], results[0]["var"])
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["gather"] == [0, 10, 20]
        assert result["zero"] == 5
    assert [result["rank zero"] for result in results] == [5, None, None]
    for rank, result in enumerate(results):
        says = rank == 0
        user, disk, crash = result["refused"]
        assert user == f"UserError {says}: on rank 1"
        assert disk.startswith(f"UserError {says}: the disk is full at here")
        assert crash == (
            "ZeroDivisionError True: on rank 1"
            if rank == 1
            else f"CrashedElsewhereError {says}: another rank failed: ZeroDivisionError: on rank 1"
        )
    for got, expected in zip((results[0]["slow_mean"], results[0]["slow_var"]), mixture(0.01), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0]["mean"], union.mean(dim=(0, 2)))
    # Each rank's variance is the unbiased one of 3200 samples: equal to the union's up to 1/3200.
    torch.testing.assert_close(results[0]["var"], union.var(dim=(0, 2)), rtol=1e-3, atol=0)
