"""The estimates that each kind of normalization keeps: a batch's contribution, their average, their place."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.calibration.replay import Seen, running_buffers
from wellcond.nn.functional.batch_statistics_regression import normal_equations
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.bsr import REGRESSION_SUMS, BSRBatchNorm
from wellcond.nn.norm.evalnorm import EvalNorm
from wellcond.numerics.moments import Moments, unbiased


class Estimator(Protocol):
    """Fills one kind of estimates of a layer."""

    def average(self, layer: _BatchNorm, momentum: float | None) -> Average:
        """Return an average to fill, which with a momentum begins in the layer's present estimates."""

    def values(self, layer: _BatchNorm, seen: Seen) -> list[Tensor]:
        """Return what is to be averaged of each batch, each of shape [batches, *shape of the present estimate]."""

    def replace(self, layer: _BatchNorm, average: Average) -> None:
        """Put averages in the place of a layer's estimates."""


class Average:
    """Averages of what batches give: with equal weights, or a moving one that begins with present values.

    Args:
        present: Values before the first batch; for equal weights only their shapes count.
        momentum: Weight of a batch; None for equal weights.

    Attributes:
        values: The averages, after `finish`.
        batches: How many batches are behind them.

    Example:
        >>> average = Average([torch.zeros(1)], momentum=0.5)
        >>> average.add([torch.tensor([[4.0], [8.0]])])
        >>> average.finish()
        >>> average.values, average.batches
        ([tensor([5.])], 2)
    """

    def __init__(self, present: list[Tensor], momentum: float | None) -> None:
        self.momentum = momentum
        self.values = [torch.zeros_like(value) if momentum is None else value.clone() for value in present]
        self._weight = torch.zeros_like(self.values[0].flatten()[:1])
        self._batches = torch.zeros_like(self._weight)

    def add(self, values: list[Tensor], weight: float = 1.0) -> None:
        """Take in the values of consecutive batches, each of shape [batches, ...]; the weight counts in equal ones."""
        batches = len(values[0])
        self._batches += batches
        self._weight += batches * weight
        if self.momentum is not None:
            self._weight.fill_(1)
        for average, value in zip(self.values, values, strict=True):
            if self.momentum is None:
                average += weight * value.sum(0)
                continue
            age = torch.arange(batches - 1, -1, -1, dtype=value.dtype, device=value.device)
            average *= (1 - self.momentum) ** batches
            average += self.momentum * torch.tensordot((1 - self.momentum) ** age, value, 1)

    def summed(self) -> list[Tensor]:
        """Return what adds up over ranks, to be summed in place: a rank without batches gives zeros."""
        for value in self.values:
            value *= self._weight.ne(0)
        return [*self.values, self._weight, self._batches]

    def finish(self) -> None:
        """Divide the sums by their weights."""
        for value in self.values:
            value /= self._weight

    def summed_around_means(self) -> list[Tensor]:
        """Return what adds up over ranks once their joint means are known, to be summed in place."""
        return []

    def finish_around_means(self) -> None:
        """Divide those."""

    @property
    def batches(self) -> int:
        """How many batches were taken in."""
        return int(self._batches)

    @property
    def is_finite(self) -> bool:
        """Whether all averages are numbers."""
        return all(bool(value.isfinite().all()) for value in self.values)


class Pooled(Average):
    """The mean and the unbiased variance of all values together, whatever batches they come in.

    Example:
        >>> pooled = Pooled([torch.zeros(1), torch.ones(1)])
        >>> pooled.add([torch.tensor([[2.0]]), torch.tensor([[1.0]])], 2)  # of 1 and 3
        >>> pooled.add([torch.tensor([[5.0]]), torch.tensor([[0.0]])], 1)  # of 5
        >>> _ = pooled.summed()
        >>> pooled.finish()
        >>> _ = pooled.summed_around_means()
        >>> pooled.finish_around_means()
        >>> pooled.values
        [tensor([3.]), tensor([4.])]
    """

    def __init__(self, present: list[Tensor]) -> None:
        super().__init__(present, None)
        self._own_mean = torch.zeros_like(self.values[0])

    def add(self, values: list[Tensor], weight: float = 1.0) -> None:
        """Take in one batch's mean and biased variance, each of shape [1, C], of so many values."""
        (mean,), (var,) = values
        squares = self.values[1]
        apart, share = mean - self._own_mean, weight / (self._weight + weight)
        squares += weight * var + apart.square() * self._weight * share
        self._own_mean += apart * share
        self._weight += weight
        self._batches += 1

    def summed(self) -> list[Tensor]:
        """Return this rank's sum of values, and counts."""
        self._own_weight = self._weight.clone()
        self.values[0] = self._own_mean * self._weight
        return [self.values[0], self._weight, self._batches]

    def finish(self) -> None:
        """Divide the sum."""
        self.values[0] = self.values[0] / self._weight

    def summed_around_means(self) -> list[Tensor]:
        """Return this rank's squares around the joint mean."""
        self.values[1] += self._own_weight * (self._own_mean - self.values[0]).square()
        return [self.values[1]]

    def finish_around_means(self) -> None:
        """Divide by one value less than there are."""
        self.values[1] /= (self._weight - 1).clamp_min(1)


class RunningStatistics:
    """Running means and unbiased variances, of every kind of batch normalization."""

    def average(self, layer: _BatchNorm, momentum: float | None) -> Average:
        """Return an average to fill."""
        return Average(self.present(layer), momentum)

    def present(self, layer: _BatchNorm) -> list[Tensor]:
        """Return the running mean, the variance, and what else the layer keeps."""
        return [buffer.to(_wide(layer)) for buffer in running_buffers(layer).values()]

    def values(self, layer: _BatchNorm, seen: Seen) -> list[Tensor]:
        """Return the batches' means and unbiased variances, or what the layer takes in instead."""
        if seen.tracked is None:
            return [seen.batches.mean.to(_wide(layer)), unbiased(seen.batches).to(_wide(layer))]
        batches = len(seen.batches.mean)
        tracked = [seen.tracked[name].to(_wide(layer)) for name in running_buffers(layer)]
        return [value.expand(batches, *value.shape) for value in tracked]

    def replace(self, layer: _BatchNorm, average: Average) -> None:
        """Replace the running statistics, and count the batches behind them."""
        for (name, buffer), value in zip(running_buffers(layer).items(), average.values, strict=True):
            buffer.copy_(value)
            if not buffer.isfinite().all():
                raise ValueError(f"{name} of {layer} has values beyond {buffer.dtype}; nothing has changed")
        if layer.num_batches_tracked is not None:
            earlier = 0 if average.momentum is None else layer.num_batches_tracked
            layer.num_batches_tracked.copy_(earlier + average._batches.squeeze())
        if isinstance(layer, BSRBatchNorm):
            layer.solve()  # Falls back to the running statistics where there are no sums.


class PooledStatistics(RunningStatistics):
    """The mean and the unbiased variance of all samples together."""

    def average(self, layer: _BatchNorm, momentum: float | None) -> Average:
        """Return moments to fill."""
        return Pooled(self.present(layer))

    def values(self, layer: _BatchNorm, seen: Seen) -> list[Tensor]:
        """Return the batch's mean and biased variance."""
        return [seen.batches.mean.to(_wide(layer)), seen.batches.var.to(_wide(layer))]


class RegressionSums:
    """The normal equations of Batch Statistics Regression (3.12)."""

    def average(self, layer: _BatchNorm, momentum: float | None) -> Average:
        """Return an average to fill."""
        return Average(self.present(layer), momentum)

    def present(self, layer: _BatchNorm) -> list[Tensor]:
        """Return A_μ, B_μ, A_σ, B_σ."""
        return [layer.get_buffer(name).to(_wide(layer)) for name in REGRESSION_SUMS]

    def values(self, layer: _BatchNorm, seen: Seen) -> list[Tensor]:
        """Return each batch's sums, around the running mean, which evaluation subtracts, too."""
        assert layer.running_mean is not None
        batches, channels = seen.batches.mean.shape

        def apart(values: Tensor) -> Tensor:
            # Each batch's channels are taken for channels of their own: [batches·rows, C] to [rows, batches·C].
            return values.reshape(batches, seen.rows, channels).transpose(0, 1).reshape(seen.rows, -1)

        instances = Moments(apart(seen.instances.mean), apart(seen.instances.var), seen.instances.elements)
        own = Moments(seen.batches.mean.flatten(), seen.batches.var.flatten(), seen.batches.elements)
        sums = normal_equations(instances, own, None, layer.running_mean.repeat(batches), _wide(layer))
        return [part.unflatten(0, (batches, channels)) for part in sums]

    def replace(self, layer: _BatchNorm, average: Average) -> None:
        """Replace the sums, and solve them."""
        assert isinstance(layer, BSRBatchNorm)
        for name, value in zip(REGRESSION_SUMS, average.values, strict=True):
            layer.get_buffer(name).copy_(value)
        layer.solve()


class Mixture:
    """α and β of EvalNorm: the minimum of the objective that its training descends, which seven sums say.

    With u = (μ_s − μ)/σ, t = (μ_B − μ)/σ, q = u², p = (σ²_s − σ²)/σ² + q and r = (σ²_B − σ²)/σ² that objective is
    Σ (t − αu)² + Σ (r − βp + β²q)²; μ and σ² are the running statistics, ε added to the latter where it divides.
    """

    def average(self, layer: _BatchNorm, momentum: float | None) -> Average:
        """Return an average to fill."""
        return Average(self.present(layer), momentum)

    def present(self, layer: _BatchNorm) -> list[Tensor]:
        """Return nothing but the shape: a layer keeps the solution, not the sums."""
        assert layer.running_mean is not None
        return [torch.zeros(8, dtype=_wide(layer), device=layer.running_mean.device)]

    def values(self, layer: _BatchNorm, seen: Seen) -> list[Tensor]:
        """Return Σut, Σuu, Σrp, Σpp, Σrq, Σpq, Σqq over each batch's instances and channels, and 1/m."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        dtype = _wide(layer)
        batches, channels = seen.batches.mean.shape
        mean, var = (part.to(dtype).reshape(batches, seen.rows, channels) for part in seen.instances[:2])
        own_mean, own_var = (part.to(dtype).unsqueeze(1) for part in seen.batches[:2])
        long_mean, long_var = layer.running_mean.to(dtype), layer.running_var.to(dtype)
        scale = long_var + layer.eps
        u, t = (mean - long_mean) / scale.sqrt(), (own_mean - long_mean) / scale.sqrt()
        q = u.square()
        p, r = (var - long_var) / scale + q, (own_var - long_var) / scale
        products = (u * t, u * u, r * p, p * p, r * q, p * q, q * q, torch.full_like(u, 1 / u[0].numel() / seen.rows))
        return [torch.stack([product.sum((1, 2)) for product in products], dim=1)]

    def replace(self, layer: _BatchNorm, average: Average) -> None:
        """Replace α and β by the minimum, or by 1/m in a layer that does not learn them."""
        assert isinstance(layer, EvalNorm)
        ut, uu, rp, pp, rq, pq, qq, fixed = average.values[0].tolist()
        if not layer.learn:
            layer.mean_mixture.fill_(fixed)
            layer.var_mixture.fill_(fixed)
            return
        layer.mean_mixture.fill_(_lowest([0.0, -2 * ut, uu]))
        layer.var_mixture.fill_(_lowest([0.0, -2 * rp, pp + 2 * rq, -2 * pq, qq]))


def estimator_for(what: str, layer: _BatchNorm, whole: bool, momentum: float | None) -> Estimator:
    """Return what is taken of a layer.

    Args:
        what: ``"bn"``, ``"bsr"`` or ``"evalnorm"``.
        layer: The layer.
        whole: Whether batches are those of the loader, of any sizes.
        momentum: Of a moving average, if it is one.
    """
    plain = not isinstance(layer, StatisticsNorm) or layer.tracks_batch_moments
    if what == "bn" and whole and plain and momentum is None:
        return PooledStatistics()
    return ESTIMATORS[what]


ESTIMATORS: dict[str, Estimator] = {"bsr": RegressionSums(), "evalnorm": Mixture(), "bn": RunningStatistics()}


def _lowest(coefficients: list[float]) -> float:
    """Return where a polynomial is lowest on [0, 1]; 0 where it is constant.

    Args:
        coefficients: Of the powers from 0 on.

    Example:
        >>> round(_lowest([0.0, -0.5, 1.0]), 12)
        0.25
    """

    def lowered(point: float) -> float:
        return sum(c * point**power for power, c in enumerate(coefficients))

    slope = [power * c for power, c in enumerate(coefficients)][1:]
    return min([0.0, *_roots(slope), 1.0], key=lowered)


def _roots(coefficients: list[float]) -> list[float]:
    """Return the roots of a polynomial in (0, 1) at which it changes its sign, by bisection between its turns."""
    if len(coefficients) < 2:
        return []

    def value(point: float) -> float:
        return sum(c * point**power for power, c in enumerate(coefficients))

    turns = [0.0, *_roots([power * c for power, c in enumerate(coefficients)][1:]), 1.0]
    found = []
    for low, high in pairwise(turns):
        rising = value(high) > 0
        if (value(low) > 0) == rising:
            continue
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if (value(middle) > 0) == rising else (middle, high)
        found.append(high)
    return found


def _wide(layer: _BatchNorm) -> torch.dtype:
    """Return the dtype to sum in."""
    assert layer.running_mean is not None
    return torch.float32 if layer.running_mean.device.type == "mps" else torch.float64
