"""The LightningModule of a run: the network, its loss, and the method's optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

import wellcond
from wellcond.lab.hardware.strategies import shard
from wellcond.lab.methods.norms import NormSchedule, trained_norm
from wellcond.lab.methods.schedule import parse_schedule
from wellcond.lab.runs.records import CoverageRows, RunSpec
from wellcond.lab.tasks.base import SeedData
from wellcond.nn.norm.noise_decay import BatchNoiseDecay


class Training(pl.LightningModule):
    """The network, its loss, and the method's optimizer under the run's schedule.

    Args:
        spec: The run.
        model: The network, with the method's layers.
        data: The seed's data.
        ranks: Processes that train it together, each with its share of a batch and its own batch statistics.
        sharded: Whether its weights are sharded over them.
    """

    def __init__(self, spec: RunSpec, model: nn.Module, data: SeedData, ranks: int = 1, sharded: bool = False) -> None:
        super().__init__()
        self.ranks, self.sharded = ranks, sharded
        self.spec = spec
        self.model = model
        self.data = data
        self.losses: list[Tensor] = []
        self.scored: Tensor | None = None
        self.batch_begins = True
        self.handle: wellcond.Attachment | None = None
        self.norm_schedule: NormSchedule | None = None
        self.decay: BatchNoiseDecay | None = None

    def configure_model(self) -> None:
        """Shard the network over the ranks, if it is to be."""
        if self.sharded:
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh["data_parallel"])
            self.sharded = False

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the batch's loss, kept for the epoch's mean."""
        with nullcontext() if self.decay is None else self.decay.observing(), _last_output(self.model) as outputs:
            loss = self.data.loss(self.model, batch)
        if self.batch_begins:
            self.batch_begins = False
            self._note(loss, outputs, batch)
        return loss if self.decay is None else self.decay.added_to(loss)

    def _note(self, loss: Tensor, outputs: list[Tensor], batch: Any) -> None:
        """Keep what a batch's epoch is told of; of a step whose optimizer asks more than once, the first."""
        # Kept on the device: reading it here would make every step wait for the device.
        self.losses.append(loss.detach())
        if outputs:
            with torch.no_grad():
                score = self.data.train_score(outputs.pop(), batch)
            if score is not None:
                self.scored = score if self.scored is None else self.scored + score

    def backward(self, loss: Tensor) -> None:
        """Go backward; keep the graph for an optimizer that differentiates the gradient."""
        loss.backward(create_graph=self.spec.method.second_order)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Limit gradients as the method says; a loss scale has been divided out by then."""
        self.spec.method.clipping.apply(optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the method's optimizer, its transforms attached, and the schedules of the lr and of the layers."""
        spec = self.spec
        norm = trained_norm(spec.method.norm, spec.ghost_batch)
        if norm is not None:
            members = spec.batch_size // self.ranks if spec.ghost_batch is None else spec.ghost_batch
            norm.fit_to_run(self.model, spec.steps)
            self.norm_schedule = norm.make_schedule(self.model, spec.steps, spec.steps_per_epoch, members)
            self.decay = norm.make_decay(self.model, members, spec.stats_every)
        optimizer, self.handle = spec.method.build(self.model, spec.lr, spec.refresh)
        schedule = parse_schedule(spec.schedule).scheduler(optimizer, spec.epochs, spec.steps, spec.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Notice that a step begins."""
        self.batch_begins = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Forget gradients with a graph, which holds all of the step's activations."""
        if self.spec.method.second_order:
            self.zero_grad(set_to_none=True)

    def transform_stats(self) -> dict[str, Any]:
        """Return what the transforms count; empty without transforms."""
        return {} if self.handle is None else dict(self.handle.stats())

    def coverage(self) -> dict[str, CoverageRows]:
        """Return what the transforms do with each parameter; empty without transforms."""
        rows = {} if self.handle is None else self.handle.coverage()
        return {name: [row._asdict() | {"shape": list(row.shape)} for row in some] for name, some in rows.items()}

    def mean_loss(self) -> Tensor:
        """Return the mean loss since the last call."""
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        return loss

    def take_scored(self) -> Tensor | None:
        """Return the sum of the scores since the last call, and the samples that they are of; None without scores."""
        scored, self.scored = self.scored, None
        return scored


@contextmanager
def _last_output(model: nn.Module) -> Iterator[list[Any]]:
    """Yield a list that holds what the model's last forward pass in the block returned."""
    outputs: list[Any] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs[:] = [output]

    hook = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        hook.remove()
