"""Students that join, leave, return or fall ill: each learns what it would have learnt undisturbed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mvat_dist.training import checkpoint
from tests.commands.test_train import (
    command,
    corpus,  # noqa: F401 (a fixture)
    environment,
    history,
    same_weights,
    stopped_early,
    train,
    weights,
)

ALONE = ("--distil.method=none", "--train.save_every=2", "--train.keep=3", "--train.max_skipped=1")
BOTH, TINY, MINI = "--student=tiny,mini", "--student=tiny", "--student=mini"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, runs: Path) -> Path:  # noqa: F811
    return train(corpus, runs, "undisturbed", BOTH, *ALONE)


def assert_same(run: Path, undisturbed: Path, *students: str) -> None:
    status = json.loads((run / "STATUS").read_text())
    assert status["state"] == "finished"
    for student in students:
        assert status["students"][student]["steps"] == 6
        assert history(run, student) == history(undisturbed, student)
        assert same_weights(run, undisturbed, student)


def test_a_student_joins_a_finished_run(corpus: Path, runs: Path, undisturbed: Path) -> None:  # noqa: F811
    run = train(corpus, runs, "joined", TINY, *ALONE)
    before = (run / "students" / "tiny" / "history.jsonl").read_bytes()
    train(corpus, runs, "joined", BOTH, *ALONE)
    assert (run / "students" / "tiny" / "history.jsonl").read_bytes() == before
    assert_same(run, undisturbed, "tiny", "mini")


def test_one_leaves_and_returns(corpus: Path, runs: Path, undisturbed: Path) -> None:  # noqa: F811
    """Both make a step; one goes on alone to the end; the other comes back, and is stopped on its way."""
    assert stopped_early(command(corpus, runs, "stopped", [BOTH, *ALONE])) != 0
    run = train(corpus, runs, "stopped", TINY, *ALONE)
    assert stopped_early(command(corpus, runs, "stopped", [MINI, *ALONE])) != 0
    assert json.loads((run / "STATUS").read_text())["students"].keys() == {"mini"}
    train(corpus, runs, "stopped", BOTH, *ALONE)
    assert_same(run, undisturbed, "tiny", "mini")


def test_a_student_keeps_its_size(corpus: Path, runs: Path, undisturbed: Path) -> None:  # noqa: F811
    sizes = "--sizes={tiny: {kind: small, hidden: 5, depth: 2}, mini: {kind: base, hidden: 6, depth: 2}}"
    argv = command(corpus, runs, undisturbed.name, [BOTH, *ALONE, sizes])
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "another configuration" in done.stderr


def interrupted(undisturbed: Path, name: str) -> Path:
    """The undisturbed run as it would lie there if it had been killed after step 4."""
    run = undisturbed.parent / name
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "STATUS").unlink()
    return run


def ruin(run: Path, step: int, *, ill: bool) -> None:
    """Let the weights of `mini` run away in the checkpoint of `step`, which may know that it is ill."""
    path = run / "checkpoints" / f"step-{step:08d}"
    states = {name: state for name in ("tiny", "mini") if (state := checkpoint.load(path, name))}
    for value in states["mini"].weights.values():
        if value.is_floating_point():
            value.mul_(1e30)
    if ill:
        states["mini"].progress.skipped = states["mini"].progress.skipped_in_a_row = 1
    checkpoint.save(run / "checkpoints", step, states, keep=3)


def test_an_ill_student_goes_back_to_where_it_was_well(
    corpus: Path,  # noqa: F811
    runs: Path,
    undisturbed: Path,
) -> None:
    run = interrupted(undisturbed, "recovers")
    ruin(run, 4, ill=True)
    train(corpus, runs, "recovers", BOTH, *ALONE)
    assert_same(run, undisturbed, "tiny")
    mini = json.loads((run / "STATUS").read_text())["students"]["mini"]
    assert (mini["rollbacks"], mini["lr_factor"], mini["given_up"]) == (1, 0.5, False)
    assert (mini["skipped"], mini["skipped_in_a_row"]) == (2, 0)
    assert all(np.isfinite(value).all() for value in weights(run, "mini").values())
    rates = [[row["lr"] for row in history(one, "mini") if "lr" in row][-1] for one in (run, undisturbed)]
    assert rates[0] == rates[1] / 2


def test_a_hopeless_student_is_given_up_and_the_other_goes_on(
    corpus: Path,  # noqa: F811
    runs: Path,
    undisturbed: Path,
) -> None:
    run = interrupted(undisturbed, "hopeless")
    for step in (2, 4):
        ruin(run, step, ill=False)
    train(corpus, runs, "hopeless", BOTH, *ALONE)
    assert_same(run, undisturbed, "tiny")
    mini = json.loads((run / "STATUS").read_text())["students"]["mini"]
    assert (mini["rollbacks"], mini["given_up"], mini["skipped"]) == (1, True, 2)
