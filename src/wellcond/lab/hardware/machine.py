"""Names the machine and the software that numbers are measured with."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import wellcond
from wellcond.lab.errors import LabError
from wellcond.lab.hardware.code_digest import code_digest
from wellcond.lab.hardware.launch import launched


def training_device(accelerator: str = "auto") -> torch.device:
    """Return what this process trains on.

    Args:
        accelerator: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a CUDA device if there is one.

    Returns:
        The device; of several CUDA devices the one of this process's place on its machine.

    Raises:
        LabError: If there is no such device.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LabError("--accelerator cuda: torch finds no CUDA device here")
    here = launched()
    if here.size == 1:
        return torch.device("cuda")
    if here.local_rank >= torch.cuda.device_count():
        raise LabError(
            f"each process needs a CUDA device of its own: {here.on_this_machine} processes were started on this "
            f"machine, which has {torch.cuda.device_count()}"
        )
    return torch.device("cuda", here.local_rank)


def versions() -> dict[str, str]:
    """Return the versions of Python and of what decides the numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "wellcond": wellcond.__version__,
    }


def machine() -> dict[str, str]:
    """Return the processor, its cores, the GPU if there is one, and the platform."""
    described = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


@cache
def machine_text() -> str:
    """Return the processor, its cores, and the GPU if there is one, in words."""
    here = machine()
    cores = f"{here['processor']} ({here['cores']} cores)"
    return f"{here['gpu']}, {cores}" if "gpu" in here else cores


def environment(jobs: int, threads: int, *more: object) -> str:
    """Return a digest of everything beside its settings that decides a run's numbers or seconds.

    Args:
        jobs: Runs that share the machine.
        threads: Torch's threads in each.
        more: What else decides them, on how many ranks a run trains for example.

    Returns:
        A digest of machine, versions, wellcond's own code, and the arguments.
    """
    # The version alone would take runs of changed code for current ones.
    return hashlib.sha256(repr((machine(), versions(), jobs, threads, code_digest(), *more)).encode()).hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
