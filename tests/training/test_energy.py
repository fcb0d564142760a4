"""Energy: counters as Linux lays them out, read as their documentation says."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvat_dist.distributed.ranks import Ranks
from mvat_dist.training import energy
from mvat_dist.training.energy import CpuCounter, GpuCounter, Meter, counter_of
from tests.ranks_harness import on_ranks

RANGE = 262_143_328_850


def lay(powercap: Path, zone: str, name: str, microjoules: int) -> None:
    folder = powercap / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")


def lay_all(powercap: Path, *counts: int) -> None:
    """Two packages, the memory of the first, and what lies within or around them."""
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    for (zone, name), count in zip(zones.items(), counts, strict=True):
        lay(powercap, f"intel-rapl:{zone}", name, count)


def test_packages_and_their_memory_are_counted_and_nothing_twice(tmp_path: Path) -> None:
    lay_all(tmp_path, 5_000_000, 1_000_000, 2_000_000, 7_000_000, 90_000_000)
    counter = CpuCounter(tmp_path)
    assert counter.joules() == 0
    lay_all(tmp_path, 9_000_000, 4_000_000, 2_500_000, 8_000_000, 99_000_000)
    assert counter.joules() == pytest.approx(4 + 0.5 + 1)


def test_a_counter_that_starts_again_loses_nothing(tmp_path: Path) -> None:
    lay(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    counter = CpuCounter(tmp_path)
    lay(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
    assert counter.joules() == pytest.approx(3.0)
    lay(tmp_path, "intel-rapl:0", "package-0", 3_500_000)
    assert counter.joules() == pytest.approx(4.5)


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert CpuCounter(tmp_path / "none").joules() is None
    lay_all(tmp_path, 1, 1, 1, 1, 1)
    counter = CpuCounter(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert counter.joules() is None


def test_a_meter_counts_from_lap_to_lap(tmp_path: Path) -> None:
    lay_all(tmp_path, 0, 0, 0, 0, 0)
    meter = Meter(torch.device("cpu"), CpuCounter(tmp_path))
    lay_all(tmp_path, 6_000_000, 0, 0, 0, 0)
    assert meter.lap() == pytest.approx(6.0)
    lay_all(tmp_path, 7_000_000, 0, 0, 1_000_000, 0)
    assert meter.lap() == pytest.approx(2.0)


def test_a_counter_without_its_range_is_not_trusted(tmp_path: Path) -> None:
    lay(tmp_path, "intel-rapl:0", "package-0", 5)
    (tmp_path / "intel-rapl:0" / "max_energy_range_uj").unlink()
    assert CpuCounter(tmp_path).joules() is None


def test_who_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first rank of each node, for the whole of it; nobody, where parts of a run share a node."""
    lay(tmp_path, "intel-rapl:0", "package-0", 1)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    cpu, ranks = torch.device("cpu"), Ranks(4, 8, 0, 4, 1, 2, "node-0", 1, "slurm")
    beside = dataclasses.replace(ranks, rank=5, local_rank=1)
    assert isinstance(counter_of(cpu, ranks, whole_nodes=True), CpuCounter)
    assert counter_of(cpu, beside, whole_nodes=True).joules() == 0
    assert counter_of(cpu, ranks, whole_nodes=False).joules() is None


class FakeNvml:
    """NVML as nvidia-ml-py has it: millijoules since the driver was loaded."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules: dict[str, int] = {}

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if handle not in self.millijoules:
            raise self.NVMLError
        return self.millijoules[handle]


def test_a_gpu_is_asked_for_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    nvml.millijoules = {"GPU-0-1": 10_000, "GPU-2-3": 70_000}
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="2-3"))
    counter = GpuCounter(torch.device("cuda", 0))
    nvml.millijoules["GPU-2-3"] += 1_500
    assert counter.joules() == pytest.approx(1.5)
    nvml.millijoules.clear()
    assert counter.joules() is None
    assert GpuCounter(torch.device("cuda", 0)).joules() is None


def test_without_nvml_a_gpu_s_energy_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuCounter(torch.device("cuda", 0)).joules() is None


def laps_of_a_rank(rank: int, powercap: str) -> list[float | None]:
    """Each rank on a node of its own; the second one's counter is gone in the end."""
    mine = Path(powercap) / str(rank)
    lay(mine, "intel-rapl:0", "package-0", 0)
    meter = Meter(torch.device("cpu"), CpuCounter(mine))
    lay(mine, "intel-rapl:0", "package-0", 10_000_000 * (rank + 1))
    laps = [meter.lap()]
    if rank:
        (mine / "intel-rapl:0" / "energy_uj").unlink()
    return [*laps, meter.lap()]


def test_nodes_are_added_up_and_one_that_does_not_know_spoils_it_for_all(tmp_path: Path) -> None:
    assert on_ranks(2, laps_of_a_rank, tmp_path, str(tmp_path)) == [[30.0, None]] * 2
