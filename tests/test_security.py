"""Files from someone else run no code, names stay names, and secrets stay in the environment."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mvat_dist import submit
from mvat_dist.config import parser
from mvat_dist.data.shards.reader import ShardSet
from mvat_dist.errors import UserError
from mvat_dist.io import sha256
from mvat_dist.models import weights
from mvat_dist.runs.folder import RunDir
from mvat_dist.training import checkpoint
from tests.conftest import REPOSITORY
from tests.faults.group import Bench
from tests.tiny_corpus import _write, write_pairs, write_sources
from tests.wandb_server import listening


class _Order:
    """Whoever unpickles this makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(params=["pickle", "torch", "torch without zip"])
def poison(request: pytest.FixtureRequest, canary: Path) -> bytes:
    """A file that runs code in a careless reader, as this one proves."""
    order = {"state_dict": _Order(canary), "weight": torch.zeros(2)}
    stream = io.BytesIO()
    if request.param == "pickle":
        pickle.dump(order, stream)
        pickle.loads(stream.getvalue())  # noqa: S301, to see that it does
    else:
        torch.save(order, stream, _use_new_zipfile_serialization=request.param == "torch")
        torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert canary.exists()
    canary.rmdir()
    return stream.getvalue()


@pytest.mark.parametrize("name", ["teacher.pth", "teacher.pt", "teacher.th", "model.safetensors"])
def test_a_model_file_runs_no_code(tmp_path: Path, poison: bytes, canary: Path, name: str) -> None:
    (tmp_path / name).write_bytes(poison)
    with pytest.raises(UserError, match=name):
        weights.load(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, poison: bytes, canary: Path, part: str) -> None:
    state = checkpoint.StudentState({"a": torch.zeros(1)}, {"a": torch.zeros(1)}, checkpoint.Progress(), [])
    path = checkpoint.save(tmp_path / "checkpoints", 1, {"tiny": state}, 1)
    file = path / f"tiny.{part}.safetensors"
    file.write_bytes(poison)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}  # so that it is believed
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = checkpoint.newest(path.parent)
    assert found == path
    with pytest.raises(Exception, match=r"(?i)header|safetensors|invalid"):
        checkpoint.load(found, "tiny")
    assert not canary.exists()


@pytest.mark.parametrize("extension", ["flac", "pkl", "pyd", "pth"])
def test_a_shard_runs_no_code(tmp_path: Path, poison: bytes, canary: Path, extension: str) -> None:
    """webdataset's own decoder unpickles members by their extension.

    Here audio that is none is refused when it is read, though index and checksums agree; a member of another
    kind is refused when its shard is indexed.
    """
    members = {"c0": {"flac": poison, extension: poison}}

    def write_and_read() -> None:
        folder = _write(tmp_path / "corpus", "train_clean", "sources", members, {"c0": 800}, 1, "flac")
        ShardSet.open(str(folder)).read(0, "audio", 0, 800)

    with pytest.raises(UserError, match="c0"):
        write_and_read()
    assert not canary.exists()


def test_nothing_in_the_package_reads_what_may_run() -> None:
    """Every call by name: no unpickling, no shell, no evaluation of text."""
    refused = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "shelve.open"}
    found, loads = [], 0
    for source in sorted((REPOSITORY / "mvat_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            loads += name in {"torch.load", "np.load"}
            if (
                name in refused
                or "pickle" in name
                or options.get("shell") == "True"
                or (name == "torch.load" and options.get("weights_only") != "True")
                or (name == "np.load" and options.get("allow_pickle", "False") != "False")
            ):
                found.append(f"{source.name}:{node.lineno}: {name}")
    assert not found
    assert loads  # the law is about something


def test_a_configuration_runs_no_code(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{canary}']\n")
    with pytest.raises(UserError):
        parser.parse(["--config", str(tmp_path / "run.yaml")])
    assert not canary.exists()


_REMEMBERS = 'for one; do printf "%s\\0" "$one"; done > "$SEEN"; exit 143'


def fake_programs(folder: Path, srun: str) -> Path:
    """A cluster of shell scripts that takes every job."""
    folder.mkdir()
    scripts = {
        "srun": srun,
        "sacct": "exit 0",
        "squeue": "exit 0",
        "scontrol": 'echo "Slurmctld(primary) at here is UP"',
        "sbatch": 'echo "Submitted batch job 7"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def small_corpus(folder: Path) -> Path:
    """Enough for `submit` to accept it."""
    tone = np.sin(np.arange(8000) / 10) / 10
    write_sources(folder, "train_clean", {f"c{i}": tone for i in range(4)}, shards=4)
    write_sources(folder, "train_noise", {"n0": tone})
    write_pairs(folder, "valid", {"v0": (tone, tone)})
    return folder


NAMES = (
    *(
        "two words",
        "it's",
        'say "no"',
        "$(touch canary)",
        "`touch canary`",
        "a; touch canary",
        "a&touch canary",
    ),
    *("$HOME", "x|touch canary", "> canary", "~root", "*", "-n", "#x", "!!", "{a,b}", "é"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name_in_the_jobs_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A shell runs the script of a run of that name, below a folder of that name."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    write_sources(
        place / "corpus", "train_clean", {f"c{i}": np.zeros(8000) + 0.1 for i in range(4)}, shards=4
    )
    write_sources(place / "corpus", "train_noise", {"n0": np.zeros(8000) + 0.1})
    programs = fake_programs(tmp_path / "bin", srun=_REMEMBERS)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    options = ["--distil.method=none", "--student=manner-s-0.6gf", "--data.train=corpus", f"--name={name}"]
    submit.main([*options, f"--runs={name} runs", "--cluster=slurm", "--dry-run"])
    shown = capsys.readouterr().out
    script = place / "job.sh"
    script.write_text(shown[shown.index("#!") :])
    seen = tmp_path / "seen"
    before = sorted(path.name for path in place.iterdir())
    done = subprocess.run(
        ["bash", script],
        env={"PATH": f"{programs}:/usr/bin:/bin", "SEEN": str(seen), "HOME": "/root", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 143, done.stderr  # what srun returned, through the lines behind it
    assert sorted(path.name for path in place.iterdir()) == before
    arguments = seen.read_bytes().decode().split("\0")
    folder = place / f"{name} runs" / name / "submitit"
    assert any(str(folder) in argument for argument in arguments), arguments


@pytest.mark.parametrize("name", ["a\nb", "a/b", "..", "a\0b"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    options = ["--distil.method=none", "--student=manner-s-0.6gf", f"--data.train={tmp_path}"]
    with pytest.raises(UserError):
        submit.main([*options, f"--name={name}", f"--runs={tmp_path}", "--cluster=slurm", "--dry-run"])


SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
    "AWS_ACCESS_KEY_ID": "AKIAsecretsecret",
    "AWS_SECRET_ACCESS_KEY": "awsSecretThatNobodyMaySee",
    "HF_TOKEN": "hf_secretThatNobodyMaySee",
}


def assert_no_secret_in(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        for key, secret in SECRETS.items():
            assert secret.encode() not in content, f"{key} in {name}"


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name; of a zip archive its members."""
    found = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in [Path(name) for name in found if zipfile.is_zipfile(name)]:
        with zipfile.ZipFile(path) as archive:
            found |= {f"{path}/{name}": archive.read(name) for name in archive.namelist()}
    return found


def test_a_run_with_everything_on_writes_no_secret(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "bench")
    run = RunDir(tmp_path / "runs" / "secretive")
    with listening() as server:
        variables = {**SECRETS, "WANDB_MODE": "online", "WANDB_BASE_URL": server.url}
        said = bench.start(run, "--train.steps=2", variables=variables).ended(0)
        assert server.taken
        assert_no_secret_in({"what W&B got": json.dumps(server.taken).encode()})
    files = contents(run.path)
    assert any("wandb" in name for name in files)
    assert any(name.endswith("rank-1.log") for name in files)
    assert_no_secret_in({**files, "the terminal": said.encode()})


def test_a_submission_writes_no_secret(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "corpus")
    programs = fake_programs(tmp_path / "bin", srun="exit 1")
    options = ["--distil.method=none", "--student=manner-s-0.6gf", f"--data.train={corpus}", "--name=one"]
    done = subprocess.run(
        [sys.executable, "-m", "mvat_dist.submit", *options, f"--runs={tmp_path / 'runs'}"],
        env={**os.environ, **SECRETS, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        check=True,
    )
    files = contents(tmp_path / "runs")
    assert any(name.endswith(".pkl") for name in files)
    assert any(name.endswith(".sh") for name in files)
    assert_no_secret_in({**files, "the terminal": done.stdout + done.stderr})
