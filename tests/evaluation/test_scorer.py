"""Scores from worker processes: equal to those computed here, and robust against workers that die or hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.data import pool
from mvat_dist.data.pool import ProcessPool
from mvat_dist.evaluation import scorer
from mvat_dist.evaluation.metrics.registry import METRICS, Audio, Score
from mvat_dist.evaluation.scorer import Pair, end_workers, score_pairs
from tests.signals import bursts, noise_at, syllables
from tests.waiting import until

CLEAN = syllables(1.5)
PAIRS = [Pair(CLEAN + noise_at(CLEAN, snr), CLEAN) for snr in (0, 5, 10, 15, 20)]
CROWDED = Pair(bursts(60, 60.0), bursts(60, 60.0))
"""More utterances than the PESQ code has room for: handed to it, they end the process."""
FAST = ["si_sdr", "stoi"]
HARMFUL = Pair(CLEAN + 0.5, CLEAN)
"""The pair at which a metric of `harmful_stoi` harms its worker."""


def own_children() -> set[int]:
    """Process ids of this process's children."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in listed.split()}


def failures(scores: list[dict[str, Score]]) -> list[str]:
    return [score.failure for by_metric in scores for score in by_metric.values() if score.failure]


@pytest.fixture
def workers() -> Iterator[Callable[[], set[int]]]:
    """Tells the children that were started since the test began; other tests may have left some of theirs."""
    end_workers()
    resource_tracker.ensure_running()  # a child too
    earlier = own_children()
    yield lambda: own_children() - earlier
    end_workers()


def harmful_stoi(sent: signal.Signals, times: int, folder: Path) -> None:
    """In a worker: let STOI of `HARMFUL` send its process a signal, so often; `folder` counts."""
    honest = METRICS["stoi"]
    honest.compute(CLEAN, CLEAN)  # importing its package is no part of a limit of seconds

    def compute(estimate: Audio, clean: Audio) -> Score:
        if np.array_equal(estimate, HARMFUL.estimate.astype(np.float32)):
            sent_before = len(list(folder.iterdir()))
            if sent_before < times:
                (folder / f"{sent_before}").touch()
                os.kill(os.getpid(), sent)
        return honest.compute(estimate, clean)

    METRICS["stoi"] = replace(honest, compute=compute)


@pytest.fixture
def harm(workers, tmp_path, monkeypatch) -> Callable[[signal.Signals, int], None]:
    """Makes the workers those of `harmful_stoi`."""
    assert workers() == set()

    def begin(sent: signal.Signals, times: int) -> None:
        harmful = partial(ProcessPool, initialiser=harmful_stoi, arguments=(sent, times, tmp_path))
        monkeypatch.setattr(scorer, "ProcessPool", harmful)

    return begin


@pytest.mark.usefixtures("workers")
def test_scores_are_those_computed_here_in_the_order_of_the_pairs():
    names = [name for name in METRICS if not name.startswith("dnsmos")]
    expected = [{name: METRICS[name].compute(pair.estimate, pair.clean) for name in names} for pair in PAIRS]
    ticks: list[int] = []
    scores = score_pairs(PAIRS, names, processes=2, progress=ticks.append)
    assert [list(pair_scores) for pair_scores in scores] == [names] * len(PAIRS)
    for computed, wanted in zip(scores, expected, strict=True):
        # ESTOI adds noise of 1e-16 to its spectra.
        assert {n: s.value for n, s in computed.items()} == pytest.approx(
            {n: s.value for n, s in wanted.items()}
        )
    assert ticks == [1] * len(PAIRS)


def test_workers_are_kept_for_the_next_pairs_as_many_as_asked_for(workers):
    first = score_pairs(PAIRS, FAST, processes=2)
    kept = workers()
    assert len(kept) == 2
    assert score_pairs(PAIRS, FAST, processes=2) == first
    assert workers() == kept
    assert score_pairs(PAIRS, FAST, processes=1) == first
    assert len(workers()) == 1
    end_workers()
    assert workers() == set()


def test_failures_come_back_with_their_reasons():
    pairs = [Pair(CLEAN * 0, CLEAN), Pair(CLEAN[:100], CLEAN[:100]), Pair(CLEAN[:50], CLEAN), CROWDED]
    scores = score_pairs(pairs, ["pesq_wb"], processes=1)
    reasons = [
        "silent estimate",
        "shorter than 0.25 s",
        f"shapes differ: estimate (50,), reference ({CLEAN.size},)",
        "longer than 19 s",
    ]
    assert [pair_scores["pesq_wb"] for pair_scores in scores] == [Score(None, reason) for reason in reasons]


@pytest.mark.parametrize("sent", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_costs_one_score_of_one_pair(sent, harm):
    harm(sent, 2)
    scores = score_pairs([HARMFUL, *PAIRS], ["stoi", "si_sdr"], processes=1)
    assert scores[0]["stoi"] == Score(None, f"worker died ({sent.name})")
    assert [*scores[0]] == ["stoi", "si_sdr"]
    assert scores[0]["si_sdr"].failure is None
    assert len(scores) == 1 + len(PAIRS)
    assert failures(scores[1:]) == []


def test_a_hang_costs_one_score_of_one_pair(harm):
    harm(signal.SIGSTOP, 2)
    scores = score_pairs([HARMFUL, *PAIRS], FAST, processes=1, seconds_limit=3.0)
    assert scores[0]["stoi"] == Score(None, "took more than 3 s")
    assert scores[0]["si_sdr"].failure is None
    assert failures(scores[1:]) == []


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_what_is_killed_or_suspended_is_tried_once_more(sent, harm):
    """There may be memory for it then, and a job that was suspended has its time again."""
    harm(sent, 1)
    scores = score_pairs([HARMFUL, *PAIRS], FAST, processes=1, seconds_limit=3.0)
    assert scores == score_pairs([HARMFUL, *PAIRS], FAST, processes=1)
    assert failures(scores) == []


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_is_suspended_idle_costs_nothing(sent, workers, monkeypatch):
    """A pipe does not hold a clip: sending one must not wait for a suspended worker for ever."""
    monkeypatch.setattr(pool, "_STALL_SECONDS", 5.0)
    scored = threading.Event()

    def pairs() -> Iterator[Pair]:
        yield PAIRS[0]
        assert scored.wait(60), "the pair was not scored"
        (worker,) = workers()
        os.kill(worker, sent)
        yield CROWDED
        yield PAIRS[1]

    scores = score_pairs(pairs(), FAST, processes=1, progress=lambda _: scored.set())
    assert scores == score_pairs([PAIRS[0], CROWDED, PAIRS[1]], FAST, processes=1)
    assert failures(scores) == []


@pytest.mark.parametrize("to_job", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_slurm_and_of_the_terminal_do_not_reach_the_workers(to_job, workers):
    def pairs() -> Iterator[Pair]:
        yield PAIRS[0]
        until(lambda: len(workers()) == 2, 20, "no worker was started for the first pair")
        # Of another process: what this one sends ends them.
        subprocess.run(["kill", f"-{to_job:d}", *map(str, workers())], check=True)
        yield from PAIRS[1:]

    scores = score_pairs(pairs(), FAST, processes=2)
    assert failures(scores) == []
    assert len(workers()) == 2


def test_an_error_of_the_caller_ends_the_workers(workers):
    def broken():
        yield PAIRS[0]
        raise LookupError("the clip is gone")

    with pytest.raises(LookupError, match="the clip is gone"):
        score_pairs(broken(), FAST, processes=2)
    assert workers() == set()


def test_pairs_are_taken_as_the_workers_get_free():
    taken = 0
    lead: list[int] = []

    def counting():
        nonlocal taken
        for pair in PAIRS * 4:
            taken += 1
            yield pair

    finished: list[int] = []

    def progress(count: int) -> None:
        finished.append(count)
        lead.append(taken - len(finished))

    score_pairs(counting(), ["si_sdr"], processes=2, progress=progress)
    assert len(finished) == 20
    assert max(lead) <= 5  # one at work and one waiting for each worker, and the next one


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


def score_and_return(pairs: list[Pair]) -> None:
    """Keeps its worker."""
    score_pairs(pairs, ["si_sdr"], processes=1)


def test_a_process_of_multiprocessing_ends_though_it_keeps_workers():
    """It runs no exit handlers, and joins its children."""
    process = multiprocessing.get_context("spawn").Process(target=score_and_return, args=(PAIRS[:1],))
    process.start()
    process.join(120)
    exit_code = process.exitcode
    process.kill()
    assert exit_code == 0
