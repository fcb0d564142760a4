"""Every second of a run is accounted for once, to its section; so is every joule that the GPUs tell of."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.training.throughput import (
    EnergyMeter,
    GpuCounter,
    Stopwatch,
    in_words,
    of_student,
    speed,
)
from tests.commands.test_train import corpus, train  # noqa: F401 (corpus is a fixture)
from tests.ranks_harness import on_ranks


@dataclass
class Device:
    """A device as its host sees it: work is queued at once and done later; a moment is read when done."""

    queued: float = 0.0
    """Seconds of work that the host has given it."""
    done: float = 0.0

    def work(self, seconds: float) -> None:
        self.queued += seconds

    def now(self) -> float:
        return self.queued

    def passed(self, moment: float) -> bool:
        return moment <= self.done

    def between(self, begin: float, end: float) -> float:
        assert self.passed(end), "reading it would have waited"
        return end - begin


def test_work_counts_where_it_was_done() -> None:
    """Five times as much work in one section as in another, by the CPU's own clock."""

    def work(rounds: int) -> float:
        began = time.process_time()
        sum(number * number for number in range(rounds * 200_000))
        return time.process_time() - began

    watch, spent = Stopwatch(), {"short": 0.0, "long": 0.0, "other": 0.0}
    watch.lap()
    began = time.perf_counter()
    for _ in range(3):
        with watch.section("long"):
            spent["long"] += work(3)
            with watch.section("short"):
                spent["short"] += work(1)
            spent["long"] += work(2)
        spent["other"] += work(1)
    wall = time.perf_counter() - began
    elapsed, shares = watch.lap()
    assert elapsed == pytest.approx(wall, rel=0.01)
    assert set(shares) == set(spent)
    total = sum(spent.values())
    # Another process may take the core in any section, so this is generous; the order of sizes is not.
    assert shares == pytest.approx({name: seconds / total for name, seconds in spent.items()}, abs=0.15)
    assert shares["long"] > 2 * shares["short"]


sections = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9)), max_size=30)


@given(plan=sections, lags=st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_a_late_device_loses_no_second(plan: list[tuple[str, int, int]], lags: list[int]) -> None:
    """Whatever the device is behind by, nothing waits, and all laps together are all the work."""
    device = Device()
    watch = Stopwatch(device)
    spent: dict[str, float] = {"other": 0.0}
    counted: dict[str, float] = {}

    def read() -> None:
        elapsed, shares = watch.lap()
        assert not elapsed or sum(shares.values()) == pytest.approx(1)
        for name, share in shares.items():
            counted[name] = counted.get(name, 0.0) + share * elapsed

    for number, (name, inside, after) in enumerate(plan):
        with watch.section(name):
            device.work(inside)
        device.work(after)
        spent[name] = spent.get(name, 0.0) + inside
        spent["other"] += after
        device.done = max(device.done, device.queued - lags[number % len(lags)])
        if number % 3 == 2:
            read()
    device.done = device.queued
    read()
    assert counted == pytest.approx({name: spent.get(name, 0.0) for name in counted})
    assert sum(counted.values()) == pytest.approx(sum(spent.values()))


@given(steps=st.integers(1, 50), validating=st.integers(0, 90), saving=st.integers(0, 90))
def test_the_speed_is_that_of_training(steps: int, validating: int, saving: int) -> None:
    """Steps of 3 s that learn from 12 s of audio each: 4 s per second, whatever is done between them."""
    device = Device(done=math.inf)
    watch = Stopwatch(device)
    for _ in range(steps):
        with watch.section("data"):
            device.work(1)
        with watch.section("forward/a"):
            device.work(1.5)
        device.work(0.5)
    for name, seconds in (("validation", validating), ("checkpoint", saving)):
        with watch.section(name):
            device.work(seconds)
    elapsed, shares = watch.lap()
    assert elapsed == pytest.approx(3 * steps + validating + saving)
    assert speed(12.0 * steps, elapsed, shares) == pytest.approx(4)


def test_a_lap_without_training_has_no_speed() -> None:
    assert speed(12.0, 7.0, {"other": 0.0, "validation": 1.0}) is None


def test_a_students_row_shows_its_own_shares() -> None:
    shares = {"data": 0.1, "forward/a": 0.2, "backward/a": 0.3, "forward/b": 0.25, "backward/b": 0.15}
    assert of_student("a", shares) == pytest.approx(
        {"data": 0.1, "forward": 0.2, "backward": 0.3, "other students": 0.4}
    )
    assert in_words(shares, most=2) in {"forward 45 %, backward 45 %", "backward 45 %, forward 45 %"}


def test_a_run_accounts_for_its_time(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two students on two processes, by the record and STATUS: shares add up, little is unexplained."""
    run = train(
        corpus,
        tmp_path,
        "timed",
        "--student=tiny,mini",
        "--distil.method=none",
        "--track.every=2",
        processes=2,
    )
    for student in ("tiny", "mini"):
        rows = [json.loads(line) for line in (run / "students" / student / "history.jsonl").open()]
        timed = [row["time"] for row in rows if "time" in row]
        assert len(timed) == 3
        for shares in timed:
            assert sum(shares.values()) == pytest.approx(1)
            assert shares["other"] <= 0.2  # of steps of milliseconds, on a machine that does other things too
            assert {"data", "forward", "backward", "optimiser", "communication", "other students"} <= set(
                shares
            )
    # Validation after step 4 and a save, both between the rows of steps 4 and 6.
    assert timed[-1]["validation"] > 0
    assert timed[-1]["checkpoint"] > 0
    status = json.loads((run / "STATUS").read_text())["time_shares"]
    assert sum(status.values()) == pytest.approx(1)
    assert {"forward/tiny", "backward/mini"} <= set(status)


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


class FakeCounter(GpuCounter):
    """A counter that gives its readings one after the other."""

    def __init__(self, *readings: float | None) -> None:
        self._readings = iter(readings)

    def joules(self) -> float | None:
        return next(self._readings)


def test_a_meter_counts_from_lap_to_lap() -> None:
    meter = EnergyMeter(torch.device("cpu"), FakeCounter(6.0, 8.0))
    assert meter.lap() == pytest.approx(6.0)
    assert meter.lap() == pytest.approx(2.0)


def test_a_cpu_has_no_counter() -> None:
    assert EnergyMeter(torch.device("cpu")).lap() is None


def laps_of_a_rank(rank: int) -> list[float | None]:
    """Each rank has a GPU of its own; the second one's counter cannot be read at the second lap."""
    meter = EnergyMeter(torch.device("cpu"), FakeCounter(10.0 * (rank + 1), None if rank else 50.0))
    return [meter.lap(), meter.lap()]


def test_gpus_are_added_up_and_one_that_does_not_tell_spoils_it_for_all(tmp_path: Path) -> None:
    assert on_ranks(2, laps_of_a_rank, tmp_path) == [[30.0, None]] * 2


def test_a_timed_function_counts_in_its_section() -> None:
    device = Device(done=math.inf)
    watch = Stopwatch(device)

    def work(seconds: float, *, result: str) -> str:
        device.work(seconds)
        return result

    timed = watch.timed("work", work)
    device.work(1)
    assert timed(3, result="done") == "done"
    assert watch.lap() == (4, {"other": 0.25, "work": 0.75})
