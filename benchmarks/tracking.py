"""What tracking costs of a step: the histories and W&B's copy of them beside the training.

    python -m benchmarks.tracking

One run trains `manner-s-0.6gf` beside a teacher of the same size, with W&B offline, and writes the histories
of all students: a row for each, then STATUS as the trainer does. The time of its steps and what the training
thread spends on the histories are of the same run; so is the CPU time, of the training and of the uploader
process with W&B's service. `--step-ms` has it wait in place of training, for a GPU's steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
import torch

from mvat_dist.config import sizes
from mvat_dist.config.schema import Config, DistilConfig, OptimConfig, TrackConfig
from mvat_dist.distributed import ranks
from mvat_dist.launch.uploader import Uploader
from mvat_dist.losses.mvat import energy_map
from mvat_dist.losses.objective import Objective, prepare_targets
from mvat_dist.models.manner import Manner
from mvat_dist.runs import environment
from mvat_dist.runs.folder import RunDir
from mvat_dist.runs.history import History, Row
from mvat_dist.runs.status import RunState

NAME = "manner-s-0.6gf"
SEGMENT = 16_000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--every", type=int, default=TrackConfig().every, help="steps between two rows")
    options.add_argument("--step-ms", type=float, help="of a step that only waits")
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tracking benchmark ") as folder:
        run = RunDir(Path(folder) / "a run")
        print(json.dumps(_measure(run, given.steps, given.batch, given.every, given.step_ms), indent=2))


def _measure(run: RunDir, steps: int, batch: int, every: int, wait: float | None) -> dict[str, float]:
    config = Config(student="all", distil=DistilConfig(method="none"), track=TrackConfig(wandb="offline"))
    run.create(config)
    environment.record(run.environment, ranks.read())
    histories = {name: History(run.history(name)) for name in sizes.select(config.student, config.sizes)}
    for name, history in histories.items():
        run.student(name).mkdir(parents=True)
        history.rewind(0)
    state = RunState(run, steps, 0)
    train = _training(batch)
    terms = train()
    began = time.perf_counter()
    state.write("running", 0)
    uploader = Uploader(run)
    starting = time.perf_counter() - began
    stepping = logging = slowest = 0.0
    cpu = _cpu(uploader.pid)
    for step in range(1, steps + 1):
        began = time.perf_counter()
        if wait is None:
            terms = train()
        else:
            time.sleep(wait / 1000)
        stepping += time.perf_counter() - began
        if step % every == 0:
            began = time.perf_counter()
            row: Row = {key: float(value) for key, value in terms.items()}
            row |= {"lr": 1e-3, "gradient_norm": 1.0, "memory": {"rss_gb": 1.0}}
            row["time"] = dict.fromkeys(("data", "teacher", "forward", "backward", "communication"), 0.2)
            for history in histories.values():
                history.append({"step": step, **row})
            state.write(
                "running", step, at_once=False, students={name: {"steps": step} for name in histories}
            )
            took = time.perf_counter() - began
            logging, slowest = logging + took, max(slowest, took)
    all_cpu = _cpu(uploader.pid) - cpu
    began = time.perf_counter()
    uploader.finish(0)
    return {
        "steps": steps,
        "terms": len(terms),
        "milliseconds of a step": 1000 * stepping / steps,
        "milliseconds of seven rows and STATUS, in the training thread": 1000 * logging / (steps // every),
        "slowest of them, milliseconds": 1000 * slowest,
        "milliseconds to start the uploader": 1000 * starting,
        "seconds to finish": time.perf_counter() - began,
        "CPU seconds of all processes per second of stepping": all_cpu / stepping,
        "share of the step, percent": 100 * logging / stepping,
    }


def _cpu(uploader: int) -> float:
    """CPU seconds of this process, the uploader and W&B's service so far."""
    process = psutil.Process(uploader)
    processes = [psutil.Process(), process, *process.children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def _training(batch: int):  # type: ignore[no-untyped-def]
    size = sizes.get(NAME)
    torch.manual_seed(0)
    student, teacher = Manner(size), Manner(size).eval()
    objective = Objective(DistilConfig(), size, size)
    optimiser = torch.optim.AdamW(student.parameters(), lr=OptimConfig().lr)
    clean = 0.1 * torch.randn(batch, SEGMENT)
    noisy = clean + 0.05 * torch.randn(batch, SEGMENT)

    def step() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            maps = {key: energy_map(view) for key, view in teacher(noisy, return_views=True)[1].items()}
        prepared = prepare_targets(noisy, clean, maps)
        estimate, views = student(noisy, return_views=True)
        terms = objective(estimate, views, prepared)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        return {key: value.detach() for key, value in terms.items()}

    return step


if __name__ == "__main__":
    main()
