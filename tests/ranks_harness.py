"""Run a function on several gloo ranks and collect what each returns."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing


def on_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """``[function(rank, *arguments) for each rank]``, each in its own process of one group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(
        _one_rank, (world_size, port, function, folder, arguments), nprocs=world_size, start_method="spawn"
    )
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(world_size)]


def _one_rank(
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    folder: Path,
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from mvat_dist.distributed.process_group import init_distributed

    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"), timedelta(minutes=5))
    result = function(rank, *arguments)
    torch.save(result, folder / f"result-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
