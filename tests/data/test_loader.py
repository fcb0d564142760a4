"""Shards to batches: the same data on every topology, and readers that neither die early nor stay."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.data.batch import collate
from mvat_dist.data.loader import TrainingData, batches, split_batch
from mvat_dist.data.mixing.segments import Segment
from mvat_dist.data.shards.format import ShardError
from mvat_dist.data.shards.target_codec import SegmentTargets
from mvat_dist.errors import UserError
from tests.tiny_corpus import write_pairs
from tests.training_corpus import (
    LENGTH,
    UTTERANCES,
    pairs,
    sources,
    taken,
    tone,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tiny") / "packed corpus")


@pytest.fixture(scope="module")
def data(corpus) -> TrainingData:
    return TrainingData(sources(corpus, tempo_probability=0.3), seed=11)


@pytest.fixture(scope="module")
def expected(data) -> list:
    """The stream itself: three steps, across the borders of epochs of 29 items."""
    numbers = range(24 * 3)
    segments = [data.item(*divmod(number, len(data))) for number in numbers]
    samples = [(one.noisy.tobytes(), one.clean.tobytes(), one.recipe) for one in segments]
    return [samples[at : at + 24] for at in numbers[::24]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 24])
def test_the_global_batch_is_the_same_on_any_ranks(data, expected, world_size, micro_batch):
    assert taken(data, world_size=world_size, micro_batch=micro_batch, first_step=0, steps=3) == expected


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 4), (2, 1), (3, 4)])
def test_the_global_batch_is_the_same_with_any_workers(data, expected, world_size, workers):
    assert taken(data, world_size=world_size, workers=workers, first_step=0, steps=3) == expected


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_the_first_steps_and_the_rest_are_all(data, expected, done):
    before = taken(data, world_size=4, first_step=0, steps=done)
    after = taken(data, world_size=3, workers=done % 2, first_step=done, steps=3 - done)
    assert before + after == expected


def test_a_step_of_next_year_needs_nothing_from_before(data):
    step = 10**9
    first = next(
        batches(data, batch=24, micro_batch=24, rank=0, world_size=1, first_step=step, steps=1, workers=0)
    )[0]
    epoch, position = divmod(step * 24, UTTERANCES)
    np.testing.assert_array_equal(first.noisy[0], data.item(epoch, position).noisy)


def test_reading_leaves_the_random_state_of_the_run_alone(data):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in batches(data, batch=4, micro_batch=4, rank=0, world_size=1, first_step=0, steps=1, workers=1):
        pass
    assert torch.equal(torch.rand(3), expected)


@given(world_size=st.integers(1, 12), share=st.integers(1, 60), micro_batch=st.integers(1, 70))
def test_the_batch_is_split_into_the_largest_equal_parts(world_size, share, micro_batch):
    micro, accumulation = split_batch(world_size * share, world_size, micro_batch)
    assert micro * accumulation == share
    assert micro == max(size for size in range(1, micro_batch + 1) if share % size == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_with_its_key(tmp_path, workers):
    random = np.random.default_rng(0)
    folder = write_pairs(
        tmp_path, "train_pairs", {f"k{n}": (tone(random, LENGTH), tone(random, LENGTH)) for n in range(4)}
    )
    data = TrainingData(pairs(tmp_path), seed=0)
    shard = folder / "audio-000000.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"k2.noisy.flac") + 512 + 1000
    content[at] ^= 1
    shard.write_bytes(content)
    stream = batches(
        data, batch=4, micro_batch=4, rank=0, world_size=1, first_step=0, steps=1, workers=workers
    )
    with pytest.raises(ShardError, match=r"audio-000000\.tar, key k2") as raised:
        next(stream)
    assert "\n" not in str(raised.value)


def test_a_batch_that_cannot_be_shared_or_filled(data):
    with pytest.raises(UserError, match=r"use --train.batch 9 or 12"):
        split_batch(10, 3, 4)
    with pytest.raises(UserError, match=r"use --train.batch 4,"):
        split_batch(2, 4, 4)
    with pytest.raises(UserError, match=r"at least 1"):
        split_batch(0, 1, 4)
    with pytest.raises(UserError, match=r"more than an epoch"):
        batches(data, batch=30, micro_batch=2, rank=0, world_size=1, first_step=0, steps=1, workers=0)


@pytest.mark.parametrize("outputs", [(True, None), (True, False)])
def test_a_batch_of_which_a_segment_lacks_its_targets_is_none(outputs):
    """It would give the targets of one segment to another."""
    silence = np.zeros(8, np.float32)
    told = {True: SegmentTargets({}, silence), False: SegmentTargets({}, None), None: None}
    segments = [Segment(silence, silence, {"damage": []}, told[output]) for output in outputs]
    assert len(collate(segments[:1] * 2).teacher_targets.output) == 2
    with pytest.raises(AssertionError):
        collate(segments)


READ = """
import multiprocessing, sys
from pathlib import Path
from mvat_dist.config.schema import DataConfig
from mvat_dist.data.loader import TrainingData, batches

data = TrainingData(DataConfig(train=sys.argv[1], segment_seconds=0.5), seed=0)
steps = batches(data, batch=2, micro_batch=2, rank=0, world_size=1, first_step=0, steps=200, workers=2)
next(steps)
print(*(reader.pid for reader in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
print(sum(1 for _ in zip(range(100), steps)), flush=True)
sys.stdin.readline()
"""


def test_readers_survive_the_signals_of_slurm_but_not_their_rank(corpus, tmp_path):
    """Slurm sends its warning to every process; a killed rank must not leave readers behind.

    The script has no ``if __name__ == "__main__"``: readers must not import the main module.
    """
    script = tmp_path / "rank.py"
    script.write_text(READ)
    with subprocess.Popen(
        [sys.executable, str(script), str(corpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:
        readers = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(readers) == 2
        ends = [os.pidfd_open(pid) for pid in readers]
        server = int(Path(f"/proc/{readers[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
        for pid in [*readers, server]:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)
        rank.stdin.write("go on\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "100\n"
        rank.kill()
        for end in ends:
            assert select.select([end], [], [], 20)[0], "a reader outlived its rank"
            os.close(end)
