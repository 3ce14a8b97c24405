"""The processes that train a run together, as torchrun or SLURM starts them, and what only the first of them does."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from wellcond.lab.errors import LabError

if TYPE_CHECKING:
    import torch

Found = TypeVar("Found")


@dataclass(frozen=True)
class Launched:
    """This process among those that were started together.

    Attributes:
        rank: Which one it is.
        size: How many there are.
        local_rank: Which one it is on its machine.
        nodes: How many machines they are on.
        by: ``"torchrun"``, ``"slurm"``, or ``"itself"`` for one that was started alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: int = 1
    by: str = "itself"

    @property
    def on_this_machine(self) -> int:
        """How many processes there are on each machine."""
        return self.size // self.nodes


def launched() -> Launched:
    """Return which process this is; one that was started alone is the first of one.

    Raises:
        LabError: If a launcher's environment variable is missing or is not what it must be.
    """
    given = os.environ
    if "TORCHELASTIC_RUN_ID" in given:
        size = _number("WORLD_SIZE", least=1)
        nodes = size // _number("LOCAL_WORLD_SIZE", least=1, most=size)
        return Launched(_number("RANK", most=size - 1), size, _number("LOCAL_RANK", most=size - 1), nodes, "torchrun")
    if "SLURM_PROCID" in given and "SLURM_NTASKS" in given and given.get("SLURM_JOB_NAME") != "bash":
        size = _number("SLURM_NTASKS", least=1)
        if size > 1:
            nodes = _number("SLURM_NNODES", least=1, most=size) if "SLURM_NNODES" in given else 1
            rank, local_rank = (_number(name, most=size - 1) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
            return Launched(rank, size, local_rank, nodes, "slurm")
    return Launched()


def _number(name: str, least: int = 0, most: int = 2**31) -> int:
    given = os.environ.get(name, "")
    number = int(given) if given.isascii() and given.isdigit() and len(given) < 12 else -1
    if not least <= number <= most:
        raise LabError(
            f"the environment variable {name} must be a whole number from {least} to {most}, as the launcher sets it, "
            f"got {given!r}"
        )
    return number


@contextmanager
def joined(device: torch.device) -> Iterator[Launched]:
    """Let the processes of a launch know each other in the block; one alone needs nothing.

    A process that fails leaves the group as it is and ends: the launcher ends the others, which may wait for it.

    Args:
        device: This process's device: gloo connects CPUs, nccl CUDA devices.
    """
    import torch
    import torch.distributed as dist

    here = launched()
    if here.size == 1 or dist.is_initialized():
        yield here
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if here.by == "slurm":
        _say_where_the_first_is()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=here.rank, world_size=here.size)
    yield here
    dist.barrier()
    dist.destroy_process_group()


def _say_where_the_first_is() -> None:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    environment = SLURMEnvironment(auto_requeue=False)
    os.environ.setdefault("MASTER_ADDR", environment.main_address)
    os.environ.setdefault("MASTER_PORT", str(environment.main_port))


def from_first(make: Callable[[], Found]) -> Found:
    """Return what the first process makes, on every process; the others do not make it.

    Args:
        make: Makes something that can be pickled.

    Raises:
        LabError: On every process, if it does on the first.
    """
    if "torch.distributed" not in sys.modules:
        return make()
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    made: list[tuple[Found | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            made = [(make(), None)]
        except LabError as error:
            made = [(None, str(error))]
    dist.broadcast_object_list(made, src=0)
    found, mistake = made[0]
    if mistake is not None:
        raise LabError(mistake)
    return found  # type: ignore[return-value]  # None is what it made, then


def launch(devices: int, command_line: str) -> int:
    """Run a command in several processes of this machine, by torchrun.

    Args:
        devices: How many.
        command_line: The command, as it was typed.

    Returns:
        The exit code.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _, *arguments = shlex.split(command_line)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # As torchrun does, so that processes do not fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The first process says why it ends; torch would add a page of its own.
    logging.disable(logging.ERROR)
    try:
        elastic_launch(config, sys.executable)("-m", "wellcond", *arguments)
    except ChildFailedError as error:
        # What the process has said itself is not said again.
        code: int = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
