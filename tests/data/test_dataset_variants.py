"""A fixed number of segments, so that a cache can hold what the teacher makes of each of them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.data.loader import TrainingData, batches
from tests.training_corpus import PAIRS, SEGMENT, UTTERANCES, pairs, same, sources, taken, write_corpus

EVERYTHING = {
    "tempo_probability": 0.3,
    "activity_threshold": 0.3,
    "snr_kind": "active",
    "reverb_target": "early",
    "bandwidth_probability": 0.3,
    "codec_probability": 0.2,
    "codecs": "mu-law,gsm,vorbis",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tiny") / "packed corpus")


@pytest.mark.parametrize("config", [sources, pairs])
def test_every_segment_has_a_number_and_comes_once_in_so_many_epochs(corpus, config):
    random = {"remix_probability": 0.3, "tempo_probability": 0.3, "gain_db": (-6.0, 0.0)}
    data = TrainingData(config(corpus, variants=3, **random), seed=6)
    items = UTTERANCES if config is sources else PAIRS
    assert data.segments_per_corpus == 3 * items
    whole = {number: data.segment(number) for number in range(3 * items)}
    for first in (0, 30):
        seen = []
        for epoch in range(first, first + 3):
            for position in range(items):
                recipe = data.item(epoch, position).recipe
                assert recipe["segment"] == data.segment_number(epoch, position)
                assert recipe["segment"] // items == epoch % 3
                assert (recipe["epoch"], recipe["position"]) == (epoch, position)
                assert same_but_for_place(data.item(epoch, position), whole[recipe["segment"]])
                seen.append(recipe["segment"])
        assert sorted(seen) == list(range(3 * items))
    # The order is a new one in every epoch, the segments are not.
    assert data.segment_number(0, 0) != data.segment_number(3, 0)
    # A variant is another segment, and so is another seed's.
    assert len({segment.noisy.tobytes() for segment in whole.values()}) == len(whole)
    assert not same(TrainingData(data.config, seed=7).segment(0), whole[0])


def same_but_for_place(segment, other) -> bool:
    place = {"epoch", "position"}
    recipe = {name: value for name, value in segment.recipe.items() if name not in place}
    equal = np.array_equal(segment.noisy, other.noisy) and np.array_equal(segment.clean, other.clean)
    return equal and recipe == other.recipe


def test_a_plain_grid_has_its_numbers_by_itself(corpus):
    grid = pairs(corpus, stride_seconds=SEGMENT / 2)
    data = TrainingData(grid, seed=0)
    assert data.variants == 1
    assert data.segments_per_corpus == len(data) > PAIRS
    # Nothing is drawn: whatever the epoch, the seed or the variants asked for, item n is segment n.
    other = TrainingData(pairs(corpus, stride_seconds=SEGMENT / 2, variants=5), seed=9)
    assert other.segments_per_corpus == len(data)
    for number in range(len(data)):
        assert same(data.segment(number), other.segment(number))
    assert data.fingerprint() == other.fingerprint()
    drawn = [TrainingData(sources(corpus, variants=1), seed).fingerprint() for seed in (0, 9)]
    assert drawn[0] != drawn[1]
    for changes in ({"gain_db": (-3.0, 3.0)}, {"tempo_probability": 0.1}, {"codec_probability": 0.1}):
        assert (
            TrainingData(pairs(corpus, stride_seconds=SEGMENT / 2, **changes), 0).segments_per_corpus is None
        )


def test_new_segments_for_ever_have_no_numbers(corpus):
    data = TrainingData(sources(corpus), seed=0)
    assert data.variants == 0
    assert data.segments_per_corpus is None
    assert data.segment_number(0, 0) is None
    assert data.item(0, 0).recipe["segment"] is None
    with pytest.raises(IndexError):
        data.segment(0)
    with pytest.raises(IndexError):
        TrainingData(sources(corpus, variants=2), seed=0).segment(2 * UTTERANCES)


@pytest.mark.parametrize("variants", [0, 2])
def test_every_choice_is_the_same_in_any_process(corpus, variants):
    data = TrainingData(sources(corpus, variants=variants, **EVERYTHING), seed=5)
    alone = taken(data, world_size=1, first_step=0, steps=2)
    assert taken(data, world_size=2, workers=2, first_step=0, steps=2) == alone
    assert taken(copy.deepcopy(data), world_size=4, first_step=0, steps=2) == alone
    recipes = [recipe for step in alone for _, _, recipe in step]
    assert any(recipe["codec"] for recipe in recipes)
    assert any(recipe["bandwidth_hz"] for recipe in recipes)
    assert any(recipe["rir"] for recipe in recipes)


def test_the_batch_tells_the_numbers(corpus):
    data = TrainingData(sources(corpus, variants=2), seed=5)
    stream = batches(data, batch=8, micro_batch=4, rank=1, world_size=2, first_step=5, steps=1, workers=0)
    (batch,) = next(stream)
    numbers = [recipe["segment"] for recipe in batch.recipes]
    assert numbers == [data.segment_number(*divmod(5 * 8 + 4 + place, UTTERANCES)) for place in range(4)]
