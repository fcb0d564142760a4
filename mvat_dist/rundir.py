"""Every path of a run's folder, in one place.

A run is its science: the folder is named by what is trained plus a hash of the configuration
without the keys that change nothing, so submitting the same thing twice finds the same folder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mvat_dist import configfile, students
from mvat_dist.config import Config
from mvat_dist.errors import UserError
from mvat_dist.files import read_json, write_json, write_text

State = Literal["queued", "running", "stopped", "failed", "finished"]

_README = """\
This folder is one run of mvat_dist.

config.yaml        the resolved configuration; `python -m mvat_dist.train --config config.yaml` goes on
environment.json   versions, host, ranks and command line of the latest start
STATUS             state, step and time, as JSON
teacher.json       which teacher: file, size and fingerprint of its weights
deepspeed.json     the configuration that DeepSpeed got for each student
checkpoints/       step-NNNNNNNN/: all that is needed to go on; safetensors and JSON
students/NAME/     history.jsonl (losses, learning rate, scores by step), best/ and last/: model.safetensors
logs/, submitit/   output of the processes and of the Slurm job
wandb/             offline W&B runs: `wandb sync --yes wandb/offline-run-*` when there is a network

Scores:  python -m mvat_dist.evaluate THIS_FOLDER --data SHARDS
"""


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status(self) -> Path:
        return self.path / "STATUS"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher.json"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def students(self) -> Path:
        return self.path / "students"

    def student(self, name: str) -> Path:
        return self.students / name

    def history(self, name: str) -> Path:
        return self.student(name) / "history.jsonl"

    def weights(self, name: str, which: Literal["best", "last"]) -> Path:
        return self.student(name) / which / "model.safetensors"

    def create(self, config: Config) -> None:
        """Make the folder and what explains it; refuse to mix two different runs in one folder.

        Raises:
            UserError: the folder holds a run of another configuration, or something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.config.exists():
            differing = changed_keys(configfile.parse(["--config", str(self.config)]), config)
            if differing:
                raise UserError(
                    f"{self.path} holds a run with another configuration ({', '.join(differing)}): "
                    "choose another --name, or leave --name out"
                )
        write_text(self.config, configfile.to_yaml(config))
        write_text(self.path / "README.txt", _README)

    def write_status(self, state: State, step: int, **more: Any) -> None:
        """Record the run's state; readers see the old or the new one, never a part."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(self.status, {"state": state, "step": step, "time": now, **more})

    def read_status(self) -> dict[str, Any]:
        """The last written status, or an empty dict before the first."""
        return dict(read_json(self.status)) if self.status.exists() else {}


def changed_keys(old: Config, new: Config) -> list[str]:
    """``key: old -> new`` for every key in which two runs are not the same science."""
    before, after = configfile.science(old), configfile.science(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def run_name(config: Config) -> str:
    """``METHOD-STUDENTS-HASH``, or the name the user chose."""
    if config.name:
        return config.name
    names = list(students.select(config.student, config.sizes))
    what = "all" if config.student.strip() == "all" else names[0]
    more = f"+{len(names) - 1}" if len(names) > 1 and what != "all" else ""
    return f"{config.distil.method}-{what}{more}-{configfile.identity(config)}"


def run_folder(config: Config) -> Path:
    """Absolute path of the run's folder.

    Raises:
        UserError: the name would leave the folder of runs.
    """
    name = run_name(config)
    if Path(name).name != name or name in {".", ".."}:
        raise UserError(f"--name {name!r} must be a plain folder name; --runs chooses where it lies")
    return Path(config.runs).absolute() / name
