"""Damaged utterances: fatal, or replaced, counted and said, without moving any other segment."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.data.loader import TrainingData, batches
from mvat_dist.data.mixing.dataset import BadSampleLimit, BadSampleLog
from mvat_dist.data.shards.format import ShardError
from tests.tiny_corpus import write_pairs, write_sources
from tests.training_corpus import UTTERANCES, pairs, same, sources, taken, tone, write_corpus


def flip(shard: Path, member: str) -> None:
    """Turn one bit of a member's content."""
    content = bytearray(shard.read_bytes())
    content[content.index(member.encode()) + 512 + 300] ^= 1
    shard.write_bytes(content)


def shard_of(folder: Path, member: str) -> Path:
    return next(shard for shard in sorted(folder.glob("*.tar")) if member.encode() in shard.read_bytes())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("whole") / "corpus")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """The same corpus with a flipped bit in s003, a lost end of a shard, and a broken room."""
    corpus = write_corpus(tmp_path_factory.mktemp("damaged") / "corpus")
    flip(shard_of(corpus / "train_clean", "s003.flac"), "s003.flac")
    last = sorted((corpus / "train_clean").glob("*.tar"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: content.index(b"s028.flac") + 600])
    flip(shard_of(corpus / "train_rir", "r1.flac"), "r1.flac")
    return corpus


@pytest.mark.parametrize("variants", [0, 2])
def test_what_is_not_damaged_stays_as_it_was(whole, damaged, variants):
    config = sources(whole, variants=variants, reverb_probability=0.2)
    expected = TrainingData(config, seed=1)
    data = TrainingData(replace(config, train=str(damaged), on_bad_sample="skip"), seed=1)
    replaced = set()
    for epoch in range(3):
        for position in range(UTTERANCES):
            before, after = expected.item(epoch, position), data.item(epoch, position)
            used = {part["key"] for part in before.recipe["speech"]} | {before.recipe["rir"]}
            if used.isdisjoint({"s003", "s028", "r1"}):
                assert same(before, after)
                continue
            assert after.recipe["bad_samples"]
            assert all(str(damaged) in line and "key " in line for line in after.recipe["bad_samples"])
            spared = {part["key"] for part in after.recipe["speech"]} | {after.recipe["rir"]}
            assert spared.isdisjoint({"s003", "s028", "r1"})
            assert np.isfinite(after.noisy).all()
            replaced.add((epoch, position))
    assert 6 <= len(replaced) < 60
    # Substitutes are drawn: not the same one for all.
    assert len({data.item(*place).recipe["speech"][0]["key"] for place in replaced}) > len(replaced) / 3


def test_substitutes_are_the_same_on_any_topology(damaged):
    data = TrainingData(sources(damaged, on_bad_sample="skip"), seed=3)
    alone = taken(data, world_size=1, first_step=0, steps=2)
    assert sum(bool(recipe["bad_samples"]) for step in alone for _, _, recipe in step) >= 2
    assert taken(data, world_size=4, first_step=0, steps=2) == alone
    assert taken(data, world_size=2, workers=2, first_step=0, steps=1) == alone[:1]


def test_damage_is_fatal_unless_told_otherwise(damaged):
    data = TrainingData(sources(damaged), seed=1)
    with pytest.raises(ShardError, match=r"audio-\d+\.tar, key "):
        [data.item(0, position) for position in range(UTTERANCES)]


def test_a_corpus_that_is_damaged_throughout_ends(tmp_path):
    random = np.random.default_rng(0)
    folder = write_pairs(tmp_path, "train_pairs", {f"k{n}": (tone(random, 9000),) * 2 for n in range(4)})
    for n in range(4):
        flip(folder / "audio-000000.tar", f"k{n}.noisy.flac")
    data = TrainingData(pairs(tmp_path, on_bad_sample="skip"), seed=0)
    with pytest.raises(ShardError, match=r"9 segments in a row.*key k\d"):
        data.item(0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_says_and_counts_it(damaged, caplog, workers):
    data = TrainingData(sources(damaged, on_bad_sample="skip", reverb_probability=0.0), seed=1)
    with caplog.at_level(logging.WARNING):
        steps = list(
            batches(
                data, batch=29, micro_batch=29, rank=0, world_size=1, first_step=0, steps=3, workers=workers
            )
        )
    assert all(batch.replaced >= 2 for (batch,) in steps)
    # Three epochs, two damaged utterances: each is named once.
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert {key for key in ("key s003", "key s028") if any(key in line for line in said)} == {
        "key s003",
        "key s028",
    }


def test_many_are_named_ever_more_rarely(caplog):
    log = BadSampleLog()
    with caplog.at_level(logging.WARNING):
        log.warn(f"shard, key {n}" for n in range(1000))
        log.warn(f"shard, key {n}" for n in range(1000))
    counts = [record.args[0] for record in caplog.records]
    assert counts == [*range(1, 11), 20, 40, 80, 160, 320, 640]


def test_the_budget_is_a_share_of_an_epoch_or_of_all():
    budget = BadSampleLimit(0.001, epoch=5000)
    budget.count(5, 32)
    assert budget.refusal() is None
    budget.count(1, 32)
    assert "6 of 64 segments" in budget.refusal()
    later = BadSampleLimit(0.001, epoch=5000)
    later.count(6, 6000)
    assert later.refusal() is None
    small = BadSampleLimit(0.001, epoch=10)
    small.count(1, 4)
    assert small.refusal() is None
    small.count(1, 4)
    assert small.refusal() is not None


RUN = (
    "--sizes={tiny: {kind: small, hidden: 4, depth: 2}}", "--student=tiny", "--distil.method=none",
    "--data.reverb_probability=0", "--data.tempo_probability=0", "--data.segment_seconds=0.25",
    "--data.workers=1", "--train.batch=8", "--train.micro_batch=4", "--train.steps=2", "--valid.clips=1",
    "--valid.best=si_sdr", "--track.every=1", "--data.on_bad_sample=skip",
)  # fmt: skip


@pytest.fixture(scope="module")
def trainable(tmp_path_factory) -> Path:
    """Eight utterances, one of them damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "with space"
    random = np.random.default_rng(0)
    write_sources(folder, "train_clean", {f"c{n}": tone(random, 9000) for n in range(8)}, shards=4)
    write_sources(folder, "train_noise", {"n0": 0.1 * random.standard_normal(9000)})
    clean = tone(random, 9000)
    write_pairs(folder, "valid", {"v0": (clean + 0.03 * random.standard_normal(9000), clean)})
    flip(shard_of(folder / "train_clean", "c5.flac"), "c5.flac")
    return folder


def train(corpus: Path, runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks."""
    command = [sys.executable, "-m", "mvat_dist.submit", "--cluster=local", "--nodes=2", *RUN, *arguments]
    return subprocess.run(
        [*command, f"--data.train={corpus}", f"--runs={runs}", "--name=run"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_run_counts_damage_over_its_ranks_and_ends_together(trainable, tmp_path):
    """An epoch is a step here: the damaged utterance comes once in each, on either rank."""
    borne = train(trainable, tmp_path / "borne", "--data.max_bad_samples=0.2")
    assert borne.returncode == 0, borne.stderr[-3000:]
    history = tmp_path / "borne" / "run" / "students" / "tiny" / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["bad_samples"] for row in rows if "loss" in row] == [1, 2]
    refused = train(trainable, tmp_path / "refused")
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert "2 of 16 segments met damaged data" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_one_rank_cannot_read_ends_all_with_its_words(trainable, tmp_path):
    """Both end at once, and neither by way of a connection that the other has broken."""
    ended = train(trainable, tmp_path, "--data.on_bad_sample=fatal")
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert ended.stderr.count("key c5") == 1
    assert "Traceback" not in ended.stderr
    status = json.loads((tmp_path / "run" / "STATUS").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert "key c5" in status["reason"]
    others = [log.read_text() for log in (tmp_path / "run" / "logs").glob("rank-*.log")]
    assert others
    assert not any("Traceback" in log for log in others)
