"""BatchNorm statistics averaged over ranks are those of the union of the ranks' batches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mvat_dist.collectives import any_rank, average_batchnorm, from_rank_zero, gather, sum_in_place
from tests.ranks_harness import on_ranks

RANKS = 3


def one_rank(rank: int) -> dict[str, object]:
    # Momentum 1: the running statistics are the last batch's.
    norm = nn.BatchNorm1d(4, momentum=1.0)
    norm(rank_batch(rank))
    average_batchnorm([norm])
    summed = torch.tensor([float(rank), 1.0])
    sum_in_place([summed])
    return {
        "mean": norm.running_mean,
        "var": norm.running_var,
        "sum": summed,
        "gather": gather(rank * 10),
        "zero": from_rank_zero(rank + 5),
        "any": [any_rank(rank == 2), any_rank(False)],
    }


def rank_batch(rank: int) -> torch.Tensor:
    return torch.randn(64, 4, 50, generator=torch.Generator().manual_seed(rank)) * (rank + 1) + rank


def test_ranks_agree_on_the_unions_statistics(tmp_path: Path) -> None:
    found = on_ranks(RANKS, one_rank, tmp_path)
    union = torch.cat([rank_batch(rank) for rank in range(RANKS)])
    for one in found:
        assert torch.equal(one["mean"], found[0]["mean"])
        assert torch.equal(one["var"], found[0]["var"])
        assert one["sum"].tolist() == [3.0, 3.0]
        assert one["gather"] == [0, 10, 20]
        assert one["zero"] == 5
        assert one["any"] == [True, False]
    torch.testing.assert_close(found[0]["mean"], union.mean(dim=(0, 2)))
    # Each rank's variance is the unbiased one of 3200 samples: equal to the union's up to 1/3200.
    torch.testing.assert_close(found[0]["var"], union.var(dim=(0, 2)), rtol=1e-3, atol=0)
