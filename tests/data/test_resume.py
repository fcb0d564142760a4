"""Who reads what, and going on in the middle: first k steps and the rest are all, on any ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat_dist.data.loader import TrainingData, batches, split_batch
from mvat_dist.data.mixing.sampler import RankSampler, epoch_permutation
from mvat_dist.errors import UserError
from tests.tiny_corpus import write_sources
from tests.training_corpus import pairs, sources, taken, tone, write_corpus


def global_batches(batch: int, micro_batch: int, world_size: int, first_step: int, steps: int) -> list:
    """Sample numbers of each step, put together from all ranks in the order of their forward passes."""
    micro, accumulation = split_batch(batch, world_size, micro_batch)
    ranks = [
        list(RankSampler(batch, micro, accumulation, rank, world_size, first_step, steps))
        for rank in range(world_size)
    ]
    turns = [[number for one in turn for number in one] for turn in zip(*ranks, strict=True)]
    return [
        [number for turn in turns[step * accumulation : (step + 1) * accumulation] for number in turn]
        for step in range(steps)
    ]


shares = st.integers(1, 5).map(lambda share: 24 * share)  # shared by 1, 2, 3, 4, 6, 8 ranks
ranks = st.sampled_from([1, 2, 3, 4, 8])


@given(batch=shares, micro_batch=st.integers(1, 40), world_size=ranks, first=st.integers(0, 10**9))
def test_any_topology_reads_the_same_steps(batch, micro_batch, world_size, first):
    steps = global_batches(batch, micro_batch, world_size, first, 3)
    assert steps == [list(range(at * batch, (at + 1) * batch)) for at in range(first, first + 3)]


@settings(max_examples=60)
@given(data=st.data(), batch=shares, items=st.integers(120, 400), total=st.integers(1, 12))
def test_first_and_rest_are_all_when_the_topology_changes(data, batch, items, total):
    done = data.draw(st.integers(0, total))
    before, after = data.draw(ranks), data.draw(ranks)
    first = global_batches(batch, data.draw(st.integers(1, 40)), before, 0, done)
    rest = global_batches(batch, data.draw(st.integers(1, 40)), after, done, total - done)
    numbers = [number for step in first + rest for number in step]
    assert numbers == list(range(total * batch))
    # Whole epochs hold every utterance once; the batch that straddles two belongs to both, none is lost.
    places = [divmod(number, items) for number in numbers]
    for epoch in range(len(numbers) // items):
        read = [epoch_permutation(3, epoch, items)[position] for of, position in places if of == epoch]
        assert sorted(read) == list(range(items))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tiny") / "packed corpus")


@pytest.fixture(scope="module")
def data(corpus) -> TrainingData:
    return TrainingData(sources(corpus), seed=11)


def stream(data: TrainingData, rank: int, world_size: int, steps: int = 4, **changes):
    arguments = {"batch": 24, "micro_batch": 3, "first_step": 0, "workers": 0}
    return batches(data, rank=rank, world_size=world_size, steps=steps, **{**arguments, **changes})


def samples(steps: list) -> list[bytes]:
    return [segment.tobytes() for step in steps for micro in step for segment in micro.noisy.numpy()]


@pytest.mark.parametrize("done", [0, 1, 3, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_saved_stream_goes_on_elsewhere(data, done, workers):
    """One rank with micro-batches of 3 stops; two ranks with micro-batches of 12 go on."""
    whole = taken(data, world_size=1, first_step=0, steps=4)
    begun = stream(data, 0, 1, workers=workers)
    first = [next(begun) for _ in range(done)]
    saved = json.loads(json.dumps(begun.state_dict()))
    assert saved["step"] == done
    rest = []
    for rank in range(2):
        other = stream(data, rank, 2, micro_batch=12, workers=workers)
        other.load_state_dict(saved)
        rest.append([samples([step]) for step in other])
        assert other.state_dict()["step"] == 4
        with pytest.raises(StopIteration):
            next(other)
    expected = [noisy for step in whole for noisy, _, _ in step]
    assert (
        samples(first) + [noisy for step in zip(*rest, strict=True) for r in step for noisy in r] == expected
    )


def test_a_stream_can_go_back(data):
    running = stream(data, 0, 1)
    begin = running.state_dict()
    first = samples([next(running), next(running)])
    running.load_state_dict(begin)
    assert samples([next(running), next(running)]) == first


def test_all_ranks_save_the_same(data):
    states = []
    for rank in range(3):
        one = stream(data, rank, 3)
        next(one)
        states.append(one.state_dict())
    assert states[0] == states[1] == states[2]
    moved = TrainingData(replace(data.config, workers=7, on_bad_sample="skip"), data.seed)
    assert {**states[0], "step": 0} == stream(moved, 0, 1).state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 12}, r"seed 11, not 12"),
        ({"snr_db": (0.0, 20.0)}, r"snr_db \[-5\.0, 20\.0\], not \[0\.0, 20\.0\]"),
        ({"variants": 2}, r"variants 0, not 2"),
        (
            {"mode": "premixed", "batch": 12},
            r'batch 24, not 12; mode "dynamic", not "premixed"; another corpus',
        ),
    ],
)
def test_another_stream_is_refused(data, changes, message):
    saved = stream(data, 0, 1).state_dict()
    changes = dict(changes)
    seed, batch = changes.pop("seed", data.seed), changes.pop("batch", 24)
    other = stream(TrainingData(replace(data.config, **changes), seed), 0, 1, batch=batch)
    with pytest.raises(UserError, match=message) as raised:
        other.load_state_dict(saved)
    assert "\n" not in str(raised.value)
    # What refused goes on as before.
    assert other.state_dict()["step"] == 0
    next(other)


def test_the_stream_of_a_version_that_knew_fewer_choices_is_one_with_their_defaults(data):
    saved = stream(data, 0, 1).state_dict()
    saved["choices"] = {name: value for name, value in saved["choices"].items() if name != "synthetic_rooms"}
    stream(data, 0, 1).load_state_dict(saved)
    other = TrainingData(replace(data.config, synthetic_rooms=0.5), data.seed)
    with pytest.raises(UserError, match=r"of other data \(.*synthetic_rooms 0\.0, not 0\.5\)"):
        stream(other, 0, 1).load_state_dict(saved)


def test_another_corpus_is_refused_and_a_copy_is_not(tmp_path, data):
    saved = stream(data, 0, 1).state_dict()
    write_corpus(tmp_path / "copy")
    stream(TrainingData(sources(tmp_path / "copy"), data.seed), 0, 1).load_state_dict(saved)
    random = np.random.default_rng(1)
    speech = {f"s{n:03d}": tone(random, 9000) for n in range(29)}
    for name in ("train_clean", "train_noise"):
        write_sources(tmp_path / "other", name, speech)
    plain = {"reverb_probability": 0.0}
    other = TrainingData(sources(tmp_path / "other", **plain), data.seed)
    with pytest.raises(UserError, match=r"another corpus"):
        stream(other, 0, 1).load_state_dict(saved)


def test_the_order_of_a_grid_without_choices_is_still_the_seed_s(data):
    """Its segments are the same for every seed, so that one teacher cache serves them; their order is not."""
    grid = pairs(data.config.train, stride_seconds=0.1)
    saved = stream(TrainingData(grid, 11), 0, 1, batch=12).state_dict()
    stream(TrainingData(grid, 11), 0, 1, batch=12).load_state_dict(saved)
    with pytest.raises(UserError, match=r"other data \(seed 11, not 12\)"):
        stream(TrainingData(grid, 12), 0, 1, batch=12).load_state_dict(saved)
