"""A checkpoint is whole or it is not used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from mvat_dist import checkpoint
from mvat_dist.checkpoint import StudentState


def state(value: float) -> StudentState:
    return StudentState(
        {"weight": torch.full((4,), value), "bn.num_batches_tracked": torch.tensor(3)},
        {"step": torch.tensor(2.0), "exp_avg.weight": torch.randn(4)},
        {"updates": 2, "best": 1.5, "row": [0.1, 2.0]},
    )


def test_round_trip(tmp_path: Path) -> None:
    saved = {"a": state(1.0), "b": state(2.0)}
    path = checkpoint.save(tmp_path, 7, saved, keep=2)
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.step_of(path) == 7
    for name, expected in saved.items():
        found = checkpoint.load(path, name)
        assert found is not None
        assert found.progress == expected.progress
        for part in ("weights", "optimizer"):
            for key, value in getattr(expected, part).items():
                assert torch.equal(getattr(found, part)[key], value)
    assert checkpoint.load(path, "c") is None


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, {"a": state(step)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = checkpoint.save(tmp_path, 1, {"a": state(1.0)}, keep=2)
    bad = checkpoint.save(tmp_path, 2, {"a": state(2.0)}, keep=2)
    file = bad / ("manifest.json" if damage == "manifest" else "a.weights.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) == good
    assert bad.name in caplog.text


def test_an_interrupted_save_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = checkpoint.save(tmp_path, 1, {"a": state(1.0)}, keep=1)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {"a": state(2.0)}, keep=1)
    assert checkpoint.newest(tmp_path) == good
    assert list(tmp_path.iterdir()) == [good]
