"""What stands in for a normalization's forward in a pass over data: it does as in training, and changes nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import PastStatistics, StatisticsNorm
from wellcond.nn.norm.instance import InstanceInference
from wellcond.numerics.moments import Moments, instance_and_ghost_moments, positions, statistics_dtype


class Seen(NamedTuple):
    """What one call of a layer saw: whole batches of m samples.

    Attributes:
        instances: Moments of each instance, shape [batches·rows, C].
        batches: Moments of each batch of m samples, shape [batches, C].
        rows: Of the layer's input, per batch: m, or a multiple where the model folds other dimensions into the samples.
        tracked: What the layer's running statistics take in, by buffer, averaged over the batches; None where that is
            `batches`' means and unbiased variances.
    """

    instances: Moments
    batches: Moments
    rows: int
    tracked: dict[str, Tensor] | None


class Run:
    """What the layers' stand-ins share.

    Attributes:
        batch_size: m; 0 while it is not known.
        samples: Of the loader's present batch; None if not known.
        batches: That the loader gave so far.
        largest: Samples of the largest of them.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.samples: int | None = None
        self.batches = 0
        self.largest = 0

    def rows(self, rows: int) -> int:
        """Return how many rows of a layer's input belong to m samples."""
        if self.samples is None:
            self.largest = max(self.largest, rows)
            return self.batch_size
        return max(round(rows * self.batch_size / self.samples), 1)


class StandIn:
    """Stands in for a layer's forward: normalizes groups of m samples as the layer does in training, and reports them.

    Args:
        run: The pass.
        name: Of the layer.
        layer: Is read only.
        observe: Where to report; None for nowhere.
    """

    def __init__(self, run: Run, name: str, layer: _BatchNorm, observe: Callable[[str, Seen], None] | None) -> None:
        self.name = name
        self._run, self._layer, self._observe = run, layer, observe
        self._double = None if _is_batch_normalization(layer) else double_of(layer)

    def __call__(self, input: Tensor) -> Tensor:
        """Normalize, and report.

        Args:
            input: Shape [N, C, *positions].

        Returns:
            The same shape; what fills no group of m samples is there, too, and the groups do not depend on it.

        Raises:
            ValueError: If there is one value per channel in a group.
        """
        self._layer._check_input_dim(input)
        rows = self._run.rows(input.shape[0])
        batches = input.shape[0] // rows
        if batches == 0:
            return self._with_estimates(input)
        if rows * positions(input) == 1:
            raise ValueError(
                f"{self.name!r} has 1 value per channel in a batch of {self._run.batch_size} sample, which has no "
                f"variance: got input size {list(input.shape)}"
            )
        counted = input[: batches * rows]
        instances, own = instance_and_ghost_moments(counted, (rows,) * batches if batches > 1 else None)
        own = Moments(own.mean.view(batches, -1), own.var.view(batches, -1), own.elements)
        if self._double is None:
            self._report(Seen(instances, own, rows, None))
            # What is left over joins the last group, as something that none of the others depends on.
            sizes = (*(rows,) * (batches - 1), input.shape[0] - (batches - 1) * rows)
            return self._normalize(input, own.mean, own.var, sizes)
        follows = not isinstance(self._double, StatisticsNorm) or self._double.tracks_batch_moments
        if follows:
            self._report(Seen(instances, own, rows, None))
            outputs = [_train(self._double, counted, rows)]
        else:
            tracked, output = _tracked(self._double, counted, rows)
            self._report(Seen(instances, own, rows, tracked))
            outputs = [output]
        if len(counted) < len(input):
            outputs.append(self._with_estimates(input[len(counted) :]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _report(self, seen: Seen) -> None:
        if self._observe is not None:
            self._observe(self.name, seen)

    def _with_estimates(self, input: Tensor) -> Tensor:
        """Normalize what is less than a batch."""
        if self._double is not None:
            self._double.training = False
            output: Tensor = self._double.forward(input)
            return output
        mean, var = self._layer.running_mean, self._layer.running_var
        if mean is None or var is None:
            mean, var, _ = instance_and_ghost_moments(input, None)[1]
        dtype = statistics_dtype(input.dtype)
        return self._normalize(input, mean.to(dtype)[None], var.to(dtype)[None], (input.shape[0],))

    def _normalize(self, input: Tensor, mean: Tensor, var: Tensor, sizes: tuple[int, ...]) -> Tensor:
        layer = self._layer
        if len(sizes) == 1:
            return normalize(input, mean[0], var[0], layer.weight, layer.bias, layer.eps)
        return normalize(input, mean, var, layer.weight, layer.bias, layer.eps, sizes=sizes)


def _is_batch_normalization(layer: _BatchNorm) -> bool:
    """Whether a layer does nothing in training but to normalize with its batch's statistics."""
    forward = type(layer).forward
    if forward is StatisticsNorm.forward:
        assert isinstance(layer, StatisticsNorm)
        own = type(layer).normalize_batch is StatisticsNorm.normalize_batch
        return own or isinstance(layer, InstanceInference)
    return forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def double_of(layer: _BatchNorm) -> _BatchNorm:
    """Return a layer with the same parameters and submodules, but buffers of its own.

    Called by its `forward`, it leaves the original as it is, in training, too; it has a process's batch for its own.

    >>> layer = nn.BatchNorm1d(2)
    >>> _ = double_of(layer).forward(torch.randn(4, 2))
    >>> int(layer.num_batches_tracked)
    0
    """
    double = type(layer).__new__(type(layer))
    # Shallow, so that what an attribute refers to is not copied.
    double.__dict__.update(vars(layer))
    for name, value in vars(layer).items():
        if isinstance(value, PastStatistics):
            double.__dict__[name] = copy.copy(value)
    double.__dict__["_buffers"] = {
        name: value if value is None else value.detach().clone() for name, value in layer._buffers.items()
    }
    if isinstance(double, StatisticsNorm):
        double.synchronize = False
    return double


def _train(double: _BatchNorm, input: Tensor, rows: int) -> Tensor:
    """Normalize whole groups as a layer of any kind does in training."""
    double.training = True
    if isinstance(double, StatisticsNorm):
        double.group_size = rows
        output: Tensor = double.forward(input)
        return output
    return torch.cat([double.forward(group) for group in input.split(rows)])


def _tracked(double: _BatchNorm, input: Tensor, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """As `_train`, for layers that do not train with running statistics; also return what these took in."""
    present = {name: buffer.clone() for name, buffer in running_buffers(double).items()}
    momentum, double.momentum = double.momentum, 1.0
    try:
        output = _train(double, input, rows)
        tracked = {name: buffer.clone() for name, buffer in running_buffers(double).items()}
    finally:
        double.momentum = momentum
        for name, buffer in running_buffers(double).items():
            buffer.copy_(present[name])
    return tracked, output


def running_buffers(layer: _BatchNorm) -> dict[str, Tensor]:
    """Return the running statistics by name: mean, variance, and what else a layer evaluates with.

    >>> list(running_buffers(nn.BatchNorm1d(2)))
    ['running_mean', 'running_var']
    """
    buffers = layer._buffers.items()
    return {name: buffer for name, buffer in buffers if name.startswith("running_") and buffer is not None}


@contextlib.contextmanager
def replaced(layer: nn.Module, stand: StandIn) -> Iterator[None]:
    """Put a layer in training mode, and let a stand-in do its forward; the layer's hooks run as always."""
    if "forward" in vars(layer):
        raise TypeError(f"{stand.name!r} has its own 'forward', set on this one object: what it does is not known")
    layer.forward = stand
    layer.training = True
    try:
        yield
    finally:
        del layer.__dict__["forward"]
