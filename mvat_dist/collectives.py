"""The few things that ranks tell each other, besides the gradients that DeepSpeed reduces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")

BatchNorm = nn.modules.batchnorm._BatchNorm


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the ranks, in one message per call."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([one.reshape(-1).double() for one in tensors])
    distributed.all_reduce(flat)
    for one, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        one.copy_(total.view_as(one))


def batchnorms(module: nn.Module) -> list[BatchNorm]:
    """Every normalisation layer with running statistics in `module`."""
    return [one for one in module.modules() if isinstance(one, BatchNorm)]


def average_batchnorm(modules: Iterable[nn.Module]) -> None:
    """Give every rank the statistics of the union of all ranks' batches.

    DeepSpeed synchronises parameters only, so running means and variances drift apart with each rank's
    data. Ranks see equally many items, so the union's mean is the mean of the means, and its variance the
    mean second moment minus that mean squared.
    """
    ranks = world_size()
    if ranks == 1:
        return
    norms = [norm for module in modules for norm in batchnorms(module)]
    means = [norm.running_mean for norm in norms if norm.running_mean is not None]
    variances = [norm.running_var for norm in norms if norm.running_var is not None]
    with torch.no_grad():
        first = [mean.double() / ranks for mean in means]
        second = [(v.double() + m.double().square()) / ranks for v, m in zip(variances, means, strict=True)]
        sum_in_place(first + second)
        for mean, variance, new_mean, new_second in zip(means, variances, first, second, strict=True):
            mean.copy_(new_mean)
            variance.copy_(new_second - new_mean.square())


def gather(value: T) -> list[T]:
    """`value` of every rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    found: list[T] = [value] * world_size()
    distributed.all_gather_object(found, value)
    return found


def from_rank_zero(value: T) -> T:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([int(flag)])
    if distributed.get_backend() == "nccl":
        raised = raised.cuda()
    distributed.all_reduce(raised, op=distributed.ReduceOp.MAX)
    return bool(raised.item())
