"""Lets Lightning train a run in one process or several: with data parallelism, or weights sharded over the ranks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from wellcond.lab.hardware.interrupts import take_back
from wellcond.lab.hardware.launch import Launched


def trainer_options(strategy: str, device: torch.device, here: Launched) -> dict[str, Any]:
    """Return what a Trainer has to know of devices and processes.

    Args:
        strategy: One of `STRATEGIES`.
        device: This process's device.
        here: This process among the others.
    """
    accelerator = "cuda" if device.type == "cuda" else "cpu"
    if here.size == 1:
        return {"accelerator": accelerator, "devices": 1, "plugins": _environment(here)}
    chosen: Strategy
    if strategy == "fsdp":
        chosen = ModelParallelStrategy(
            data_parallel_size=here.size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    else:
        chosen = DDPStrategy()
    return {
        "accelerator": accelerator,
        "devices": here.on_this_machine,
        "num_nodes": here.nodes,
        "strategy": chosen,
        "plugins": _environment(here),
    }


def _environment(here: Launched) -> list[Any]:
    if here.by == "slurm":
        # A job that is queued again runs the same command, which goes on by itself.
        return [SLURMEnvironment(auto_requeue=False)]
    return [TorchElasticEnvironment() if here.by == "torchrun" else LightningEnvironment()]


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network's weights over the ranks of a mesh: each of its parts by itself, so that one is whole at a time.

    Args:
        model: The network, on the device.
        mesh: The ranks.
    """
    from torch.distributed.fsdp import fully_shard

    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


class EndAtOnce(pl.Callback):
    """Lets a request to end (SIGTERM) end the run at once, as it does elsewhere.

    Lightning would finish the epoch first and, on several ranks, wait for one that may be gone.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take Lightning's handler away; Lightning puts back what was there before it."""
        take_back()
