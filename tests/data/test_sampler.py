"""The order of an epoch and the random numbers of an item."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.data.mixing.sampler import CounterRandom, epoch_permutation, random_bits

UTTERANCES, PER_SHARD = 20_000, 200

# Recorded when the code was written.
ORDER_00 = [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]
ORDER_12 = [5, 1, 6, 7, 3, 8, 2, 9, 0, 4]
INTEGERS = [296, 623, 852, 17]


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6), items=st.integers(1, 300))
def test_every_item_once_an_epoch(seed, epoch, items):
    assert sorted(epoch_permutation(seed, epoch, items).tolist()) == list(range(items))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_permutation(seed, epoch, UTTERANCES) for seed in range(3) for epoch in range(3)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            # Two independent permutations agree in one place on average (Poisson).
            assert (one == other).sum() < 8


def test_a_shard_is_spread_over_the_whole_epoch():
    order = epoch_permutation(7, 3, UTTERANCES)
    shard_at = order // PER_SHARD
    shards = UTTERANCES // PER_SHARD
    # Neighbours come from one shard as often as by chance: 200 times, standard deviation 14.
    assert abs((shard_at[1:] == shard_at[:-1]).sum() - UTTERANCES / shards) < 60
    # An item's distance from its place on disk: N/3 for a uniform permutation.
    assert np.abs(order - np.arange(UTTERANCES)).mean() == pytest.approx(UTTERANCES / 3, rel=0.02)
    # Each tenth of the epoch holds a tenth of every shard: 20, standard deviation 4.2.
    tenth = np.arange(UTTERANCES) // (UTTERANCES // 10)
    counts = np.zeros((shards, 10))
    np.add.at(counts, (shard_at, tenth), 1)
    assert counts.min() >= 3
    assert counts.max() <= 42
    chi_square = ((counts - 20) ** 2 / 20).sum()  # 99 x 9 degrees of freedom: 891, standard deviation 42
    assert 720 < chi_square < 1060


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_what_a_stretch_holds_of_a_shard_is_hypergeometric(share):
    """Samples drawn without replacement: mean n p, variance n p (1 - p) (N - n) / (N - 1)."""
    items, stretch, epochs = 2000, 200, 150
    in_shard = int(items * share)
    member = np.array([epoch_permutation(1, epoch, items) < in_shard for epoch in range(epochs)])
    counts = member.reshape(epochs, -1, stretch).sum(axis=2)
    variance = stretch * share * (1 - share) * (items - stretch) / (items - 1)
    # Within an epoch the stretches sum to the shard; their mean is exact, their spread is not.
    np.testing.assert_array_equal(counts.mean(axis=1), stretch * share)
    np.testing.assert_allclose(counts.mean(axis=0), stretch * share, atol=4 * np.sqrt(variance / epochs))
    assert counts.var() == pytest.approx(variance, rel=0.15)
    # Where in the epoch a shard's samples lie: uniform, standard deviation N / sqrt(12).
    assert np.nonzero(member)[1].std() == pytest.approx(items / np.sqrt(12), rel=0.05)


def test_the_order_is_that_of_the_runs_of_yesterday():
    """A change would move every resumed run onto other data."""
    assert epoch_permutation(0, 0, 10).tolist() == ORDER_00
    assert epoch_permutation(1, 2, 10).tolist() == ORDER_12
    draws = CounterRandom(1, 2, 3)
    assert [draws.integer(1000) for _ in range(4)] == INTEGERS


def test_families_share_no_stream():
    families = [random_bits(family, 1, 0) for family in ("permutation", "position", "variant", "room")]
    assert len({int(bits.random_raw()) for bits in families}) == 4


def test_draws_are_uniform_and_of_one_item_alone():
    first = np.array([CounterRandom(0, 0, position).fraction() for position in range(4000)])
    assert 0.0 <= first.min() < first.max() < 1.0
    assert first.mean() == pytest.approx(0.5, abs=0.02)
    assert first.var() == pytest.approx(1 / 12, rel=0.05)
    assert np.corrcoef(first[:-1], first[1:])[0, 1] == pytest.approx(0.0, abs=0.06)
    assert (
        len(
            {
                CounterRandom(*key).fraction()
                for key in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)]
            }
        )
        == 5
    )


def test_draws_keep_their_ranges():
    draws = CounterRandom(5, 0, 0)
    integers = [draws.integer(7) for _ in range(3000)]
    assert set(integers) == set(range(7))
    assert np.bincount(integers).min() > 340
    assert draws.integer(1) == 0
    assert all(-5 <= draws.uniform(-5, 20) <= 20 for _ in range(200))
    assert draws.uniform(3, 3) == 3
    assert not any(draws.chance(0.0) for _ in range(200))
    assert all(draws.chance(1.0) for _ in range(200))
    assert sum(draws.chance(0.3) for _ in range(3000)) == pytest.approx(900, abs=110)
