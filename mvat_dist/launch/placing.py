"""Start a run as its students are placed: one job, one job for several groups, or a job per group."""

from __future__ import annotations

from dataclasses import replace

from mvat_dist.config.schema import Config
from mvat_dist.launch import placement, submission
from mvat_dist.launch.placement import Placement
from mvat_dist.launch.slurm import Resources
from mvat_dist.runs.folder import RunDir, run_folder

# A group that is done before the others must not end them.
_NOBODY_WAITS = "export SLURM_WAIT=0"


def on_slurm(placed: Placement, config: Config, resources: Resources, *, wait: bool) -> int:
    """Submit what is not finished, queued or running; the exit code, with `wait` that of the training."""
    runs = _runs(placed, config)
    if placed == "split":
        resources = replace(resources, setup=(_NOBODY_WAITS, *resources.setup))
    code, jobs = 0, []
    for run, its_config in runs:
        refused, job = submission.on_slurm(run, its_config, resources)
        code = max(code, refused)
        if job:
            jobs.append((run, job))
    _explain(placed, config)
    return max([code, *(submission.wait_for(run, job) for run, job in jobs)]) if wait else code


def locally(placed: Placement, config: Config, argv: list[str], resources: Resources) -> int:
    """Train on this machine, jobs one after the other; the exit code, 0 only where all is finished."""
    codes = []
    for run, its_config in _runs(placed, config):
        own = [f"--parts={its_config.parts}"]
        if placed == "jobs":
            own += [
                f"--student={its_config.student}",
                f"--runs={its_config.runs}",
                f"--name={its_config.name}",
            ]
        codes.append(submission.locally(run, its_config, [*argv, *own], resources))
        _explain(placed, config)
        if codes[-1] > 128:  # somebody asked to stop, and means all
            break
    return max(codes)


def job_scripts(placed: Placement, config: Config, resources: Resources) -> list[str]:
    """The texts that sbatch would get."""
    if placed == "split":
        resources = replace(resources, setup=(_NOBODY_WAITS, *resources.setup))
    return [submission.job_script(run, resources) for run, _ in _runs(placed, config)]


def _explain(placed: Placement, config: Config) -> None:
    """Each job knows its own part; the run that they make up is known here alone."""
    if placed == "jobs" and RunDir(run_folder(config)).part_folders():
        placement.explain(config)


def _runs(placed: Placement, config: Config) -> list[tuple[RunDir, Config]]:
    """What is started by itself: the run, or with `jobs` each of its parts."""
    whole = [(RunDir(run_folder(config)), config)]
    if placed != "jobs":
        return whole
    parts = [placement.config_of(part, config) for part in placement.parse(config)]
    return [(RunDir(run_folder(part)), part) for part in parts]
