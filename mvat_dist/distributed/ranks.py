"""Read this process's rank, the number of processes and the address of rank 0 from the environment.

No other module does. There are three sources, in this order: a launcher that numbers its processes itself
(torchrun, deepspeed, the local processes of `mvat_dist.submit`), a Slurm step (``srun``), or a process alone.
A batch script or an interactive shell of Slurm is a process alone, whatever its job has been given: no other
process runs the same command, and waiting for others would hang.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from mvat_dist.distributed import slurm
from mvat_dist.errors import UserError

Launcher = Literal["single", "slurm", "torchrun", "deepspeed", "local", "environment"]

LOCAL_LAUNCHER = "MVAT_LOCAL_LAUNCHER"
"""Set by `mvat_dist.launch.processes` for its processes."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `export` sets, for DeepSpeed and torch.distributed."""

LOWEST_PORT, HIGHEST_PORT = 10_000, 32_767
"""Below Linux's ephemeral range (32768 to 60999), from which any program may hold a port."""

# Slurm numbers the shells that are no parallel step from here up: interactive, batch, external.
_FIRST_RESERVED_STEP = 4_294_967_290


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group."""

    rank: int
    """0 to `world_size` - 1 over all nodes."""
    world_size: int
    local_rank: int
    """0 to `local_world_size` - 1 on this node; the number of its GPU."""
    local_world_size: int
    """Processes on this node, the same on every node."""
    node_rank: int
    """0 to `nodes` - 1."""
    nodes: int
    master_address: str
    """Name or address of rank 0's node, as the other nodes reach it."""
    master_port: int
    launcher: Launcher


def read(environ: Mapping[str, str] = os.environ) -> Ranks:
    """This process's place, from the variables in `environ`.

    Raises:
        UserError: variables that contradict each other, or a different number of tasks per node.
    """
    launcher = _launcher(environ)
    if in_slurm_step(environ) and launcher in {"single", "environment"}:
        ranks = _from_slurm(environ)
        _refuse_contradiction(environ, ranks)
        return ranks
    if launcher == "single":
        return Ranks(0, 1, 0, 1, 0, 1, "127.0.0.1", free_port(), "single")
    return _from_launcher(environ, launcher)


def export(ranks: Ranks, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set `RANK_VARIABLES`, as DeepSpeed and torch.distributed read them.

    CUDA_VISIBLE_DEVICES stays as it is: DeepSpeed picks the device by LOCAL_RANK.
    """
    environ["RANK"] = str(ranks.rank)
    environ["WORLD_SIZE"] = str(ranks.world_size)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["LOCAL_WORLD_SIZE"] = str(ranks.local_world_size)
    environ["MASTER_ADDR"] = ranks.master_address
    environ["MASTER_PORT"] = str(ranks.master_port)


def without_ranks(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` without the variables of ranks that another launcher has set."""
    launchers = ("TORCHELASTIC_", "SUBMITIT_", "GROUP_", "ROLE_", "CROSS_", "LOCAL_SIZE", LOCAL_LAUNCHER)
    return {
        name: value
        for name, value in inherited.items()
        if name not in RANK_VARIABLES and not name.startswith(launchers)
    }


def free_port() -> int:
    """A TCP port of the loopback device that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server of this machine could listen on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def job_port(job: str, step: str, restart: str) -> int:
    """The rendezvous port of a Slurm step: every rank computes the same, and a restart another.

    A restarted job must not meet the last processes of its previous start on the same port.
    """
    spread = zlib.crc32(f"{job}.{step}.{restart}".encode())
    return LOWEST_PORT + spread % (HIGHEST_PORT - LOWEST_PORT + 1)


def expand_hosts(node_list: str) -> list[str]:
    """Host names of a Slurm node list: ``gpu[01-03,7],login`` is gpu01, gpu02, gpu03, gpu7, login.

    Raises:
        UserError: brackets that do not close, or a range that is none.
    """
    hosts: list[str] = []
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        names = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", group):
            endings = [text] if text else _expand_numbers(numbers, node_list)
            names = [name + ending for name in names for ending in endings]
        hosts += names
    if not hosts or node_list.count("[") != node_list.count("]"):
        raise UserError(f"the node list {node_list!r} cannot be read")
    return hosts


def _expand_numbers(numbers: str, node_list: str) -> list[str]:
    """``01-03,7`` is 01, 02, 03, 7: a range keeps the width of its first number."""
    names: list[str] = []
    for part in numbers.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise UserError(f"the node list {node_list!r} cannot be read")
        first, last = match.group(1), match.group(2) or match.group(1)
        names += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return names


def _launcher(environ: Mapping[str, str]) -> Launcher:
    """What numbered the processes, by the marks that it leaves."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return "single"
    if LOCAL_LAUNCHER in environ:
        return "local"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environ else "environment"


def _from_launcher(environ: Mapping[str, str], launcher: Launcher) -> Ranks:
    # DeepSpeed's launcher calls the number of processes per node LOCAL_SIZE.
    local_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"
    wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_name, "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in environ]:
        raise UserError(
            f"RANK or WORLD_SIZE is set, but {', '.join(missing)} is not: start the processes with srun, "
            "torchrun or deepspeed, or unset RANK and WORLD_SIZE for a process alone"
        )
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in wanted[:4])
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise UserError(
            f"rank {rank} of {world_size} with local rank {local_rank} of {local_world_size} cannot be: "
            "unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, left over from another launcher"
        )
    if world_size % local_world_size:
        raise UserError(
            f"{world_size} processes cannot be {local_world_size} on every node: "
            "start the same number of processes on each node"
        )
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=_integer(environ, "GROUP_RANK") if "GROUP_RANK" in environ else rank // local_world_size,
        nodes=world_size // local_world_size,
        master_address=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
        launcher=launcher,
    )


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this process, as one task of a parallel step.

    A batch script has SLURM_PROCID and the job's SLURM_NTASKS too, but no step; an interactive shell
    has a reserved step number; a job submitted from within a step inherits that step's variables,
    which contradict its own.
    """
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_RESERVED_STEP:
        return False
    same_tasks = environ.get("SLURM_STEP_NUM_TASKS") == environ.get("SLURM_NTASKS")
    return same_tasks and "SLURM_PROCID" in environ


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    layout = environ["SLURM_STEP_TASKS_PER_NODE"]
    tasks_per_node = _expand_tasks(layout)
    if len(set(tasks_per_node)) != 1:
        raise UserError(
            f"Slurm placed {world_size} tasks unevenly on {len(tasks_per_node)} nodes ({layout}): "
            "ask for --nodes and --ntasks-per-node instead of --ntasks"
        )
    master = "127.0.0.1"
    if world_size > 1:
        master = _reachable_node(environ["SLURM_STEP_NODELIST"], environ)
    return Ranks(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks_per_node[0],
        node_rank=_integer(environ, "SLURM_NODEID"),
        nodes=len(tasks_per_node),
        master_address=master,
        master_port=job_port(
            environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"], environ.get("SLURM_RESTART_COUNT", "0")
        ),
        launcher="slurm",
    )


def _refuse_contradiction(environ: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse RANK and WORLD_SIZE left in a shell, which would give every task the same rank.

    Raises:
        UserError: with the variables to unset.
    """
    rank = environ.get("RANK", str(ranks.rank))
    world_size = environ.get("WORLD_SIZE", str(ranks.world_size))
    if (rank, world_size) != (str(ranks.rank), str(ranks.world_size)):
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world_size} contradict Slurm, which says task {ranks.rank} of "
            f"{ranks.world_size}: unset {' '.join(RANK_VARIABLES)} before submitting"
        )


def _expand_tasks(layout: str) -> list[int]:
    """``2(x3),1`` is 2, 2, 2, 1: tasks on each node."""
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", layout):
        tasks += [int(count)] * int(times or 1)
    return tasks


def _reachable_node(node_list: str, environ: Mapping[str, str]) -> str:
    """The first node of a list: its name where that resolves, else the address by which Slurm reaches it.

    Raises:
        UserError: neither works; torch would wait for the unknown host in silence.
    """
    # Slurm reads lists better than we do, but its programs are not in most containers.
    host = (slurm.host_names(node_list, environ) or expand_hosts(node_list))[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        address = slurm.node_address(host, environ)
        if address is None:
            raise UserError(
                f"the name of the first node, {host}, does not resolve here and scontrol does not know its "
                "address: add it to /etc/hosts or to the name service"
            ) from None
        return address
    return host


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise UserError(f"{name} is missing from the environment of this Slurm step") from None
    except ValueError:
        raise UserError(f"{name}={environ[name]!r} in the environment is not a number") from None
