"""Energy that a run's processors take, from the counters that they keep themselves, where these can be read.

A GPU's is NVML's total since its driver was loaded, through the package nvidia-ml-py; a CPU's is that of
RAPL's packages and their memory under /sys/class/powercap, which most systems show to root alone. Power
supplies, disks and networks are in neither. A node's CPU counter holds whatever else runs on that node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mvat_dist.distributed.collectives import all_reduce_sum
from mvat_dist.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
_LOOK_SECONDS = 10.0
"""A counter of a CPU goes round in minutes at the soonest."""


class Meter:
    """What all ranks have taken since it was made, or was read last."""

    def __init__(self, device: torch.device, counter: Counter) -> None:
        self._device, self._counter = device, counter
        self._before = 0.0
        self._looked = time.monotonic()

    def look(self) -> None:
        """Read this rank's counter now and then: one of a CPU starts again at 0."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._counter.joules()

    def lap(self) -> float | None:
        """Joules; None where one of the ranks cannot tell. Every rank calls it."""
        now = self._counter.joules()
        taken = 0.0 if now is None else now - self._before
        self._before += taken
        told = torch.tensor([taken, float(now is None)], dtype=torch.float64, device=self._device)
        all_reduce_sum([told])
        joules, unknown = told.tolist()
        return None if unknown else float(joules)


class Counter(Protocol):
    """A counter of energy."""

    def joules(self) -> float | None:
        """What it has counted since it was made; None where it cannot be read."""


def counter_of(device: torch.device, ranks: Ranks, *, whole_nodes: bool) -> Counter:
    """What counts for a rank: its own GPU, or its node's CPUs, which are the first local rank's.

    Args:
        whole_nodes: no other part of the run is on its nodes; else nobody knows who took how much of a CPU's.
    """
    if device.type == "cuda":
        return GpuCounter(device)
    if not whole_nodes:
        return Fixed(None)
    return CpuCounter() if ranks.local_rank == 0 else Fixed(0.0)


@dataclass(frozen=True)
class Fixed:
    """For a rank whose energy another one counts, or nobody."""

    taken: float | None

    def joules(self) -> float | None:
        """Always the same."""
        return self.taken


class CpuCounter:
    """RAPL's energy of all packages and their memory.

    The counters are microjoules and start again at 0 after `max_energy_range_uj`, minutes to an hour at full
    load: they are to be read more often than that.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        ranges = {zone: _number(zone / "max_energy_range_uj") for zone in _zones(powercap)}
        self._ranges = {zone: value for zone, value in ranges.items() if value is not None}
        if len(self._ranges) < len(ranges):
            self._ranges = {}
        self._last = self._read()
        self._counted = 0.0

    def joules(self) -> float | None:
        """What it has counted since it was made; None where there is no counter, or not for this user."""
        now = self._read()
        if now is None or self._last is None:
            return None
        for zone, value in now.items():
            grown = value - self._last[zone]
            self._counted += grown if grown >= 0 else grown + self._ranges[zone]
        self._last = now
        return self._counted / 1e6

    def _read(self) -> Mapping[Path, int] | None:
        found = {zone: _number(zone / "energy_uj") for zone in self._ranges}
        known = {zone: value for zone, value in found.items() if value is not None}
        return known if known and len(known) == len(found) else None


def _zones(powercap: Path) -> list[Path]:
    """Packages, and memory beside them; `core` and `uncore` lie within a package, `psys` around it."""
    found = powercap.glob("intel-rapl:*") if powercap.is_dir() else []
    return [zone for zone in found if _name(zone).startswith("package") or _name(zone) == "dram"]


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class GpuCounter:
    """NVML's energy of one GPU, in Volta and later ones."""

    def __init__(self, device: torch.device) -> None:
        self._begin = 0.0
        try:
            import pynvml

            pynvml.nvmlInit()
            # Not by number: NVML counts every GPU of the node, whichever the job may see.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._begin = self._total()
        except Exception as error:  # no package, an old driver, a slice of a GPU: each has errors of its own
            logger.info("the GPU's energy is not known (%s)", error)
            self._handle = None

    def _total(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def joules(self) -> float | None:
        """What it has counted since it was made; None where NVML does not say."""
        try:
            return None if self._handle is None else self._total() - self._begin
        except self._nvml.NVMLError:
            return None
