"""Choose the device and the precision of a rank or of a command."""

from __future__ import annotations

from typing import Literal

import torch

from mvat_dist.config.schema import EngineConfig
from mvat_dist.errors import UserError

Precision = Literal["fp32", "bf16"]


def choose(config: EngineConfig, local_rank: int) -> tuple[torch.device, Precision]:
    """Choose device and precision of a rank.

    Raises:
        UserError: a GPU was asked for that is not there, or an option that only a GPU has.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and count == 0:
        raise UserError(
            "--engine.device cuda, but torch sees no GPU here: ask for one (--gpus-per-node) or leave it out"
        )
    on_gpu = count > 0 and config.device != "cpu"
    # Slurm's --gpus-per-task shows every task one GPU, its own, as number 0.
    index = 0 if count == 1 else local_rank
    if on_gpu and index >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own, there are {count}: start one task per GPU"
        )
    if config.sync_batchnorm and not on_gpu:
        raise UserError(
            "--engine.sync_batchnorm works on GPUs only: leave it out, statistics are averaged anyway"
        )
    if config.precision == "bf16" and not on_gpu:
        raise UserError("--engine.precision bf16 is for GPUs: on a CPU these networks need fp32")
    if not on_gpu:
        return torch.device("cpu"), "fp32"
    torch.cuda.set_device(index)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and torch.cuda.is_bf16_supported())
    return torch.device("cuda", index), "bf16" if bf16 else "fp32"


def pick(choice: str) -> torch.device:
    """Choose the device for ``--device``: ``auto`` (a GPU where torch sees one), ``cpu`` or ``cuda``.

    Raises:
        UserError: a GPU was asked for that is not there.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")
