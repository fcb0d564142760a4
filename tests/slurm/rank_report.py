"""What a job of the tests runs: say who I am, meet the others, and sum over all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from mvat_dist.distributed import ranks


class RankReport:
    """Writes ``FOLDER/rank-N.json``: this task's `Ranks`, the sum of all ranks + 1, and some variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> int:
        here = ranks.read()
        ranks.export(here)
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        distributed.init_process_group("gloo")
        total = torch.tensor([here.rank + 1])
        distributed.all_reduce(total)
        distributed.destroy_process_group()
        variables = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")}
        report = {**asdict(here), "total": int(total), "node": os.environ["SLURMD_NODENAME"], **variables}
        (self.folder / f"rank-{here.rank}.json").write_text(json.dumps(report))
        return int(total)
