"""A checkpoint is whole or it is not used."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mvat_dist.errors import UserError
from mvat_dist.io import sha256
from mvat_dist.training import checkpoint
from mvat_dist.training.checkpoint import Progress, StudentState


def state(value: float) -> StudentState:
    return StudentState(
        {"weight": torch.full((4,), value), "bn.num_batches_tracked": torch.tensor(3)},
        {"step": torch.tensor(2.0), "exp_avg.weight": torch.randn(4)},
        Progress(steps=2, updates=2, best=1.5),
        [0.1, float("nan"), 2.0],
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = {"a": state(1.0), "b": state(2.0)}
    path = checkpoint.save(tmp_path, 7, saved, keep=2)
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.step_of(path) == 7
    for name, expected in saved.items():
        loaded = checkpoint.load(path, name)
        assert loaded is not None
        assert loaded.progress == expected.progress
        np.testing.assert_equal(loaded.open_row, expected.open_row)
        for part in ("weights", "optimizer"):
            for key, value in getattr(expected, part).items():
                assert torch.equal(getattr(loaded, part)[key], value)
    assert checkpoint.load(path, "c") is None


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, {"a": state(step)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_what_an_unwell_student_would_go_back_to_is_kept(tmp_path: Path) -> None:
    """Whatever was saved since: without it, the student would begin anew in the midst of the training."""
    for step, in_a_row in ((1, 0), (2, 0), (3, 5), (4, 9), (5, 12)):
        ill = replace(state(step), progress=Progress(skipped_in_a_row=in_a_row))
        checkpoint.save(tmp_path, step, {"ill": ill, "well": state(step)}, keep=2)
    assert sorted(checkpoint.step_of(path) for path in tmp_path.iterdir()) == [2, 4, 5]
    loaded = checkpoint.newest(tmp_path, lambda path: checkpoint.is_well(path, "ill"))
    assert loaded is not None
    assert checkpoint.step_of(loaded) == 2
    checkpoint.save(tmp_path, 6, {"ill": state(6), "well": state(6)}, keep=2)
    assert sorted(checkpoint.step_of(path) for path in tmp_path.iterdir()) == [5, 6]


def damage(path: Path, how: str = "flip") -> None:
    files = {"manifest": "manifest.json", "record": "checkpoint.json"}
    file = path / files.get(how, "a.weights.safetensors")
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif how == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "manifest", "record"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = checkpoint.save(tmp_path, 1, {"a": state(1.0)}, keep=2)
    bad = checkpoint.save(tmp_path, 2, {"a": state(2.0)}, keep=2)
    damage(bad, how)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == good
    assert bad.name in caplog.text
    assert bad.is_dir()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_later_damaged_checkpoint_neither_stays_nor_costs_the_one_written(
    tmp_path: Path, keep: int
) -> None:
    good = checkpoint.save(tmp_path, 900, {"a": state(1.0)}, keep=2)
    damage(checkpoint.save(tmp_path, 1000, {"a": state(2.0)}, keep=2))
    written = checkpoint.save(tmp_path, 950, {"a": state(3.0)}, keep=keep)
    assert checkpoint.newest(tmp_path) == written
    assert sorted(tmp_path.iterdir()) == [good, written][-keep:]


def test_an_earlier_damaged_checkpoint_is_not_one_of_the_kept(tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path, 900, {"a": state(1.0)}, keep=2)
    damage(checkpoint.save(tmp_path, 920, {"a": state(2.0)}, keep=2))
    written = checkpoint.save(tmp_path, 1000, {"a": state(3.0)}, keep=2)
    assert sorted(tmp_path.iterdir()) == [good, written]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        path = checkpoint.save(tmp_path, 5, {"a": state(value)}, keep=1)
    loaded = checkpoint.load(path, "a")
    assert loaded is not None
    assert torch.equal(loaded.weights["weight"], torch.full((4,), 2.0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_search_that_finds_nothing_is_no_damage(tmp_path: Path) -> None:
    """Where a whole checkpoint is there but not wanted, a damaged one beside it does not end the run."""
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, {"a": state(1.0)}, keep=2)
    damage(path)
    assert checkpoint.newest(tmp_path, lambda _: False) is None
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"


def test_only_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing") is None
    (tmp_path / "step-00000009").mkdir()
    assert checkpoint.newest(tmp_path) is None, "it was never complete"
    saved = [checkpoint.save(tmp_path, step, {"a": state(1.0)}, keep=2) for step in (10, 20)]
    damage(saved[0], "flip")
    damage(saved[1], "manifest")
    with pytest.raises(UserError, match=r"step-00000020 .*step-00000010 .*move them away"):
        checkpoint.newest(tmp_path)


def test_what_a_killed_save_left_is_swept(tmp_path: Path) -> None:
    killed = """
import os, signal, sys
from pathlib import Path
from mvat_dist.io import atomic_directory
with atomic_directory(Path(sys.argv[1]) / "step-00000002") as temporary:
    (temporary / "a.weights.safetensors").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert socket.gethostname() in left.name
    (tmp_path / "step-00000001").mkdir()  # half removed
    (tmp_path / "step-notes").mkdir()  # somebody else's
    written = checkpoint.save(tmp_path, 3, {"a": state(1.0)}, keep=2)
    assert sorted(tmp_path.iterdir()) == [written, tmp_path / "step-notes"]


def test_an_interrupted_save_leaves_the_last_one(tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path, 1, {"a": state(1.0)}, keep=1)
    interrupted = """
import resource, sys
from pathlib import Path
import torch
from mvat_dist.training import checkpoint
from mvat_dist.errors import exit_code

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
state = checkpoint.StudentState({"weight": torch.zeros(100_000)}, {}, checkpoint.Progress(), [])
sys.exit(exit_code(lambda _: checkpoint.save(Path(sys.argv[1]), 2, {"a": state}, keep=1)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", interrupted, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert f"file-size limit is reached at {tmp_path / 'step-00000002'}" in ended.stderr
    assert checkpoint.newest(tmp_path) == good
    assert list(tmp_path.iterdir()) == [good]


def test_a_checkpoint_of_another_version_is_refused_by_its_format(tmp_path: Path) -> None:
    written = checkpoint.save(tmp_path, 1, {"a": state(1.0)}, keep=1)
    record, manifest = (written / name for name in ("checkpoint.json", "manifest.json"))
    record.write_text(record.read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 0'))
    checksums = json.loads(manifest.read_text())
    checksums["checkpoint.json"] = {"bytes": record.stat().st_size, "sha256": sha256(record)}
    manifest.write_text(json.dumps(checksums))
    with pytest.raises(UserError, match=rf"checkpoint.json has the format 0, .* reads {checkpoint.FORMAT}"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_of_the_first_format_is_refused(tmp_path: Path) -> None:
    written = checkpoint.save(tmp_path, 1, {"a": state(1.0)}, keep=1)
    (written / "checkpoint.json").rename(written / "fleet.json")
    manifest = written / "manifest.json"
    manifest.write_text(manifest.read_text().replace("checkpoint.json", "fleet.json"))
    with pytest.raises(UserError, match=r"has no checkpoint.json, so another version .* wrote it: go on"):
        checkpoint.newest(tmp_path)
