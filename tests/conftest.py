"""What every test module may use."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before the first import of torch: tests are many small computations, often several processes at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

# The same examples on every run, and no deadline: the first example pays for torch's warm-up.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

REPOSITORY = Path(__file__).parent.parent

LONG = ("faults", "train", "joining", "run_safety", "elastic", "sweep_agent", "experiment")
"""Modules that take a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first: where processes share out modules, none is left with a long one at the end."""
    rank = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _drawn_alike() -> None:
    """torch's global generator begins anew, so that no test depends on those that ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Folder with the reference vectors and the shared corpus: $MVAT_SHARED, or beside the repository."""
    folder = Path(os.environ.get("MVAT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no folder of reference vectors and shared audio: set MVAT_SHARED to it")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: its sums are then the same in every process, and small networks no slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Reference:
    """One set of reference vectors: a network of the authors, its input and what it made of it."""

    description: dict[str, Any]
    """Architecture, its configuration, parameter count, float32 error, keys and shapes."""
    weights: dict[str, Tensor]
    noisy: Tensor
    """(B, T) float32."""
    output: Tensor
    """(B, T) float64."""
    energies: dict[tuple[str, int, str], Tensor]
    """(B, T_b) float64 by (side, level, view)."""


@pytest.fixture(scope="session")
def reference(shared_folder: Path) -> Callable[[str], Reference]:
    """Reads the reference vectors of a name."""
    import torch

    folder = shared_folder / "fixtures" / "manner_reference"
    spec = importlib.util.spec_from_file_location("reference_weights", folder / "reference_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def read(name: str) -> Reference:
        description = json.loads((folder / f"{name}.json").read_text())
        arrays = np.load(folder / f"{name}.npz", allow_pickle=False)
        energies = {}
        for key in arrays.files:
            if key.startswith("energy/"):
                _, side, level, view = key.split("/")
                energies[side, int(level), view] = torch.from_numpy(arrays[key])
        return Reference(
            description,
            {key: torch.as_tensor(value) for key, value in module.weights(description["state_dict"]).items()},
            torch.from_numpy(arrays["input"]).squeeze(1),
            torch.from_numpy(arrays["output"]).squeeze(1),
            energies,
        )

    return read
