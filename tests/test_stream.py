"""Shards to batches: the same data on every topology, and mixtures that their recipes explain."""

from __future__ import annotations

import copy
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.config import DataConfig
from mvat_dist.data.checks import check_readers
from mvat_dist.data.segments import FADE, GAP, segment_grid
from mvat_dist.data.shards import ShardError
from mvat_dist.data.stream import TrainingData, batches, split_batch
from mvat_dist.errors import UserError
from tests.tiny_corpus import write_pairs, write_sources

LENGTH = 8000
SEGMENT = LENGTH / 16_000
UTTERANCES, PAIRS = 29, 13


def tone(random: np.random.Generator, samples: int) -> np.ndarray:
    time = np.arange(samples) / 16_000
    return 0.2 * np.sin(2 * np.pi * random.uniform(100, 900) * time) + 0.01 * random.standard_normal(samples)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Speech, noise, rooms and pairs, some shorter and some longer than a segment."""
    random = np.random.default_rng(5)
    folder = tmp_path_factory.mktemp("tiny") / "packed corpus"
    speech = {f"s{n:03d}": tone(random, int(random.integers(700, 9000))) for n in range(UTTERANCES)}
    noise = {f"n{n}": 0.05 * random.standard_normal(size) for n, size in enumerate((1500, 6000, 20_000))}
    rooms = {}
    for n in range(2):
        rooms[f"r{n}"] = 0.05 * random.standard_normal(900) * np.exp(-np.arange(900) / 200)
        rooms[f"r{n}"][32] = 0.9
    pairs = {}
    for n in range(PAIRS):
        clean = tone(random, 1000 + 900 * n)
        pairs[f"p{n:02d}"] = (clean + 0.03 * random.standard_normal(clean.size), clean)
    write_sources(folder, "train_clean", speech, shards=5)
    write_sources(folder, "train_noise", noise)
    write_sources(folder, "train_rir", rooms)
    write_pairs(folder, "train_pairs", pairs, shards=3)
    return folder


def sources(corpus: Path, **changes) -> DataConfig:
    return replace(DataConfig(train=str(corpus), segment_seconds=SEGMENT), **changes)


def pairs(corpus: Path, **changes) -> DataConfig:
    plain = DataConfig(train=str(corpus), segment_seconds=SEGMENT, mode="pairs", tempo_probability=0.0)
    return replace(plain, **changes)


def stored(corpus: Path, subset: str, key: str, extension: str = "flac") -> np.ndarray:
    """An utterance, found with tarfile alone."""
    for shard in sorted((corpus / subset).glob("*.tar")):
        with tarfile.open(shard) as tar:
            if f"{key}.{extension}" in tar.getnames():
                member = tar.extractfile(f"{key}.{extension}")
                return soundfile.read(BytesIO(member.read()), dtype="float64")[0]
    raise KeyError(key)


def same(one, other) -> bool:
    return (
        np.array_equal(one.noisy, other.noisy)
        and np.array_equal(one.clean, other.clean)
        and one.recipe == other.recipe
    )


# --- one item ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [sources, pairs])
def test_an_item_depends_on_its_place_alone(corpus, config):
    data = TrainingData(config(corpus, tempo_probability=0.5, remix_probability=0.5), seed=3)
    places = [(epoch, position) for epoch in (0, 1) for position in range(0, len(data), 2)]
    first = {place: data.item(*place) for place in places}
    twin = copy.deepcopy(data)  # as pickling does
    for place in reversed(places):
        assert same(first[place], twin.item(*place))
        assert same(first[place], data.item(*place))
    for segment in first.values():
        assert segment.noisy.shape == segment.clean.shape == (LENGTH,)
        assert segment.noisy.dtype == segment.clean.dtype == np.float32
        assert np.isfinite(segment.noisy).all()
        assert json.loads(json.dumps(segment.recipe)) == segment.recipe
    other = TrainingData(data.config, seed=4)
    assert not any(same(first[place], other.item(*place)) for place in places)
    assert not same(data.item(0, 0), data.item(1, 0))


def test_sources_visit_every_utterance_once_an_epoch(corpus):
    data = TrainingData(sources(corpus), seed=0)
    assert data.mode == "sources"
    for epoch in (0, 5):
        first = [data.item(epoch, at).recipe["speech"][0]["key"] for at in range(len(data))]
        assert sorted(first) == sorted(data.iterated.keys)
        assert len(first) == UTTERANCES


def rebuild(corpus: Path, subset: str, parts: list[dict], gap: int) -> np.ndarray:
    """A side of the mixture before levels, from the recipe."""
    audio = np.zeros(LENGTH)
    at = 0
    for number, part in enumerate(parts):
        piece = stored(corpus, subset, part["key"])[part["start"] : part["start"] + part["frames"]].copy()
        fade = min(FADE, piece.size)
        if number > 0:
            piece[:fade] *= np.arange(fade) / fade
        if number < len(parts) - 1:
            piece[-fade:] *= np.arange(fade)[::-1] / fade
        audio[at : at + piece.size] = piece
        at += piece.size + gap
    assert at >= LENGTH
    return audio


def test_the_recipe_explains_the_mixture(corpus):
    data = TrainingData(sources(corpus, tempo_probability=0.0, reverb_probability=0.5), seed=1)
    reverberant = joined = 0
    for position in range(len(data)):
        segment = data.item(2, position)
        recipe = segment.recipe
        assert (recipe["epoch"], recipe["position"]) == (2, position)
        speech = rebuild(corpus, "train_clean", recipe["speech"], GAP)
        noise = rebuild(corpus, "train_noise", recipe["noise"], 0)
        if recipe["rir"]:
            speech = np.convolve(speech, stored(corpus, "train_rir", recipe["rir"]))[32 : 32 + LENGTH]
        np.testing.assert_allclose(segment.clean, recipe["speech_gain"] * speech, atol=2e-6)
        expected = recipe["speech_gain"] * speech + recipe["noise_gain"] * noise
        np.testing.assert_allclose(segment.noisy, expected, atol=3e-6)

        added = segment.noisy.astype(np.float64) - segment.clean
        ratio = 10 * np.log10((segment.clean.astype(np.float64) ** 2).sum() / (added**2).sum())
        assert ratio == pytest.approx(recipe["snr_db"], abs=0.01)
        assert -5 <= recipe["snr_db"] <= 20
        level = 20 * np.log10(np.sqrt(np.mean(segment.noisy.astype(np.float64) ** 2)) / recipe["peak_gain"])
        assert level == pytest.approx(recipe["level_dbfs"], abs=1e-3)
        assert -35 <= recipe["level_dbfs"] <= -15
        assert np.abs(segment.noisy).max() <= 0.99
        assert recipe["silent"] == []
        reverberant += bool(recipe["rir"])
        joined += len(recipe["speech"]) > 1
    assert 5 < reverberant < 24
    assert joined > 3


def test_tempo_changes_the_speech_and_not_the_noise(corpus):
    plain = sources(corpus, tempo_probability=0.0, reverb_probability=0.0)
    faster = replace(plain, tempo_probability=1.0, tempo_range=(1.2, 1.2))
    segment = TrainingData(faster, seed=0).item(0, 0)
    assert segment.recipe["tempo"] == 1.2
    noise = rebuild(corpus, "train_noise", segment.recipe["noise"], 0)
    np.testing.assert_allclose(segment.noisy - segment.clean, segment.recipe["noise_gain"] * noise, atol=3e-6)
    used = sum(part["frames"] for part in segment.recipe["speech"])
    assert used + GAP * (len(segment.recipe["speech"]) - 1) > 1.1 * LENGTH
    assert TrainingData(plain, seed=0).item(0, 0).recipe["tempo"] == 1.0


def test_silent_stretches_are_drawn_again_and_then_reported(tmp_path):
    random = np.random.default_rng(0)
    mostly_silent = np.zeros(20_000)
    mostly_silent[:9000] = 0.1
    write_sources(tmp_path, "train_clean", {"quiet": np.zeros(9000), "half": mostly_silent})
    write_sources(tmp_path, "train_noise", {"n": 0.1 * random.standard_normal(9000)})
    data = TrainingData(sources(tmp_path, reverb_probability=0.0, tempo_probability=0.0), seed=0)
    found = {"quiet": 0, "half": 0}
    for epoch in range(40):
        for position in range(2):
            segment = data.item(epoch, position)
            key, silent = segment.recipe["speech"][0]["key"], segment.recipe["silent"]
            found[key] += silent == ["speech"]
            assert (segment.recipe["snr_db"] is None) == (silent == ["speech"])
            assert np.isfinite(segment.noisy).all()
            assert segment.clean.any() == (key == "half" and not silent)
    # 3000 of 12,001 crops of "half" are silent: five in a row are rare.
    assert found["quiet"] == 40
    assert found["half"] <= 3


def test_pairs_are_cut_together_and_padded_at_the_end(corpus):
    data = TrainingData(pairs(corpus), seed=0)
    assert len(data) == PAIRS
    seen = set()
    for position in range(PAIRS):
        segment = data.item(0, position)
        key, start, frames = (segment.recipe[name] for name in ("key", "start", "frames"))
        for signal_, side in ((segment.clean, "clean"), (segment.noisy, "noisy")):
            whole = stored(corpus, "train_pairs", key, f"{side}.flac")
            np.testing.assert_array_equal(signal_[:frames], whole[start : start + frames].astype(np.float32))
            assert not signal_[frames:].any()
            assert frames == min(LENGTH, whole.size)
        seen.add(key)
    assert seen == set(data.iterated.keys)
    starts = {data.item(epoch, 0).recipe["start"] for epoch in range(30)}
    assert len(starts) > 5


@given(
    samples=st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    length=st.integers(1, 900),
    stride=st.integers(1, 1200),
)
def test_the_grid_is_the_plain_loop(samples, length, stride):
    expected = []
    for utterance, size in enumerate(samples):
        start = 0
        while start + length < size:
            expected.append([utterance, start])
            start += stride
        expected.append([utterance, max(0, size - length)])
    assert segment_grid(np.array(samples), length, stride).tolist() == expected


def test_a_grid_visits_each_of_its_places_once_an_epoch(corpus):
    data = TrainingData(pairs(corpus, stride_seconds=SEGMENT / 4), seed=0)
    expected = segment_grid(data.iterated.samples, LENGTH, LENGTH // 4)
    recipes = [data.item(1, position).recipe for position in range(len(data))]
    places = {(recipe["key"], recipe["start"]) for recipe in recipes}
    assert places == {(data.iterated.keys[utterance], start) for utterance, start in expected.tolist()}
    assert len(places) == len(data) > PAIRS
    # A faster tempo needs more audio than a segment: it is taken from before the last place, not from beyond.
    faster = replace(data.config, tempo_probability=1.0, tempo_range=(1.3, 1.3))
    recipe = max((TrainingData(faster, 0).item(0, at).recipe for at in range(20)), key=lambda r: r["start"])
    assert recipe["frames"] > LENGTH
    assert (
        recipe["start"] + recipe["frames"] <= stored(corpus, "train_pairs", recipe["key"], "clean.flac").size
    )


def test_remix_takes_the_noise_of_another_pair(corpus):
    data = TrainingData(pairs(corpus, remix_probability=1.0), seed=0)
    plain = TrainingData(pairs(corpus), seed=0)
    for position in range(PAIRS):
        segment = data.item(0, position)
        remix = segment.recipe["remix"]
        assert remix["key"] != segment.recipe["key"]
        noisy, clean = (stored(corpus, "train_pairs", remix["key"], f"{s}.flac") for s in ("noisy", "clean"))
        noise = (noisy - clean)[remix["start"] : remix["start"] + remix["frames"]]
        repeated = np.tile(noise, LENGTH // noise.size + 1)[:LENGTH]
        np.testing.assert_allclose(segment.noisy - segment.clean, repeated, atol=1e-6)
        assert segment.recipe["peak_gain"] == 1.0
        np.testing.assert_array_equal(segment.clean, plain.item(0, position).clean)


def test_gain_is_common_and_does_not_clip(corpus):
    plain = TrainingData(pairs(corpus), seed=0).item(0, 3)
    quieter = TrainingData(pairs(corpus, gain_db=(-6.0, -6.0)), seed=0).item(0, 3)
    np.testing.assert_allclose(quieter.noisy, plain.noisy * 10 ** (-6 / 20), rtol=1e-5)
    np.testing.assert_allclose(quieter.clean, plain.clean * 10 ** (-6 / 20), rtol=1e-5)
    loud = TrainingData(pairs(corpus, gain_db=(30.0, 30.0)), seed=0).item(0, 3)
    assert 0.98 < np.abs(loud.noisy).max() <= 0.99
    ratio = np.abs(loud.noisy).max() / np.abs(plain.noisy).max()
    np.testing.assert_allclose(loud.clean, plain.clean * ratio, rtol=1e-4, atol=1e-7)


def test_tempo_keeps_pairs_additive(corpus):
    config = pairs(corpus, tempo_probability=1.0, tempo_range=(0.85, 0.85))
    segment = TrainingData(config, seed=0).item(0, 1)
    assert segment.recipe["tempo"] == 0.85
    assert segment.recipe["frames"] < LENGTH
    # The noise is white: it would not stay at its level, were the two spliced at different places.
    noise = (segment.noisy - segment.clean)[: segment.recipe["frames"]]
    assert noise.std() == pytest.approx(0.03, rel=0.2)


# --- batches ----------------------------------------------------------------------------------------------


def taken(data: TrainingData, *, world_size: int, micro_batch: int = 3, workers: int = 0, **place) -> list:
    """The global batches, put together from the ranks: accumulation steps, in each the ranks in turn."""
    arguments = {"batch": 24, "micro_batch": micro_batch, "world_size": world_size, "workers": workers}
    ranks = [list(batches(data, rank=rank, **arguments, **place)) for rank in range(world_size)]
    steps = []
    for step in zip(*ranks, strict=True):
        samples = []
        for turn in zip(*step, strict=True):
            for micro in turn:
                assert micro.noisy.shape == micro.clean.shape == (len(micro.recipes), LENGTH)
                assert len(micro.recipes) <= micro_batch
                samples += zip(micro.noisy.numpy(), micro.clean.numpy(), micro.recipes, strict=True)
        assert len(samples) == 24
        steps.append([(noisy.tobytes(), clean.tobytes(), recipe) for noisy, clean, recipe in samples])
    return steps


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


READ = """
import multiprocessing, sys
from pathlib import Path
from mvat_dist.config import DataConfig
from mvat_dist.data.stream import TrainingData, batches

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


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_db": (5.0, -5.0)}, "lower bound first"),
        ({"level_dbfs": (-15.0, -35.0)}, "lower bound first"),
        ({"level_dbfs": (-15.0, 3.0)}, "full scale"),
        ({"tempo_range": (1.1, 0.9)}, "lower bound first"),
        ({"tempo_range": (0.0, 1.0)}, "between 0.5 and 2"),
        ({"gain_db": (float("nan"), 0.0)}, "lower bound first"),
        ({"reverb_probability": 1.5}, "probability"),
        ({"tempo_probability": -0.1}, "probability"),
        ({"segment_seconds": 0.0}, "above 0"),
        ({"segment_seconds": 3600.0}, "longer than all speech"),
        ({"segment_seconds": 1.0, "mode": "pairs"}, "longer than the longest pair"),
        ({"stride_seconds": -1.0}, "0 or above"),
        ({"workers": -1}, "0 or above"),
        ({"train": "no/such/folder"}, "no such folder.*mvat_dist.pack"),
    ],
)
def test_mistakes_are_one_clear_line(corpus, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        TrainingData(sources(corpus, **changes), seed=0)
    assert "\n" not in str(raised.value)


def test_a_seed_out_of_range(corpus):
    with pytest.raises(UserError, match=r"seed -1"):
        TrainingData(sources(corpus), seed=-1)


def test_a_folder_that_is_not_packed(tmp_path):
    (tmp_path / "clean_fullband").mkdir()
    with pytest.raises(UserError, match=r"python -m mvat_dist.pack"):
        TrainingData(sources(tmp_path), seed=0)


def test_what_a_corpus_offers_decides_the_mode(tmp_path, corpus):
    assert TrainingData(sources(corpus), 0).mode == "sources"
    speech = {"a": tone(np.random.default_rng(0), 8000)}
    write_sources(tmp_path, "train_clean", speech)
    with pytest.raises(UserError, match=r"neither train_clean with train_noise nor train_pairs"):
        TrainingData(sources(tmp_path), 0)
    with pytest.raises(UserError, match=r"--data.mode pairs needs train_pairs"):
        TrainingData(sources(tmp_path, mode="pairs"), 0)
    write_pairs(tmp_path, "train_pairs", {"a": (speech["a"], speech["a"])})
    assert TrainingData(sources(tmp_path), 0).mode == "pairs"
    write_sources(tmp_path, "train_noise", speech)
    with pytest.raises(UserError, match=r"--data.reverb_probability 0"):
        TrainingData(sources(tmp_path), 0)
    assert TrainingData(sources(tmp_path, reverb_probability=0.0), 0).mode == "sources"


def test_an_empty_subset(tmp_path):
    write_sources(tmp_path, "train_clean", {})
    write_sources(tmp_path, "train_noise", {})
    with pytest.raises(UserError, match=r"holds no utterances"):
        TrainingData(sources(tmp_path), 0)


def test_a_batch_that_cannot_be_shared_or_filled(data):
    with pytest.raises(UserError, match=r"use --train.batch 9 or 12"):
        split_batch(10, 3, 4)
    with pytest.raises(UserError, match=r"use --train.batch 4,"):
        split_batch(2, 4, 4)
    with pytest.raises(UserError, match=r"at least 1"):
        split_batch(0, 1, 4)
    with pytest.raises(UserError, match=r"more than an epoch"):
        batches(data, batch=30, micro_batch=2, rank=0, world_size=1, first_step=0, steps=1, workers=0)


def test_fewer_shards_than_readers(data):
    check_readers(replace(data.config, workers=0), world_size=5)
    check_readers(replace(data.config, workers=5), world_size=1)
    with pytest.raises(UserError, match=r"5 shards for 6 readers \(3 ranks x 2 workers\).*min-shards"):
        check_readers(replace(data.config, workers=2), world_size=3)
