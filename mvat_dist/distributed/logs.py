"""Logging of a rank: plain lines from rank 0, warnings from the others, libraries kept quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def configure_logging(rank: int) -> None:
    """Log to stderr: everything from rank 0, warnings and errors from the other ranks."""
    origin = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {origin}%(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for library in ("DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # When a rank is killed, Python's tracker of its readers' semaphores outlives it and complains.
    kept = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (kept, "ignore:resource_tracker:UserWarning")))
    # DeepSpeed 0.19.8 calls names that torch 2.13 has renamed, once per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
