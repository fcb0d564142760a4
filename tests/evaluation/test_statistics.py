"""Means, paired comparisons and SNR buckets of rows of scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mvat_dist.evaluation.metrics.registry import METRICS
from mvat_dist.evaluation.statistics import by_snr, compare, paired


def compared(first: np.ndarray, second: np.ndarray):
    rows = [
        {"index": index, "model": name, "stoi": float(value)}
        for name, values in (("a", first), ("b", second))
        for index, value in enumerate(values)
    ]
    return compare(rows, "b", "a", "stoi")


def test_a_paired_comparison_sees_what_unpaired_intervals_hide():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 1, 60)  # clips differ far more than models do
    found = compared(hard, hard + generator.normal(0.05, 0.1, 60))
    assert found.verdict == "better"
    assert found.mean == pytest.approx(0.05, abs=0.03)
    assert compared(hard + 1, hard).verdict == "worse"
    assert compared(hard, hard).verdict == "no clear difference"
    assert compared(hard[:3], hard[:3] + 1).verdict == "no clear difference"  # three clips prove nothing
    assert compared(hard, hard).p == 1


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_the_p_value_is_about_that_of_students_t_test(shift):
    generator = np.random.default_rng(4)
    first, second = generator.normal(0, 1, 40), generator.normal(shift, 1, 40)
    assert compared(first, second).p == pytest.approx(stats.ttest_rel(second, first).pvalue, abs=0.03)


@pytest.mark.filterwarnings("error")
def test_few_clips_and_constant_differences_are_not_overrated():
    # Of 2^n signs, all equal differences are as large in two cases.
    for clips in (1, 2, 3, 6, 10):
        found = paired([0.5] * clips)
        assert found.p == pytest.approx(min(1.0, 2 / 2**clips))
        assert (found.low, found.high) == ((None, None) if clips == 1 else (0.5, 0.5))
        assert found.verdict == ("better" if clips >= 6 else "no clear difference")
    assert paired([0.0] * 50).p == 1
    assert paired([]).mean is None


def test_equal_differences_give_equal_results():
    values = np.random.default_rng(5).normal(0.1, 1, 700).tolist()
    assert paired(values) == paired(values)


def test_comparisons_leave_out_clips_that_one_has_no_score_for():
    rows = [
        {"index": 0, "model": "a", "stoi": 0.5}, {"index": 0, "model": "b", "stoi": 0.75},
        {"index": 1, "model": "a", "stoi": 0.5}, {"index": 1, "model": "b", "stoi": None},
    ]  # fmt: skip
    found = compare(rows, "b", "a", "stoi")
    assert (found.mean, found.clips) == (0.25, 1)
    assert compare(rows[3:], "b", "a", "stoi").mean is None


def test_buckets_hold_their_lower_end_and_leave_out_what_has_no_snr():
    rows = [{"snr_db": snr} for snr in (-0.0, 5.0, -0.01, 4.99, None, 12.0, -7.0)]
    assert {name: [row["snr_db"] for row in its] for name, its in by_snr(rows).items()} == {
        "-10..-5 dB": [-7.0], "-5..0 dB": [-0.01], "0..5 dB": [-0.0, 4.99], "5..10 dB": [5.0],
        "10..15 dB": [12.0],
    }  # fmt: skip


def test_every_metric_has_a_label_of_its_own():
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)
