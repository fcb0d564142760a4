"""Join and leave the process group: gloo on the CPU, NCCL on GPUs, set up by DeepSpeed."""

from __future__ import annotations

import time
from datetime import timedelta

import deepspeed
import torch

from mvat_dist.distributed import ranks
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import PortTakenError

_PORT_SECONDS = 30.0
"""How long rank 0 of a Slurm job waits for its port: the job's previous start may still be ending there."""


def init_distributed(device: torch.device, timeout: timedelta) -> None:
    """Join the process group that the environment describes.

    Args:
        device: the group communicates by NCCL on a GPU, else by gloo.
        timeout: how long a collective waits for the other ranks.
    """
    # DeepSpeed compiles a shared-memory op at its first start on a CPU, for a minute and only where a
    # compiler is, and then uses it only under its own launcher; a rank killed in that minute leaves a
    # lock on which every later run of the same user would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def wait_for_port(place: Ranks) -> None:
    """On rank 0, wait until the port of the rendezvous is free.

    Raises:
        PortTakenError: it stays taken; the next start takes another port.
    """
    # Other launchers have a store of their own, which listens there already.
    if place.rank or place.world_size == 1 or place.launcher not in {"slurm", "local"}:
        return
    deadline = time.monotonic() + (_PORT_SECONDS if place.launcher == "slurm" else 0.0)
    while not ranks.port_is_free(place.master_port):
        if time.monotonic() > deadline:
            raise PortTakenError(
                f"another program listens on port {place.master_port} of this node: start again"
            )
        time.sleep(0.5)


def leave(device: torch.device, *, orderly: bool) -> None:
    """Leave the process group, if there is one.

    gloo's threads abort a process that ends without this. NCCL's way out asks the other ranks, which after an
    error on this one may wait elsewhere: on GPUs only an orderly end leaves.
    """
    if torch.distributed.is_initialized() and (orderly or device.type == "cpu"):
        torch.distributed.destroy_process_group()
