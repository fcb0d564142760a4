"""Train a fleet of students, or a teacher: the one trainer behind `submit`, `sbatch` and W&B agents.

    python -m mvat_dist.train --config configs/distil.yaml --teacher runs/teacher --student all

Started by ``srun``, ``torchrun`` or alone; the ranks find each other through `mvat_dist.ranks`.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from mvat_dist import configfile, ranks, rundir
from mvat_dist.config import Config
from mvat_dist.errors import exit_code

# A validation may keep ranks apart for minutes; a hang must still end.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def main(argv: list[str] | None = None) -> None:
    """Train what the command line says, from the run's last checkpoint if there is one.

    Raises:
        UserError: anything the user can mend; nothing has been written then but the run's folder.
        SystemExit: 128 plus the signal's number where somebody asked the run to stop: its state is
            saved, and the same command goes on.
    """
    config = configfile.parse(argv)
    here = ranks.read()
    ranks.export(here)
    code = _train(config, here)
    if code:
        raise SystemExit(code)


def _train(config: Config, here: ranks.Ranks) -> int:
    """Run the trainer inside a process group; the exit code."""
    # Imported late: --help and a refused option answer at once.
    import torch

    if config.engine.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from mvat_dist.logs import quieten
    from mvat_dist.stopping import StopRequest
    from mvat_dist.trainer import Trainer

    quieten(here.rank)
    stop = StopRequest()
    stop.listen()
    backend = "gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, timeout=_COLLECTIVE_TIMEOUT, verbose=False)
    trainer: Trainer | None = None
    code = 1
    try:
        trainer = Trainer(config, here, rundir.RunDir(rundir.run_folder(config)))
        trainer.train(stop)
        code = 0 if trainer.finished else stop.exit_code or 1
    finally:
        if trainer:
            trainer.close(code)
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    # One line for a user's mistake, not one per rank.
    sys.exit(exit_code(main, quiet=ranks.read().rank != 0))
