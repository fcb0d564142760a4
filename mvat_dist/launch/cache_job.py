"""Fill a teacher cache on a cluster: a Slurm array through submitit, a part of the shards to each task."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission

from mvat_dist import cache
from mvat_dist.config.schema import Config
from mvat_dist.data.mixing.dataset import TrainingData
from mvat_dist.errors import exit_code
from mvat_dist.launch import slurm
from mvat_dist.launch.slurm import Resources


class CacheTask:
    """What a task of the array runs. Its pickle holds the command line only."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self, part: str) -> None:
        """Cache one part, as ``python -m mvat_dist.cache`` with these arguments."""
        code = exit_code(cache.main, [*self.argv, f"--part={part}"])
        if code:
            raise SystemExit(code)

    def checkpoint(self, part: str) -> DelayedSubmission:
        """What submitit runs after a requeue: the same, which keeps the finished shards."""
        return DelayedSubmission(self, part)


def on_slurm(
    out: Path, config: Config, argv: list[str], tasks: int, resources: Resources, *, dry_run: bool
) -> None:
    """Fill the cache in `out` by an array of `tasks`; each runs ``python -m mvat_dist.cache`` with `argv`.

    Raises:
        UserError: segments that no cache can hold, or Slurm refused the job.
    """
    # What a login node can know: no array may wait in the queue for nothing.
    TrainingData(config.data, config.seed).check_numbered()
    name = re.sub(r"[^\w.+-]", "_", f"mvat-cache-{out.name}", flags=re.ASCII)
    folder = out / "submitit"
    executor = slurm.executor(folder, name, resources)
    print(f"cache    {out}: {tasks} tasks, each with every {tasks}th shard")
    if dry_run:
        print(f"\n{slurm.script(executor)}")
        return
    jobs: list[Any] = slurm.submit(executor, CacheTask(argv), [f"{part}/{tasks}" for part in range(tasks)])
    number = jobs[0].split("_")[0]
    print(
        f"job      {number}\n"
        f"follow   tail -F {shlex.quote(str(folder))}/{number}_*_log.out\n"
        f"         squeue -j {number}\n"
        f"cancel   scancel {number}"
    )
