"""Collectives of the trainer besides the gradients that ZeRO reduces: sums, objects, BatchNorm statistics."""

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


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over the ranks, in one all-reduce."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    distributed.all_reduce(flat)
    for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def all_reduce_mean_async(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Start to replace every tensor by its mean over the ranks, in one all-reduce, and return at once.

    Returns:
        A function that waits for the result; until it has returned, the tensors must not be touched.
    """
    ranks = world_size()
    if ranks == 1 or not tensors:
        return lambda: None
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).div_(ranks)
    work = distributed.all_reduce(flat, async_op=True)

    def wait() -> None:
        work.wait()
        unflatten(flat, tensors)

    return wait


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the parts of `flat`, a concatenation of flattened tensors, into `tensors`."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    views = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(list(tensors), views)


def batchnorms(module: nn.Module) -> list[BatchNorm]:
    """Every normalisation layer with running statistics in `module`."""
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


def average_batchnorm(modules: Iterable[nn.Module], sums: Sequence[Tensor] = ()) -> None:
    """Give every rank the same running statistics: those of the mixture of the ranks' own.

    In the same all-reduce, replace every tensor of `sums` by its sum over the ranks.

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
        all_reduce_sum(sums)
        return
    with torch.no_grad():
        # A group of students has a thousand layers: concatenated, they cost a few operations.
        mean, variance = (torch.cat(statistics).double() for statistics in (means, variances))
        second = (variance + mean.square()) / ranks
        mean /= ranks
        all_reduce_sum([*sums, mean, second])
        unflatten(mean, means)
        unflatten(second - mean.square(), variances)


def all_gather_object(value: T) -> list[T]:
    """`value` of every rank, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Call ``function()`` on every rank; where it fails on one, all ranks fail, and none waits for that one.

    Raises:
        UserError: some rank refused, or met a full or read-only disk; rank 0 prints it.
        CrashedElsewhereError: something else went wrong on another rank.
        Exception: whatever else went wrong on this rank.
    """
    refusal: str | None = None
    crash: Exception | None = None
    results: list[T] = []
    try:
        results.append(function())
    except UserError as error:
        refusal = str(error)
    except Exception as error:
        refusal = machine_refusal(error) if isinstance(error, OSError) else None
        if refusal is None:
            crash, refusal = error, f"another rank failed: {type(error).__name__}: {error}"
    reports = all_gather_object((refusal, crash is not None))
    failures = [(message, crashed) for message, crashed in reports if message]
    if crash:
        raise crash
    if failures:
        say = rank() == 0
        # All ranks end with the same code, which decides whether the job is queued again.
        if crashes := [message for message, crashed in failures if crashed]:
            raise CrashedElsewhereError(crashes[0], say=say)
        raise UserError(failures[0][0], say=say)
    return results[0]


def run_on_rank_zero(function: Callable[[], T]) -> T | None:
    """Call ``function()`` on rank 0 while the others wait; where it fails, all ranks fail.

    Returns:
        Its result on rank 0, None on the other ranks.

    Raises:
        UserError, CrashedElsewhereError, Exception: as `run_on_all_ranks`.
    """
    return run_on_all_ranks(lambda: function() if rank() == 0 else None)
