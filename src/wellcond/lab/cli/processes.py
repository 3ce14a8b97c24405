"""Carries a command out in several processes: torchrun's or SLURM's, or those that `--devices` asks for."""

from __future__ import annotations

from collections.abc import Callable

from wellcond.lab.errors import LabError
from wellcond.lab.hardware.launch import joined, launch, launched
from wellcond.lab.runs.settings import Settings


def in_processes(settings: Settings, command_line: str, act: Callable[[bool], int]) -> int:
    """Carry out a command in as many processes as were started, or start as many as are asked for.

    Args:
        settings: What was asked for.
        command_line: As it was typed.
        act: Carries it out; takes whether this process is the first, which alone writes and prints, and returns the
            exit code.

    Returns:
        The exit code.

    Raises:
        LabError: If there are no such devices, or the processes were started otherwise than asked for.
    """
    here, devices = launched(), settings.devices
    if here.size == 1 and devices in (None, 1):
        return act(True)
    import torch

    from wellcond.lab.hardware.machine import training_device

    device = training_device(settings.accelerator)
    if here.size > 1:
        if devices not in (None, here.on_this_machine):
            raise LabError(
                f"--devices {devices}: {here.by} started {here.on_this_machine} processes on this machine; leave "
                "--devices out"
            )
        with joined(device):
            return act(here.rank == 0)
    assert devices is not None
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise LabError(f"--devices must be at most the CUDA devices here ({torch.cuda.device_count()}), got {devices}")
    return launch(devices, command_line)
