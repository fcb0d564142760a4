"""The few things that ranks tell each other, besides the gradients that DeepSpeed reduces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from mvat_dist.errors import CrashedElsewhereError, UserError, machine_refusal

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


def begin_mean(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Begin to replace every tensor by its mean over the ranks, in one message; other work goes on meanwhile.

    Returns:
        What ends it: until it has been called, the tensors are not to be touched.
    """
    ranks = world_size()
    if ranks == 1 or not tensors:
        return lambda: None
    flat = torch.cat([one.reshape(-1) for one in tensors]).div_(ranks)
    message = distributed.all_reduce(flat, async_op=True)

    def end() -> None:
        message.wait()
        unpack(flat, tensors)

    return end


def unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the parts of `flat` into `tensors`."""
    parts = torch.split(flat, [one.numel() for one in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(one) for part, one in zip(parts, tensors, strict=True)])


def average_batchnorm(modules: Iterable[nn.Module], sums: Sequence[Tensor] = ()) -> None:
    """Give every rank the same running statistics: those of the mixture of the ranks' own.

    In the same message, replace every tensor of `sums` by its sum over the ranks.

    DeepSpeed synchronises parameters only, so running means and variances drift apart with each rank's
    data. Ranks see equally many items: the mean is the mean of the ranks' running means, the variance
    the mean of their second moments minus that mean squared.
    """
    ranks = world_size()
    if ranks == 1:
        return
    norms = [norm for module in modules for norm in batchnorms(module)]
    means = [norm.running_mean for norm in norms if norm.running_mean is not None]
    variances = [norm.running_var for norm in norms if norm.running_var is not None]
    if not means:
        sum_in_place(sums)
        return
    with torch.no_grad():
        # A fleet has a thousand layers: joined, they cost a few operations and not a few thousand.
        mean, variance = (torch.cat(one).double() for one in (means, variances))
        second = (variance + mean.square()) / ranks
        mean /= ranks
        sum_in_place([*sums, mean, second])
        unpack(mean, means)
        unpack(second - mean.square(), variances)


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


def largest(number: int) -> int:
    """The largest `number` of any rank."""
    if world_size() == 1:
        return number
    found = torch.tensor([number])
    if distributed.get_backend() == "nccl":
        found = found.cuda()
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return int(found.item())


def together(build: Callable[[], T]) -> T:
    """``build()`` on every rank; where it fails on one, all fail, and none waits for that one.

    Raises:
        UserError: what some rank refused, or a full or read-only disk; rank 0 says it.
        CrashedElsewhereError: something else went wrong on another rank.
        Exception: whatever else went wrong on this rank.
    """
    refusal: str | None = None
    crash: Exception | None = None
    built: list[T] = []
    try:
        built.append(build())
    except UserError as error:
        refusal = str(error)
    except Exception as error:
        refusal = machine_refusal(error) if isinstance(error, OSError) else None
        if refusal is None:
            crash, refusal = error, f"another rank failed: {type(error).__name__}: {error}"
    failures = [(said, crashed) for said, crashed in gather((refusal, crash is not None)) if said]
    if crash:
        raise crash
    if failures:
        first = not distributed.is_initialized() or distributed.get_rank() == 0
        # All ranks end with the same code, which decides whether the job is queued again.
        if crashes := [said for said, crashed in failures if crashed]:
            raise CrashedElsewhereError(crashes[0], say=first)
        raise UserError(failures[0][0], say=first)
    return built[0]
