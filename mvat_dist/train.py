"""Train a group of students, or a teacher: the one trainer behind `submit`, `sbatch` and W&B agents.

    python -m mvat_dist.train --config configs/distil.yaml --teacher runs/teacher --student all

Started by ``srun``, by `mvat_dist.launch.processes` or alone; the ranks find each other through
`mvat_dist.distributed.ranks`.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from mvat_dist.config import parser
from mvat_dist.config.schema import Config
from mvat_dist.distributed import ranks, slurm
from mvat_dist.errors import UserError, exit_code
from mvat_dist.runs import folder, status
from mvat_dist.training.fault_tolerance import FaultTolerance, StopRequest

if TYPE_CHECKING:
    import torch

    from mvat_dist.distributed.device import Precision


def main(argv: list[str] | None = None) -> None:
    """Train what the command line says, from the run's last checkpoint if there is one.

    Raises:
        UserError: anything the user can mend; nothing has been trained then.
        SystemExit: 128 plus the signal's number where somebody asked the run to stop: its state is
            saved, and the same command continues. `errors.EXIT_HUNG` ends it at once, without this.
    """
    try:
        config, here = parser.parse(argv), ranks.read()
    except UserError as error:
        # Every rank finds the same mistake; one says it.
        raise UserError(str(error), say=ranks.read().rank == 0) from error
    run = folder.RunDir(folder.run_folder(config))
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


def _is_finished(run: folder.RunDir, config: Config) -> bool:
    run.check_config(config)
    return run.finished(config)


def _say_how_it_ended(run: folder.RunDir, config: Config) -> None:
    ended = run.read_status()
    if ended["state"] == "finished":
        print(
            f"finished: weights in {run.students}/*/best/model.safetensors\n"
            f"score them: python -m mvat_dist.evaluate {shlex.quote(str(run.path))} "
            f"--data {shlex.quote(config.data.train)}"
        )
    else:
        print(f"stopped and saved after step {ended['step']}: the same command continues from there")


def _train(config: Config, here: ranks.Ranks, run: folder.RunDir) -> int:
    """Run the trainer inside a process group; the exit code."""
    # Before torch is imported, which may take a minute from a cold disk; a signal would end the process.
    stop = StopRequest()
    stop.listen()
    device, precision = _device(config, here)
    from mvat_dist.distributed import process_group
    from mvat_dist.distributed.logs import configure_logging
    from mvat_dist.training import setup
    from mvat_dist.training.trainer import Trainer

    configure_logging(here.rank)
    fault_tolerance = FaultTolerance(run, here, config.train.watchdog_seconds)
    trainer: Trainer | None = None
    code, reason, orderly = 1, "", False
    try:
        process_group.wait_for_port(here)
        # Watchdogs end a hang and explain it; the timeout is for a process whose threads hang too.
        process_group.init_distributed(device, timedelta(seconds=2 * config.train.watchdog_seconds))
        components = setup.open_run(config, here, run, device, precision, fault_tolerance)
        trainer = Trainer(config.train, config.valid, config.track, components, fault_tolerance)
        stop_signal = trainer.train(stop)
        code, orderly = 128 + stop_signal if stop_signal else 0, True
    except BaseException as error:
        if fault_tolerance.lost_folder():  # whatever failed, it failed in a folder that is gone
            raise fault_tolerance.folder_lost_error() from error
        reason = status.words_of(error)
        code = error.code if isinstance(error, UserError) else code
        raise
    finally:
        if trainer:
            trainer.close(code, reason)
        process_group.leave(device, orderly=orderly)
        fault_tolerance.close()
    if stop_signal and here.launcher == "slurm" and here.rank == 0:
        slurm.requeue_after_signal(stop_signal, progressed=trainer.step > components.step)
    return code


def _device(config: Config, here: ranks.Ranks) -> tuple[torch.device, Precision]:
    """Choose the device, and tell DeepSpeed, which asks the environment when it is imported."""
    # Imported late: --help and a refused option answer at once.
    from mvat_dist.distributed import device as devices

    device, precision = devices.choose(config.engine, here.local_rank)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed binds the device of this number
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    return device, precision


if __name__ == "__main__":
    sys.exit(exit_code(main))
