"""Checkpoints in every wrapping load alike; what is no checkpoint is refused in one clear line."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError
from mvat_dist.models.manner import build
from mvat_dist.models.pretrained import load_manner_checkpoint

SIZE = Size("small", 6, depth=2, chunk=8)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return build(SIZE).state_dict()


def authors_file(path: Path, state: State, numpy_module: str) -> Path:
    """A checkpoint as the authors' trainer writes it, its PESQ a scalar of the given age of numpy."""
    buffer = io.BytesIO()
    torch.save({"loss": np.float64(3.2), "state_dict": state, "optimizer": {"state": {}}}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            if member.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", numpy_module.encode())
            target.writestr(member, content)
    return path


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def safe(path: Path, state: State) -> Path:
    safetensors.torch.save_file(state, path)
    return path


WRAPPINGS: dict[str, Callable[[Path, State], Any]] = {
    "state dict": lambda _, state: state,
    "nested state dict": lambda _, state: {"state_dict": state},
    "parallel": lambda _, state: {f"module.{key}": value for key, value in state.items()},
    "file": lambda folder, state: saved(folder / "plain.pth", state),
    "file by str": lambda folder, state: str(saved(folder / "plain.pth", state)),
    "old file format": lambda folder, state: saved(
        folder / "old.pth", {"state_dict": state}, _use_new_zipfile_serialization=False
    ),
    "authors": lambda folder, state: authors_file(folder / "a.pth", state, "numpy.core.multiarray"),
    "authors, numpy 2": lambda folder, state: authors_file(folder / "b.pth", state, "numpy._core.multiarray"),
    "safetensors": lambda folder, state: safe(folder / "model.safetensors", state),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_loads_alike(wrapping: str, tmp_path: Path, state: State) -> None:
    model = load_manner_checkpoint(WRAPPINGS[wrapping](tmp_path, state))
    assert model.size == SIZE
    assert not model.training
    loaded = model.state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_the_network_outlives_its_file(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "model.pth", state)
    model = load_manner_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_named_architecture_is_kept() -> None:
    size = Size("base", 6, depth=1, chunk=8, stride=2, heads=2)
    state = build(size).state_dict()
    assert load_manner_checkpoint(state, size).size == size
    with pytest.raises(UserError, match="heads"):
        load_manner_checkpoint(state)


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


LINEAR = "manner_block.linear.0.weight"
TOKEN = "manner_block.encoder.1.attn_block.global_attn.w_qs.weight"
WRONG_STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "empty": (lambda _: {}, "no weights"),
    "nothing inside": (lambda _: {"state_dict": None}, "no weights"),
    "another network": (lambda _: {"encoder.weight": torch.ones(2)}, "down_conv.0.weight' is missing"),
    "no tensors": (lambda _: {"epoch": 3}, "'epoch' is int"),
    "missing": (lambda state: without(state, LINEAR), f"missing: '{LINEAR}'"),
    "unexpected": (lambda state: {**state, "head.weight": torch.ones(1)}, "unexpected: 'head.weight'"),
    "another shape": (lambda state: {**state, LINEAR: torch.ones(3, 3)}, f"another shape: '{LINEAR}'"),
    "another rank": (lambda state: {**state, TOKEN: torch.ones(3)}, "has shape"),
    "not a number": (lambda state: {**state, LINEAR: state[LINEAR] * torch.nan}, f"not finite: '{LINEAR}'"),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_wrong_weights_are_named(case: str, state: State) -> None:
    make, message = WRONG_STATES[case]
    with pytest.raises(UserError) as refusal:
        load_manner_checkpoint(make(state))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


class Unsafe:
    """Unpickling this would write a file."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path, ("pwned",)


WRONG_FILES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("epoch,loss\n1,0.5\n"),
    "empty": lambda path: path.touch(),
    "audio": lambda path: path.write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(64)),
    "half a checkpoint": lambda path: path.write_bytes(saved(path, {"a": torch.ones(99)}).read_bytes()[:300]),
    "another archive": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "x"),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "a pickle that runs code": lambda path: torch.save({"state_dict": Unsafe()}, path),
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: path,
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", WRONG_FILES)
def test_another_file_is_refused_by_name(case: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"my teacher{suffix}"
    WRONG_FILES[case](path)
    with pytest.raises(UserError) as refusal:
        load_manner_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
