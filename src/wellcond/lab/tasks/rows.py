"""Shuffles samples that lie in memory as rows of tensors into batches, and evaluates them in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.lab.data.batches import share_of
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.splits import derived_seed
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Evaluation, Role
from wellcond.lab.tasks.given_data import DrawnSeed
from wellcond.lab.tasks.objectives import Objective


class LabelledRows(NamedTuple):
    """Inputs and targets, a row each."""

    inputs: Tensor
    targets: Tensor


class TrainingRows(Protocol):
    """Rows that training batches are taken from."""

    def __len__(self) -> int:
        """Return how many rows there are to choose from."""

    def take(self, positions: Tensor, epoch: int) -> LabelledRows:
        """Return the rows at these positions, as they are in an epoch."""


class FixedRows:
    """Rows that are the same in every epoch.

    Args:
        rows: The rows, on the device.
    """

    def __init__(self, rows: LabelledRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.targets)

    def take(self, positions: Tensor, epoch: int) -> LabelledRows:
        """Return the rows at these positions."""
        return LabelledRows(self.rows.inputs[positions], self.rows.targets[positions])


class RowsSeed(DrawnSeed):
    """One seed's rows on one rank's device.

    Args:
        training: What trains.
        held_out: What is evaluated, by role.
        objective: The loss and the scores.
        spec: The run; of the rows that train, an epoch takes `train_images`.
        device: Where the rows are.
        piece: Rows that are evaluated at once.
        rank: Which process of the run this is.
        ranks: How many processes the run has.
    """

    def __init__(
        self,
        training: TrainingRows,
        held_out: Mapping[Role, LabelledRows],
        objective: Objective,
        spec: SeedSpec,
        device: torch.device,
        piece: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(spec, device, rank, ranks)
        self.training, self.held_out, self.objective, self.piece = training, held_out, objective, piece

    def batches(self) -> Epochs[LabelledRows]:
        """Return the training batches, of whole batches alone."""
        return Epochs(self._epoch, self.spec.train_images // self.spec.batch_size)

    def loss(self, model: nn.Module, batch: LabelledRows) -> Tensor:
        """Return the batch's mean loss."""
        return self.objective.loss(model(batch.inputs), batch.targets)

    def train_score(self, output: Tensor, batch: LabelledRows) -> Tensor | None:
        """Return what the batch scores."""
        return self.objective.train_score(output, batch.targets)

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return the scores of the rows of a role, each rank having taken every ``ranks``-th of each piece."""
        inputs, targets = self.held_out[role]
        sums: Tensor | None = None
        for some_inputs, some_targets in zip(inputs.split(self.piece), targets.split(self.piece), strict=True):
            own, wanted = some_inputs[self.rank :: self.ranks], some_targets[self.rank :: self.ranks]
            # A network that is sharded over the ranks needs all of them in every forward pass, rows or not.
            shown = own if len(own) else some_inputs[:1]
            stopwatch.start()
            output = model(shown)
            stopwatch.stop()
            found = self.objective.sums(output[: len(own)], wanted)
            sums = found if sums is None else sums + found
        assert sums is not None
        if self.ranks > 1:
            dist.all_reduce(sums)
        return self.objective.evaluation(sums.tolist(), len(targets))

    def _epoch(self, epoch: int, first: int) -> Iterator[LabelledRows]:
        """Yield an epoch's batches from one on: a function of seed, epoch and place alone."""
        spec = self.spec
        generator = torch.Generator().manual_seed(derived_seed(f"order of epoch {epoch}", spec.seed))
        order = torch.randperm(len(self.training), generator=generator)
        whole = spec.train_images // spec.batch_size * spec.batch_size
        share = share_of(spec.batch_size, self.rank, self.ranks)
        for positions in order[:whole].to(self.device).split(spec.batch_size)[first:]:
            yield self.training.take(positions[share], epoch)
