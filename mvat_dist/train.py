"""Train a fleet of students, or a teacher: the one trainer behind `submit`, `sbatch` and W&B agents.

    python -m mvat_dist.train --config configs/distil.yaml --teacher runs/teacher --student all

Started by ``srun``, by `mvat_dist.launch` or alone; the ranks find each other through `mvat_dist.ranks`.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import timedelta

from mvat_dist import configfile, ranks, rundir
from mvat_dist.config import Config
from mvat_dist.errors import UserError, exit_code

# A validation may keep ranks apart for minutes; a hang must still end.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def main(argv: list[str] | None = None) -> None:
    """Train what the command line says, from the run's last checkpoint if there is one.

    Raises:
        UserError: anything the user can mend; nothing has been trained then.
        SystemExit: 128 plus the signal's number where somebody asked the run to stop: its state is
            saved, and the same command goes on.
    """
    try:
        config = configfile.parse(argv)
    except UserError as error:
        # Every rank finds the same mistake; one says it.
        raise UserError(str(error), say=ranks.read().rank == 0) from error
    here = ranks.read()
    run = rundir.RunDir(rundir.run_folder(config))
    if _is_finished(run, config):
        if here.rank == 0:
            print(f"{run.path} is finished ({config.train.steps} steps): nothing to do")
        return
    ranks.export(here)
    code = _train(config, here, run)
    if here.rank == 0:
        _say_how_it_ended(run, config)
    if code:
        raise SystemExit(code)


def _is_finished(run: rundir.RunDir, config: Config) -> bool:
    run.check_config(config)
    return run.read_status().get("state") == "finished"


def _say_how_it_ended(run: rundir.RunDir, config: Config) -> None:
    status = run.read_status()
    if status["state"] == "finished":
        print(
            f"finished: weights in {run.students}/*/best/model.safetensors\n"
            f"score them: python -m mvat_dist.evaluate {shlex.quote(str(run.path))} "
            f"--data {shlex.quote(config.data.train)}"
        )
    else:
        print(f"stopped and saved after step {status['step']}: the same command goes on from there")


def _train(config: Config, here: ranks.Ranks, run: rundir.RunDir) -> int:
    """Run the trainer inside a process group; the exit code."""
    # Imported late: --help and a refused option answer at once.
    import torch

    from mvat_dist import devices

    device, precision = devices.choose(config.engine, here.local_rank)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed binds the device of this number
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"

    from mvat_dist import engine, stopping
    from mvat_dist.logs import quieten
    from mvat_dist.trainer import Trainer

    quieten(here.rank)
    stop = stopping.StopRequest()
    stop.listen()
    engine.init_distributed(device, _COLLECTIVE_TIMEOUT)
    trainer: Trainer | None = None
    code = 1
    try:
        trainer = Trainer(config, here, run, device, precision)
        first = trainer.step
        reason = trainer.train(stop)
        code = 128 + reason if reason else 0
    finally:
        if trainer:
            trainer.close(code)
        # gloo's threads abort a process that ends without this. NCCL's way out asks the other ranks,
        # which after an error on this one may wait elsewhere.
        if code != 1 or device.type == "cpu":
            torch.distributed.destroy_process_group()
    if reason:
        stopping.requeue(reason, here, progressed=trainer.step > first)
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main))
