"""The forecast obeys the laws of what it forecasts, and its closed forms equal what they sum up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.config import sizes as students
from mvat_dist.config.schema import Config
from mvat_dist.config.sizes import SIZES, STUDENTS, Size
from mvat_dist.errors import UserError
from mvat_dist.launch import cost_model, forecast
from mvat_dist.launch.cost_model import Machine, Work
from mvat_dist.launch.placement import Part
from mvat_dist.models import weights as modelfile
from mvat_dist.models.manner import Manner
from mvat_dist.models.metadata import FORMAT
from mvat_dist.runs import weights as weightsfile

MACHINE = Machine()
FLEET = Work(
    students=tuple(SIZES[name] for name in STUDENTS),
    teacher=SIZES["manner-b"],
    samples=64_000,
    batch=3840,
    micro_batch=4,
    steps=1000,
    readers=2,
    shards=10_000,
)
counts = st.sampled_from([n for n in range(1, 3841) if 3840 % n == 0])
machines = st.builds(
    Machine,
    cores=st.integers(1, 16),
    loss=st.floats(0, 1),
    update=st.floats(0, 1e-7),
    call=st.floats(0, 1),
    crowding=st.floats(0, 1),
    jitter=st.floats(0, 0.5),
    latency=st.floats(0, 0.1),
    bandwidth=st.floats(1e6, 1e12),
    overlap=st.floats(0, 1),
    reading=st.floats(0, 1),
    saving=st.floats(1e6, 1e12),
)


def ring_by_hand(
    size: int, processes: int, latency: float, bandwidth: float
) -> tuple[float, list[list[float]]]:
    """A ring all-reduce, message by message: its seconds, and what every process has in the end."""
    parts = [[float(rank * 100 + part) for part in range(processes)] for rank in range(processes)]
    seconds = 0.0
    for turn in range(2 * (processes - 1)):
        sent = [
            (rank, (rank - turn) % processes, parts[rank][(rank - turn) % processes])
            for rank in range(processes)
        ]
        for rank, part, value in sent:
            after = (rank + 1) % processes
            parts[after][part] = parts[after][part] + value if turn < processes - 1 else value
        seconds += latency + size / processes / bandwidth  # all send at once
    return seconds, parts


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_ring_is_that_of_its_messages(processes: int) -> None:
    machine = replace(MACHINE, latency=0.25, bandwidth=100.0)
    seconds, parts = ring_by_hand(1000, processes, 0.25, 100.0)
    assert cost_model.ring(1000, processes, machine) == pytest.approx(seconds)
    assert all(one == parts[0] for one in parts)
    assert parts[0] == [sum(rank * 100 + part for rank in range(processes)) for part in range(processes)]


@given(machine=machines, few=counts, many=counts)
def test_more_processes_compute_no_longer_and_talk_no_less(machine: Machine, few: int, many: int) -> None:
    few, many = min(few, many), max(few, many)
    machine = replace(machine, call=0.0)  # micro-batches of a share of 5 are of 1, and 5 calls
    before, after = cost_model.step(FLEET, machine, few, 1), cost_model.step(FLEET, machine, many, 1)
    assert after.computing <= before.computing * (1 + 1e-9)
    assert cost_model.ring(1e6, few, machine) <= cost_model.ring(1e6, many, machine) * (1 + 1e-9)
    assert after.seconds > 0
    assert min(after.communication, after.waiting, after.data) >= 0


@given(processes=counts)
def test_a_perfect_network_scales_perfectly(processes: int) -> None:
    perfect = replace(MACHINE, latency=0.0, bandwidth=math.inf, jitter=0.0, call=0.0, update=0.0)
    endless = replace(FLEET, save_every=10**15, validate_every=10**15)
    one = cost_model.step(endless, perfect, 1, 1).seconds
    assert processes * cost_model.step(endless, perfect, processes, 1).seconds == pytest.approx(one, rel=1e-6)


def test_one_process_pays_nobody() -> None:
    found = cost_model.step(FLEET, MACHINE, 1, 1)
    assert (found.communication, found.waiting) == (0, 0)


@given(machine=machines)
def test_a_fleet_asks_its_teacher_once(machine: Machine) -> None:
    """k jobs, each with the teacher, cost as much as the fleet and the teacher k - 1 times more."""
    alone = [cost_model.step(replace(FLEET, students=(size,)), machine, 1, 1) for size in FLEET.students]
    fleet = cost_model.step(FLEET, machine, 1, 1)
    assert sum(one.computing for one in alone) - fleet.computing == pytest.approx(
        (len(alone) - 1) * fleet.teacher, rel=1e-6
    )
    cached = cost_model.step(replace(FLEET, teacher=None), machine, 1, 1)
    assert fleet.computing - cached.computing == pytest.approx(fleet.teacher, rel=1e-6)


def test_a_slow_reader_sets_the_pace() -> None:
    slow = replace(MACHINE, reading=100.0)
    found = cost_model.step(FLEET, slow, 1, 1)
    rest = found.seconds - found.validation - found.checkpoint
    assert rest == pytest.approx(3840 * 100 / 2)  # two readers
    assert cost_model.step(replace(FLEET, readers=4), slow, 1, 1).seconds < found.seconds


def test_too_many_processes_take_turns() -> None:
    four = replace(MACHINE, cores=4, crowding=0.0)
    assert [cost_model.slowdown(four, n) for n in (1, 4, 8)] == [1, 1, 2]


def test_values_are_what_the_layers_put_out() -> None:
    """Counted on the network itself: what its convolutions, linear layers and attention give."""
    from torch import nn

    size, samples = Size("base", 12, depth=3), 4000
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor
            kept += storage.nbytes() // 4
        return tensor

    network = Manner(size)
    seen = {one.untyped_storage().data_ptr(): one for one in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(1, samples))
    assert any(isinstance(module, nn.Conv1d) for module in network.modules())
    assert 1 < kept / students.values(size, samples) < 3  # what training keeps is in proportion to them


def test_memory_grows_with_micro_batches_and_students_and_not_with_processes() -> None:
    base = cost_model.memory(FLEET, MACHINE, 1)
    assert cost_model.memory(replace(FLEET, micro_batch=8), MACHINE, 1) > base
    assert cost_model.memory(replace(FLEET, students=FLEET.students[:1]), MACHINE, 1) < base
    assert cost_model.memory(replace(FLEET, batch=2 * FLEET.batch), MACHINE, 1) == base
    assert cost_model.memory(FLEET, MACHINE, 8) == base
    # A share of 15 segments is dealt in micro-batches of 3.
    assert cost_model.memory(FLEET, MACHINE, 256) == cost_model.memory(
        replace(FLEET, micro_batch=3), MACHINE, 1
    )


def test_a_teacher_that_fades_is_paid_while_it_is_asked() -> None:
    whole, faded = (cost_model.step(replace(FLEET, taught=share), MACHINE, 1, 1) for share in (1.0, 0.3))
    assert faded.teacher == pytest.approx(0.3 * whole.teacher)


def test_reading_without_readers_is_paid_in_full() -> None:
    found = cost_model.step(replace(FLEET, readers=0), MACHINE, 2, 2)
    assert found.data == pytest.approx(cost_model.reading(replace(FLEET, readers=0), MACHINE, 2))


def test_gradients_hide_behind_the_last_micro_batch_of_the_smaller_students() -> None:
    """Whatever the order in which the students are named."""
    slow = replace(MACHINE, bandwidth=1e3, latency=0.0, overlap=1.0)
    found = cost_model.step(FLEET, slow, 2, 2)
    again = cost_model.step(replace(FLEET, students=FLEET.students[::-1]), slow, 2, 2)
    assert again.communication == pytest.approx(found.communication)
    largest = max(FLEET.students, key=students.parameters)
    rest = tuple(size for size in FLEET.students if size != largest)
    learning = cost_model.step(replace(FLEET, students=rest), slow, 2, 2).students
    sizes = [students.parameters(size) for size in FLEET.students]
    sent = sum(cost_model.ring(4.0 * size, 2, slow) for size in sizes)
    sent += 2 * cost_model.ring(0.04 * sum(sizes), 2, slow)
    calls = FLEET.batch / 2 / FLEET.micro_batch
    assert sent - found.communication == pytest.approx(learning / calls)


def fleet(machine: Machine = MACHINE, **train: int) -> forecast.Fleet:
    config = Config()
    config.train.batch, config.train.steps = train.get("batch", 64), 1000
    return forecast.Fleet(config, SIZES["manner-b"], 10_000, machine)


def test_one_teacher_for_all_is_the_best_on_few_nodes() -> None:
    options = fleet().options(4, 1)
    chosen = forecast.best(options)
    assert chosen is not None
    assert chosen.placement == "together"
    assert {option.placement for option in options} == {"together", "split", "jobs"}
    assert all(option.hours > chosen.hours for option in options if option is not chosen)


def test_where_all_cannot_share_the_batch_groups_can() -> None:
    """Seven processes cannot share 64 segments, but each can take a student."""
    options = fleet().options(7, 1)
    chosen = forecast.best(options)
    assert chosen is not None
    assert chosen.placement == "split"
    assert sorted(name for part in chosen.parts for name in part.students) == sorted(STUDENTS)
    assert forecast.best(fleet(batch=63).options(11, 1)) is None  # nor can they be dealt to groups evenly


def test_groups_that_the_processes_cannot_share_are_no_choice() -> None:
    """A run that was divided into three, forecast on two processes and on one."""
    groups = [Part(STUDENTS[:3]), Part(STUDENTS[3:5]), Part(STUDENTS[5:])]
    for processes in (1, 2):
        by_name = {option.placement: option for option in fleet().options(processes, 1, groups)}
        assert by_name["split"].why_not == f"{processes} processes are not shared by 3 groups"
        assert by_name["jobs"].why_not is None


def test_a_slow_network_makes_groups_pay() -> None:
    """Without a teacher to share, seven small worlds beat a large one that mostly waits for messages."""
    slow = replace(MACHINE, latency=5.0)
    alone = replace(fleet(slow, batch=56), teacher=None)
    chosen = forecast.best(alone.options(28, 1))
    assert chosen is not None
    assert chosen.placement == "split"


def test_what_breaks_first_is_named() -> None:
    work = replace(FLEET, batch=64)
    assert forecast.breaking_point(work, replace(MACHINE, latency=0.0), 1) == (
        128,
        "a batch of 64 is not shared by 128 processes",
    )
    nodes, why = forecast.breaking_point(work, replace(MACHINE, latency=2.0), 1)
    assert (nodes < 64, why) == (True, "communication")
    assert forecast.breaking_point(replace(work, shards=20), MACHINE, 1)[1] == "32 readers share 20 shards"


def test_a_machines_rates_come_back_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "our node.json"
    file.write_text(replace(MACHINE, name="ours", latency=3e-6).to_json())
    assert Machine.read(file) == replace(MACHINE, name="ours", latency=3e-6)
    for content in ("{}", "no json", json.dumps({"forward": [1], "learning": [1, 2]}), '{"speed": 1}', "[1]"):
        file.write_text(content)
        with pytest.raises(UserError, match="scaling"):
            Machine.read(file)
    with pytest.raises(UserError, match="nowhere"):
        Machine.read(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("update", "fast", r"'update' is \"fast\", and must be a number, not below 0"),
        ("latency", -1e-6, r"'latency' is -1e-06, and must be a number, not below 0"),
        ("jitter", True, r"'jitter' is true, and must be"),
        ("loss", math.nan, r"'loss' is NaN, and must be"),
        ("bandwidth", 0, r"'bandwidth' is 0, and must be a number above 0"),
        ("cores", 1.5, r"'cores' is 1.5, and must be a whole number above 0"),
        ("forward", [1e-11, "x"], r"'forward' is \[1e-11, \"x\"\], and must be two numbers"),
        ("learning", 3, r"'learning' is 3, and must be two numbers"),
        ("learning_memory", "10", r"'learning_memory' is \"10\", and must be"),
        ("base_memory", None, r"'base_memory' is null, and must be"),
        ("name", 7, r"'name' is 7, and must be a text"),
    ],
)
def test_a_rate_that_cannot_be_one_is_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    file = tmp_path / "our node.json"
    file.write_text(json.dumps(json.loads(MACHINE.to_json()) | {key: value}))
    with pytest.raises(UserError, match=rf"--machine .*our node\.json: {message}.*scaling"):
        Machine.read(file)
    known = json.loads(MACHINE.to_json())
    del known[key]
    file.write_text(json.dumps(known))
    with pytest.raises(UserError, match=f"our node.json: '{key}' is missing"):
        Machine.read(file)


def test_the_teachers_size_is_read_without_torch(tmp_path: Path) -> None:
    size = Size("base", 12, depth=2)
    file = tmp_path / "run" / "students" / "mine" / "best" / "model.safetensors"
    file.parent.mkdir(parents=True)
    modelfile.save(file, Manner(size).state_dict(), name="mine", size=size, step=1)
    config = Config()
    for place in (file, tmp_path / "run", tmp_path / "run" / "students" / "mine"):
        config.teacher.file = str(place)
        assert forecast.teacher_size(config) == size
    best = file.parent
    part = tmp_path / "run" / "parts" / "mine"
    part.mkdir(parents=True)
    (tmp_path / "run" / "students").rename(part / "students")
    config.teacher.file = str(tmp_path / "run")
    assert forecast.teacher_size(config) == size
    moved = part / "students" / "mine"
    (moved / "best").rename(moved / "last")  # nothing was scored yet
    assert forecast.teacher_size(config) == size
    assert not best.exists()


def test_a_foreign_teacher_is_forecast_as_the_usual_one(tmp_path: Path) -> None:
    config = Config()
    weights = {"some.weight": torch.zeros(2)}
    for number, metadata in enumerate((None, {"format": "pt"}, {"size": "1.2 GB", "license": "mit"})):
        file = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file(weights, file, metadata)
        config.teacher.file = str(file)
        assert forecast.teacher_size(config) == SIZES["manner-b"]
    other = tmp_path / "authors.pth"
    other.write_bytes(b"PK\x03\x04 and more")
    config.teacher.file = str(other)
    assert forecast.teacher_size(config) == SIZES["manner-b"]


def test_a_teacher_that_training_would_refuse_has_no_forecast(tmp_path: Path) -> None:
    """With the very words of the training."""
    damaged = tmp_path / "damaged.safetensors"
    metadata = {"format": FORMAT, "name": "a", "size": '{"hidden": "60"}'}
    safetensors.torch.save_file({"some.weight": torch.zeros(2)}, damaged, metadata)
    several = tmp_path / "several"
    for name in ("a", "b"):
        file = several / "students" / name / "best" / "model.safetensors"
        file.parent.mkdir(parents=True)
        safetensors.torch.save_file({"some.weight": torch.zeros(2)}, file)
    (tmp_path / "empty").mkdir()
    config = Config()
    for place, words in (
        (damaged, "damaged"),
        (several, "several students"),
        (tmp_path / "empty", "no weights"),
    ):
        config.teacher.file = str(place)
        with pytest.raises(UserError, match=words) as forecasting:
            forecast.teacher_size(config)
        with pytest.raises(UserError) as training:
            modelfile.load(weightsfile.resolve(place))
        assert str(forecasting.value) == str(training.value)
