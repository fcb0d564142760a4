"""Every path of a run's folder, in one place.

A run is its science: the folder is named by what is trained plus a hash of the configuration
without the keys that change nothing, so submitting the same thing twice finds the same folder.
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mvat_dist.config import parser, sizes
from mvat_dist.config.schema import Config
from mvat_dist.errors import UserError
from mvat_dist.io import make_folder, read_json, write_json, write_text
from mvat_dist.runs import records

State = Literal["running", "stopped", "failed", "finished"]

_SHARED_SECONDS = 60.0

_README = """\
This folder is one run of mvat_dist.

config.yaml        the resolved configuration; `python -m mvat_dist.train --config config.yaml` goes on
environment.json   versions, host and ranks of the latest start
STATUS             state, step, why it stopped, restarts, as JSON; `python -m mvat_dist.status THIS_FOLDER`
lock/, heartbeat   who writes here now, and that process's sign of life
inputs.json        which teacher and which first weights (fingerprints), which shards (hash of their manifest)
deepspeed.json     the configuration that DeepSpeed got for each student
checkpoints/       step-NNNNNNNN/: all that is needed to go on; safetensors and JSON
students/NAME/     history.jsonl (losses, learning rate, scores by step), best/ and last/: model.safetensors;
                   first/: the weights that it was given to begin with, where train.init named some;
                   uploads/: sounds, pictures, tables and weights that wait to be sent to W&B
logs/, submitit/   output of the processes and of the Slurm job; logs/wandb.log: what W&B had to say
examples/          noisy, clean and teacher of a few clips; each student's own are in students/NAME/examples
wandb/             W&B's logs (their ids lie beside the histories); with a network: `wandb sync --yes
                   wandb/offline-run-*`, or where a server was lost, `python -m mvat_dist.sync THIS_FOLDER`

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
    def inputs(self) -> Path:
        return self.path / "inputs.json"

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
    def examples(self) -> Path:
        return self.path / "examples"

    @property
    def students(self) -> Path:
        return self.path / "students"

    def student(self, name: str) -> Path:
        return self.students / name

    def history(self, name: str) -> Path:
        return self.student(name) / "history.jsonl"

    def weights(self, name: str, which: Literal["first", "best", "last"]) -> Path:
        return self.student(name) / which / "model.safetensors"

    def check_config(self, config: Config) -> None:
        """Refuse to mix two experiments in one folder. One that has saved nothing yet may be replaced.

        Students may join and leave; none may change its size.

        Raises:
            UserError: with every key that differs.
        """
        if not (self.config.exists() and self.checkpoints.exists()):
            return
        before = parser.parse(["--config", str(self.config)])
        differing = changed_keys(
            before, config, but_for=() if _resized(before, config) else ("student", "sizes")
        )
        if differing:
            raise UserError(
                f"{self.path} holds a run with another configuration ({', '.join(differing)}): "
                "choose another --name, or leave --name out"
            )

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Refuse to go on with another teacher or other data than the run began with.

        Raises:
            UserError: naming which of them has changed.
        """
        if not self.inputs.exists():
            return
        before = read_json(self.inputs)
        changed = [what for what in ("teacher", "data") if before[what] != inputs[what]]
        if changed:
            raise UserError(
                f"the {' and the '.join(changed)} of {self.path} changed since it began (see {self.inputs}): "
                "restore what it learnt from, or start another run with --name"
            )

    def create(self, config: Config) -> None:
        """Make the folder and what explains it.

        Raises:
            UserError: the folder holds another experiment.
        """
        self.check_config(config)
        # With its name and place inside, the file goes on with this very run from wherever it is given.
        placed = dataclasses.replace(config, name=self.path.name, runs=str(self.path.parent))
        make_folder(self.path)
        write_text(self.config, parser.to_yaml(placed))
        write_text(self.path / "README.txt", _README)

    def record_inputs(self, inputs: dict[str, Any]) -> None:
        """Note what the run learns from, and leave a fresh stamp for the other ranks."""
        write_json(self.inputs, inputs)
        write_text(self._stamp, secrets.token_hex(8))

    @property
    def _stamp(self) -> Path:
        return self.path / ".stamp"

    def stamp(self) -> str:
        """What `record_inputs` wrote last, for other ranks to look for; empty where they cannot see it."""
        return self._stamp.read_text(encoding="utf-8") if self._stamp.exists() else ""

    def await_stamp(self, stamp: str) -> None:
        """Wait until this rank sees what rank 0 wrote: a shared file system may take a while.

        Raises:
            UserError: it does not, so the folder is not shared.
        """
        deadline = time.monotonic() + _SHARED_SECONDS
        while self.stamp() != stamp:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{socket.gethostname()} does not see the run's folder as rank 0 made it at {self.path}: "
                    "choose --runs on a file system that all nodes share"
                )
            time.sleep(0.5)

    def write_status(self, state: State, step: int, **more: Any) -> None:
        """Record the run's state; readers see the old or the new one, never a part."""
        self.replace_status({"state": state, "step": step, "time": records.now(), **more})

    def replace_status(self, status: dict[str, Any]) -> None:
        """`write_status` with all fields given."""
        write_json(self.status, status)

    def finished(self, config: Config) -> bool:
        """Whether every student of `config` has done all its steps, or was given up on the way."""
        status = self.read_status()
        wanted = sizes.select(config.student, config.sizes).keys()
        return status.get("state") == "finished" and wanted <= status.get("students", {}).keys()

    def read_status(self) -> dict[str, Any]:
        """The last written status, or an empty dict before the first."""
        return dict(read_json(self.status)) if self.status.exists() else {}


def changed_keys(old: Config, new: Config, but_for: Sequence[str] = ()) -> list[str]:
    """``key: old -> new`` for every key, `but_for` some, in which two runs are not the same science."""
    before, after = parser.science(old), parser.science(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in but_for
    ]


def _resized(old: Config, new: Config) -> bool:
    """Whether a student that both have is of another size in the second."""
    before, after = (sizes.select(config.student, config.sizes) for config in (old, new))
    return any(before[name] != after[name] for name in before.keys() & after.keys())


def run_name(config: Config) -> str:
    """``METHOD-STUDENTS-HASH``, or the name the user chose."""
    if config.name:
        return config.name
    names = list(sizes.select(config.student, config.sizes))
    what = "all" if config.student.strip() == "all" else names[0]
    more = f"+{len(names) - 1}" if len(names) > 1 and what != "all" else ""
    return f"{config.distil.method}-{what}{more}-{parser.fingerprint(config)}"


def run_folder(config: Config) -> Path:
    """Absolute path of the run's folder.

    Raises:
        UserError: the name would leave the folder of runs.
    """
    name = run_name(config)
    if Path(name).name != name or name in {".", ".."}:
        raise UserError(f"--name {name!r} must be a plain folder name; --runs chooses where it lies")
    return Path(config.runs).absolute() / name
