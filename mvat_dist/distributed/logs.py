"""What a run prints: our words from rank 0, warnings of the libraries only where they matter."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quieten(rank: int) -> None:
    """Plain log lines on stderr from rank 0; warnings and errors from the others."""
    origin = "" if rank == 0 else f"rank {rank}: "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {origin}%(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for chatty in ("DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # When a rank is killed, Python's tracker of its readers' semaphores outlives it and complains.
    kept = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (kept, "ignore:resource_tracker:UserWarning")))
    # DeepSpeed 0.19.8 calls names that torch 2.13 has renamed, once per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
