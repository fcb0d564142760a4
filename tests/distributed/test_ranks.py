"""Ranks are read rightly from environments recorded on a real Slurm 22.05, torchrun and deepspeed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.distributed import ranks
from mvat_dist.errors import UserError

RECORDED: dict[str, list[dict[str, str]]] = json.loads(
    (Path(__file__).parent.parent / "recordings" / "rank_environments.json").read_text()
)

Scontrol = Callable[[str], dict[str, str]]


@pytest.fixture
def scontrol(tmp_path: Path) -> Scontrol:
    """Puts a program of that shell text on a PATH of its own, where the real scontrol is not."""

    def install(script: str) -> dict[str, str]:
        program = tmp_path / "scontrol"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return {"PATH": f"{tmp_path}:/bin:/usr/bin"}

    return install


@pytest.fixture
def no_programs(tmp_path: Path) -> dict[str, str]:
    """As in most containers: Slurm's variables, but none of its programs."""
    return {"PATH": str(tmp_path / "nothing")}


def here(environment: dict[str, str]) -> dict[str, str]:
    """The recording with its nodes named so that they resolve on any machine."""
    return {**environment, "SLURM_STEP_NODELIST": "localhost"}


@pytest.mark.parametrize(
    "name",
    [
        "batch script of 4 nodes x 2 tasks",
        "batch script submitted from within a step",
        "salloc shell of 2 nodes",
        "interactive step of salloc",
    ],
)
def test_a_shell_of_slurm_without_srun_waits_for_nobody(name: str) -> None:
    found = ranks.read(RECORDED[name][0])
    assert (found.rank, found.world_size, found.nodes, found.master_address) == (0, 1, 1, "127.0.0.1")


def test_a_shell_that_inherits_a_larger_step_waits_for_nobody() -> None:
    parent, child = RECORDED["srun of 4 nodes x 2 tasks"][3], RECORDED["batch script of 4 nodes x 2 tasks"][0]
    child = {**parent, **child, "SLURM_NTASKS": "1"}
    assert ranks.read(child).world_size == 1


def test_no_variables_is_a_process_alone() -> None:
    found = ranks.read({})
    assert found == ranks.Ranks(0, 1, 0, 1, 0, 1, "127.0.0.1", found.master_port, "single")


def test_srun_numbers_tasks_over_nodes(no_programs: dict[str, str]) -> None:
    found = [ranks.read({**here(one), **no_programs}) for one in RECORDED["srun of 4 nodes x 2 tasks"]]
    assert [(r.rank, r.node_rank, r.local_rank) for r in found] == [(i, i // 2, i % 2) for i in range(8)]
    assert {(r.world_size, r.local_world_size, r.nodes, r.launcher) for r in found} == {(8, 2, 4, "slurm")}
    assert len({(r.master_address, r.master_port) for r in found}) == 1


def test_one_task_meets_itself(no_programs: dict[str, str]) -> None:
    found = ranks.read({**RECORDED["srun of one task"][0], **no_programs})
    assert (found.launcher, found.world_size, found.master_address) == ("slurm", 1, "127.0.0.1")


def test_uneven_tasks_are_refused_with_the_fix() -> None:
    for one in RECORDED["srun of 3 tasks on 2 nodes"]:
        with pytest.raises(UserError, match=r"3 tasks unevenly on 2 nodes \(2,1\).*--ntasks-per-node"):
            ranks.read(one)


def test_torchrun_and_deepspeed() -> None:
    first, second = (ranks.read(one) for one in RECORDED["torchrun of 2 processes"])
    assert (first.rank, second.rank, second.local_rank, second.launcher) == (0, 1, 1, "torchrun")
    expected = ranks.Ranks(1, 2, 1, 2, 0, 1, "127.0.0.1", 23457, "deepspeed")
    assert ranks.read(RECORDED["deepspeed launcher, second of 2 processes"][0]) == expected


def test_torchrun_inside_srun_goes_by_torchrun(no_programs: dict[str, str]) -> None:
    slurm, torchrun = RECORDED["srun of 4 nodes x 2 tasks"][4], RECORDED["torchrun of 2 processes"][1]
    found = ranks.read({**here(slurm), **torchrun, **no_programs})
    assert (found.launcher, found.rank, found.world_size) == ("torchrun", 1, 2)


def test_rank_variables_left_in_a_shell_are_refused(no_programs: dict[str, str]) -> None:
    left = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with pytest.raises(UserError, match="contradict Slurm, which says task 5 of 8: unset RANK"):
        ranks.read({**here(RECORDED["srun of 4 nodes x 2 tasks"][5]), **left, **no_programs})


@pytest.mark.parametrize("name", list(RECORDED))
def test_what_is_exported_reads_back(name: str, no_programs: dict[str, str]) -> None:
    for one in RECORDED[name]:
        if name == "srun of 3 tasks on 2 nodes":
            continue
        before = ranks.read({**here(one), **no_programs})
        alone: dict[str, str] = {}
        ranks.export(before, alone)
        after = ranks.read(alone)
        assert {**vars(after), "launcher": before.launcher} == vars(before)
        # A step that was exported into, as the trainer does, still reads the same.
        if before.launcher == "slurm":
            assert ranks.read({**here(one), **no_programs, **alone}) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "7"}, "rank 7 of 2"),
        ({"RANK": "one"}, "RANK='one' in the environment is not a number"),
        ({"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({"WORLD_SIZE": "3"}, "same number of processes on each node"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "WORLD_SIZE, MASTER_PORT is not"),
    ],
)
def test_broken_launcher_variables_are_one_clear_line(change: dict[str, str | None], words: str) -> None:
    environment = {**RECORDED["torchrun of 2 processes"][1], **change}
    with pytest.raises(UserError, match=words):
        ranks.read({key: value for key, value in environment.items() if value is not None})


def test_a_restart_meets_on_another_port(no_programs: dict[str, str]) -> None:
    again = {**here(RECORDED["srun of a requeued job, 2 nodes"][1]), **no_programs}
    before = {**again, "SLURM_RESTART_COUNT": "0"}
    assert ranks.read(again).master_port != ranks.read(before).master_port


@given(st.integers(1, 10**9), st.integers(0, 1000), st.integers(0, 50))
def test_ports_stay_below_the_ephemeral_range(job: int, step: int, restart: int) -> None:
    assert 10_000 <= ranks.job_port(str(job), str(step), str(restart)) <= 32_767


def test_neighbouring_jobs_rarely_share_a_port() -> None:
    ports = [ranks.job_port(str(job), "0", "0") for job in range(1000, 1100)]
    # Two of a hundred at random in 22768 meet with a chance of one in five; five would be a pattern.
    assert len(set(ports)) > 95


@pytest.mark.parametrize(
    ("node_list", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-4]", ["node1", "node2", "node3", "node4"]),
        ("node[1-2,7],gpu03", ["node1", "node2", "node7", "gpu03"]),
        ("gpu[008-011]", ["gpu008", "gpu009", "gpu010", "gpu011"]),
        ("rack[1-2]n[1-2]", ["rack1n1", "rack1n2", "rack2n1", "rack2n2"]),
        ("a[1-2].site.org,b.site.org", ["a1.site.org", "a2.site.org", "b.site.org"]),
    ],
)
def test_node_lists(node_list: str, hosts: list[str]) -> None:
    assert ranks.expand_hosts(node_list) == hosts


@pytest.mark.parametrize("node_list", ["", "node[1-", "node[a-b]", "node[]"])
def test_node_lists_that_cannot_be(node_list: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ranks.expand_hosts(node_list)


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.integers(0, 30), st.integers(0, 5)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 4),
)
def test_node_lists_of_any_ranges(groups: list[tuple[str, int, int]], width: int) -> None:
    text = ",".join(f"{name}[{first:0{width}d}-{first + more:0{width}d}]" for name, first, more in groups)
    plain = [f"{name}{n:0{width}d}" for name, first, more in groups for n in range(first, first + more + 1)]
    assert ranks.expand_hosts(text) == plain


def test_the_first_host_comes_from_scontrol(scontrol: Scontrol) -> None:
    path = scontrol('[ "$1 $2 $3" = "show hostnames odd" ] && echo localhost && echo other')
    environment = {**RECORDED["srun of 4 nodes x 2 tasks"][0], "SLURM_STEP_NODELIST": "odd", **path}
    assert ranks.read(environment).master_address == "localhost"


def test_a_name_that_does_not_resolve_becomes_its_address(scontrol: Scontrol) -> None:
    path = scontrol(
        'case "$*" in "show hostnames node[1-4]") echo n1.invalid;;\n'
        '"show node n1.invalid") echo "NodeName=n1 Arch=x\n   NodeAddr=10.1.2.3 NodeHostName=n";; esac'
    )
    environment = {**RECORDED["srun of 4 nodes x 2 tasks"][0], **path}
    assert ranks.read(environment).master_address == "10.1.2.3"


def test_a_name_that_nobody_knows_is_an_error_not_a_wait(scontrol: Scontrol) -> None:
    environment = {**RECORDED["srun of 4 nodes x 2 tasks"][0], "SLURM_STEP_NODELIST": "n[1-4].invalid"}
    with pytest.raises(UserError, match=r"first node, n1\.invalid, does not resolve"):
        ranks.read({**environment, **scontrol("exit 1")})


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", ranks.free_port()))


def test_torch_is_not_needed() -> None:
    code = "import sys, mvat_dist.distributed.ranks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=True)
