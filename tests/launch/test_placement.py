"""Students trained apart come out as those trained together, and each part is a run of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mvat_dist.submit
from mvat_dist.config.schema import Config
from mvat_dist.config.sizes import STUDENTS
from mvat_dist.distributed import ranks
from mvat_dist.distributed.ranks import Ranks
from mvat_dist.errors import UserError
from mvat_dist.launch import placement
from mvat_dist.launch.placement import Part
from mvat_dist.models import weights
from mvat_dist.runs import weights as weightsfile
from tests.commands.test_train import COMMON, environment, history, losses, same_weights, succeed, train
from tests.commands.test_train import corpus as corpus
from tests.waiting import until

BOTH = ("--student=tiny,mini", "--distil.method=none")


def submit(corpus: Path, runs: Path, name: str, *arguments: str) -> None:
    succeed(submit_command(corpus, runs, name, *arguments))


def submit_command(corpus: Path, runs: Path, name: str, *arguments: str) -> list[str]:
    given = [f"--data.train={corpus}", f"--runs={runs}", f"--name={name}", *COMMON, *BOTH, *arguments]
    return [sys.executable, "-m", "mvat_dist.submit", "--cluster=local", *given]


def status(run: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "mvat_dist.status", str(run), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("my runs")


@pytest.fixture(scope="module")
def together(corpus: Path, runs: Path) -> Path:
    """Both students in one process."""
    return train(corpus, runs, "together", *BOTH)


@pytest.fixture(scope="module")
def split(corpus: Path, runs: Path) -> Path:
    """Two processes for one student and one for the other; after a stop one more start ends it."""
    arguments = ("--nodes=3", "--parts=tiny:2/mini:1")
    command = submit_command(corpus, runs, "split", *arguments)
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        saved = [runs / "split" / "parts" / name / "checkpoints" for name in ("tiny", "mini")]
        until(lambda: all(any(folder.glob("step-*")) for folder in saved) or process.poll() is not None, 120)
        process.send_signal(signal.SIGTERM)
    assert process.returncode in {0, 128 + signal.SIGTERM}
    submit(corpus, runs, "split", *arguments)
    return runs / "split"


def test_split_gives_the_same_students(together: Path, split: Path) -> None:
    """Bit for bit on as many ranks as together; on more to rounding. A stop between changes nothing."""
    assert history(split / "parts" / "mini", "mini") == history(together, "mini")
    assert same_weights(split / "parts" / "mini", together, "mini")
    np.testing.assert_allclose(losses(split / "parts" / "tiny", "tiny"), losses(together, "tiny"), rtol=1e-4)


def test_jobs_give_the_same_students_bit_for_bit(corpus: Path, runs: Path, together: Path) -> None:
    submit(corpus, runs, "jobs", "--placement=jobs")
    for student in ("tiny", "mini"):
        assert history(runs / "jobs" / "parts" / student, student) == history(together, student)
        assert same_weights(runs / "jobs" / "parts" / student, together, student)


def test_the_commands_see_one_run(split: Path) -> None:
    reports = status(split)
    assert [one["run"] for one in reports] == ["split/parts/mini", "split/parts/tiny"]
    assert [(one["state"], one["step"]) for one in reports] == [("finished", 6)] * 2
    assert all(one["starts"] for one in reports)
    files = weightsfile.students_of(split)  # what evaluate, report and enhance ask
    assert {name: weights.load(file).name for name, file in files.items()} == {
        "mini": "mini",
        "tiny": "tiny",
    }


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("split", ["--placement=together"], "trains its students apart (mini/tiny)"),
        ("split", ["--placement=split", "--nodes=1", "--parts=tiny,mini"], "trains its students apart"),
        ("together", ["--placement=jobs"], "trains its students together"),
        ("new", ["--parts=tiny"], "must name every student"),
        ("new", ["--parts=tiny/mini/tiny"], "must name every student"),
        ("new", ["--parts=tiny:1/mini"], "give every group its processes"),
        ("new", ["--parts=tiny:3/mini:1", "--nodes=3"], "4 processes, and there are 3"),
        ("new", ["--parts=tiny/mini", "--nodes=3"], "not shared equally by 2 groups"),
        ("new", ["--parts=tiny:3/mini:1", "--nodes=4"], "cannot be shared by 3 processes"),
    ],
)
@pytest.mark.usefixtures("together", "split")
def test_mistakes(corpus: Path, runs: Path, name: str, arguments: list[str], words: str) -> None:
    before = sorted(runs.rglob("*"))
    with pytest.raises(UserError, match=re.escape(words)):
        mvat_dist.submit.main(submit_command(corpus, runs, name, *arguments)[3:])
    assert sorted(runs.rglob("*")) == before


groups_of = st.permutations(STUDENTS).flatmap(
    lambda names: st.lists(st.integers(1, len(names) - 1), unique=True, max_size=4).map(
        lambda cuts: [
            tuple(names[first:last])
            for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), None], strict=True)
        ]
    )
)


@settings(max_examples=25)
@given(groups=groups_of, data=st.data())
def test_the_world_is_dealt_without_remainder(groups: list[tuple[str, ...]], data: st.DataObject) -> None:
    """Every rank gets one place; each part is a whole world with an address and a port of its own."""
    per_node = data.draw(st.integers(1, 4))
    counts = [data.draw(st.integers(1, 5)) for _ in groups]
    nodes = -(-sum(counts) // per_node)
    counts[-1] += nodes * per_node - sum(counts)
    parts = [Part(group, count) for group, count in zip(groups, counts, strict=True)]
    config = Config(runs="/nowhere", parts=placement.in_words(parts))
    assert placement.parse(config) == parts
    hosts = {"SLURM_STEP_NODELIST": f"10.0.0.[1-{nodes}]", "PATH": "/nothing"}
    world: dict[str, list[Ranks]] = {}
    for rank in range(nodes * per_node):
        here = Ranks(
            rank,
            nodes * per_node,
            rank % per_node,
            per_node,
            rank // per_node,
            nodes,
            "10.0.0.1",
            12_000,
            "slurm",
        )
        mine, place = placement.mine(config, here, hosts)
        assert (place.local_rank, place.launcher) == (here.local_rank, "slurm")  # the GPU stays its own
        assert mine == replace(
            config,
            student=mine.student,
            runs="/nowhere/" + runs_name(config) + "/parts",
            name=mine.name,
            parts="",
        )
        world.setdefault(mine.student, []).append(place)
    assert [tuple(student.split(",")) for student in world] == groups
    first = 0
    for places, count in zip(world.values(), counts, strict=True):
        assert [place.rank for place in places] == list(range(count))
        assert {place.world_size for place in places} == {count}
        spread = {(first + rank) // per_node for rank in range(count)}
        assert {place.nodes for place in places} == {len(spread)}
        host = "127.0.0.1" if len(spread) == 1 else f"10.0.0.{first // per_node + 1}"
        assert {place.master_address for place in places} == {host}
        first += count
    ports = [places[0].master_port for places in world.values() if len(places) > 1]
    assert len(set(ports)) == len(ports)


def runs_name(config: Config) -> str:
    from mvat_dist.runs.folder import run_name

    return run_name(config)


def test_only_slurm_tells_the_names_of_other_nodes() -> None:
    here = Ranks(3, 4, 1, 2, 1, 2, "node1", 29_500, "torchrun")
    with pytest.raises(UserError, match="needs srun"):
        ranks.part(here, 1, 3, 1, os.environ)
