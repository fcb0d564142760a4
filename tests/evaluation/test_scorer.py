"""Scores from child processes: equal to those computed here, and robust against children that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from mvat_dist.evaluation import scorer
from mvat_dist.evaluation.metrics.registry import METRICS, Score
from mvat_dist.evaluation.scorer import Pair, score_pairs
from tests.signals import bursts, noise_at, syllables
from tests.waiting import until

CLEAN = syllables(1.5)
PAIRS = [Pair(CLEAN + noise_at(CLEAN, snr), CLEAN) for snr in (0, 5, 10, 15, 20)]
CROWDED = Pair(bursts(60, 60.0), bursts(60, 60.0))
"""More utterances than the PESQ code has room for: handed to it, they end the process."""
FAST = ["si_sdr", "stoi"]


def own_children() -> set[int]:
    """Process ids of this process's children."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in listed.split()}


@pytest.fixture
def scorers() -> Callable[[], set[int]]:
    """Tells the children that were started since the test began; other tests may have left some of theirs."""
    before = own_children()
    return lambda: own_children() - before


def test_scores_are_those_computed_here_in_the_order_of_the_pairs(scorers):
    names = [name for name in METRICS if not name.startswith("dnsmos")]
    expected = [{name: METRICS[name].compute(pair.estimate, pair.clean) for name in names} for pair in PAIRS]
    ticks: list[int] = []
    scores = score_pairs(PAIRS, names, processes=2, progress=ticks.append)
    assert [list(one) for one in scores] == [names] * len(PAIRS)
    for found, wanted in zip(scores, expected, strict=True):
        # ESTOI adds noise of 1e-16 to its spectra.
        assert {n: s.value for n, s in found.items()} == pytest.approx(
            {n: s.value for n, s in wanted.items()}
        )
    assert ticks == [1] * len(PAIRS)
    assert scorers() == set()


def test_failures_come_back_with_their_reasons():
    pairs = [Pair(CLEAN * 0, CLEAN), Pair(CLEAN[:100], CLEAN[:100]), Pair(CLEAN[:50], CLEAN), CROWDED]
    scores = score_pairs(pairs, ["pesq_wb"], processes=1)
    reasons = [
        "silent estimate",
        "shorter than 0.25 s",
        f"shapes differ: estimate (50,), reference ({CLEAN.size},)",
        "longer than 19 s",
    ]
    assert [one["pesq_wb"] for one in scores] == [Score(None, reason) for reason in reasons]


def signalling(
    pairs: list[Pair], sent: signal.Signals, scorers: Callable[[], set[int]], times: int = 1
) -> Iterator[Pair]:
    """The pairs; while the first one is scored, the child, or one after the other, gets a signal."""
    yield pairs[0]
    before: set[int] = set()
    for _ in range(times):
        until(lambda: bool(scorers() - before), 20, "no child was started for the first pair")
        (child,) = scorers() - before
        os.kill(child, sent)
        before.add(child)
    yield from pairs[1:]


@pytest.mark.parametrize(("kill", "times"), [(signal.SIGSEGV, 1), (signal.SIGKILL, 2)])
def test_a_crash_costs_one_score_of_one_pair(kill, times, scorers):
    long = syllables(15.0)
    killing = signalling([Pair(long, long), *PAIRS], kill, scorers, times)
    scores = score_pairs(killing, ["pesq_wb", "si_sdr"], processes=1)
    assert scores[0] == {"pesq_wb": Score(None, f"scorer died ({kill.name})"), "si_sdr": Score(100.0)}
    assert len(scores) == 1 + len(PAIRS)
    assert all(score.failure is None for one in scores[1:] for score in one.values())


def test_what_a_kill_interrupts_is_tried_once_more(scorers):
    """There may be memory for it then."""
    long = Pair(syllables(15.0), syllables(15.0))
    scores = score_pairs(signalling([long, *PAIRS], signal.SIGKILL, scorers), ["pesq_wb"], processes=1)
    assert scores == score_pairs([long, *PAIRS], ["pesq_wb"], processes=1)


def test_a_suspended_job_loses_no_score(monkeypatch):
    """As by Ctrl-Z or `scontrol suspend`: the time in which nobody could run counts for nobody."""
    away: list[float] = []

    def away_once(sources: list, patience: float | None) -> list:
        """What a wait is that the job was stopped in: late, and ended by its time."""
        if patience is None or away:
            return wait(sources, patience)
        away.append(patience + 2.0)
        return []

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(away))
    monkeypatch.setattr(scorer, "wait", away_once)
    monkeypatch.setattr(scorer, "time", clock)
    assert score_pairs(PAIRS[:1], FAST, processes=1, seconds_limit=60.0) == score_pairs(
        PAIRS[:1], FAST, processes=1
    )
    assert away


def test_a_child_that_dies_idle_costs_nothing(scorers):
    scored = threading.Event()

    def killing() -> Iterator[Pair]:
        for pair in PAIRS[:3]:
            yield pair
            assert scored.wait(60), "the pair was not scored"
            scored.clear()
            (child,) = scorers()
            os.kill(child, signal.SIGKILL)

    expected = score_pairs(PAIRS[:3], FAST, processes=1)
    assert score_pairs(killing(), FAST, processes=1, progress=lambda _: scored.set()) == expected
    assert all(score.failure is None for one in expected for score in one.values())


def test_a_child_that_hangs_is_ended(scorers):
    names = ["si_sdr", "pesq_wb"]
    scores = score_pairs(signalling(PAIRS, signal.SIGSTOP, scorers), names, processes=1, seconds_limit=3.0)
    assert scores[0]["si_sdr"] == Score(None, "took more than 3 s")
    assert scores[0]["pesq_wb"].failure is None
    assert all(score.failure is None for one in scores[1:] for score in one.values())


def test_a_child_that_is_suspended_idle_is_ended(scorers):
    """Its pipe does not hold a clip: sending one must not wait for it for ever."""
    scored = threading.Event()

    def suspending() -> Iterator[Pair]:
        yield PAIRS[0]
        assert scored.wait(60), "the pair was not scored"
        (child,) = scorers()
        os.kill(child, signal.SIGSTOP)
        yield CROWDED

    pairs = suspending()
    scores = score_pairs(pairs, ["si_sdr"], processes=1, seconds_limit=3.0, progress=lambda _: scored.set())
    assert scores == score_pairs([PAIRS[0], CROWDED], ["si_sdr"], processes=1)


@pytest.mark.parametrize("to_job", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_slurm_and_of_the_terminal_do_not_reach_the_children(to_job, scorers):
    scores = score_pairs(signalling(PAIRS, to_job, scorers), FAST, processes=2)
    assert all(score.failure is None for one in scores for score in one.values())


def test_an_error_of_the_caller_ends_the_children(scorers):
    def broken():
        yield PAIRS[0]
        raise LookupError("the clip is gone")

    with pytest.raises(LookupError, match="the clip is gone"):
        score_pairs(broken(), FAST, processes=2)
    assert scorers() == set()


def test_children_that_cannot_start_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not start"):
        score_pairs(PAIRS, FAST, processes=1)


def test_pairs_are_taken_as_the_children_get_free():
    taken = 0
    lead = []

    def counting():
        nonlocal taken
        for pair in PAIRS * 4:
            taken += 1
            yield pair

    finished = []

    def progress(count: int) -> None:
        finished.append(count)
        lead.append(taken - len(finished))

    score_pairs(counting(), ["si_sdr"], processes=2, progress=progress)
    assert len(finished) == 20
    assert max(lead) <= 4  # one at work and one waiting for each child


def test_scores_come_in_while_the_next_pair_is_computed():
    scored = threading.Event()

    def slow_network() -> Iterator[Pair]:
        yield PAIRS[0]
        assert scored.wait(60), "the first pair was not scored meanwhile"
        yield PAIRS[1]

    scores = score_pairs(slow_network(), FAST, processes=1, progress=lambda _: scored.set())
    assert len(scores) == 2


def test_works_from_a_script_without_a_main_guard_in_a_path_with_spaces(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    script = folder / "score.py"
    script.write_text(
        "import numpy as np\n"
        "from mvat_dist.evaluation.scorer import Pair, score_pairs\n"
        "x = np.random.default_rng(0).standard_normal(16000)\n"
        "print(score_pairs([Pair(x, x)], ['si_sdr'], processes=1))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "[{'si_sdr': Score(value=100.0, failure=None)}]"
    assert ran.stderr == ""
