"""Times training steps against each other: rounds that turn, and ratios to a baseline in the same round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wellcond.lab.methods.clipping import Clipping
from wellcond.lab.methods.optimizers import needs_closure, take_step


class Quartiles(NamedTuple):
    """The middle of some numbers, and the half of them around it.

    Attributes:
        low: Lower quartile.
        median: Median.
        high: Upper quartile.
    """

    low: float
    median: float
    high: float


class StepTimer:
    """A network in training, one timed step at a time.

    Args:
        model: The network, in training mode.
        optimizer: Its optimizer.
        loss: From the network to the loss of a batch, always the same.
        second_order: Whether backward keeps its graph, for an optimizer that differentiates the gradient.
        clipping: What gradients are limited to; it counts as a part of the optimizer's step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module], Tensor],
        second_order: bool = False,
        clipping: Clipping | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss, self.second_order = model, optimizer, loss, second_order
        self.clipping = Clipping() if clipping is None else clipping
        self._is_cuda = next(model.parameters()).is_cuda

    def seconds(self) -> tuple[float, float]:
        """Time one training step, and ``optimizer.step()`` in it, waiting for the device."""
        if needs_closure(self.optimizer):
            # Its step goes forward and backward itself.
            start = self._now()
            take_step(self.optimizer, lambda: self.loss(self.model), self.second_order, self.clipping)
            return (self._now() - start,) * 2
        start = self._now()
        self.optimizer.zero_grad()
        self.loss(self.model).backward(create_graph=self.second_order)
        between = self._now()
        self.clipping.apply(self.optimizer)
        self.optimizer.step()
        end = self._now()
        return end - start, end - between

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def time_rounds(
    timers: Mapping[str, StepTimer],
    rounds: int,
    warm_up: int = 2,
    told: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Run every timer once a round, in an order that turns, so that a machine that drifts does so for all.

    Args:
        timers: What to time, by name.
        rounds: How often.
        warm_up: Steps of each before the first round.
        told: Is called after every step, with the timer's name.

    Returns:
        The seconds of whole steps and those of the optimizer in them, by name, one a round.
    """
    for name, timer in timers.items():
        for _ in range(warm_up):
            timer.seconds()
            told(name)
    names = list(timers)
    times: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            whole, part = timers[name].seconds()
            times[name].append(whole)
            parts[name].append(part)
            told(name)
    return times, parts


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of one number or more.

    >>> quartiles([4.0, 1.0, 3.0, 2.0, 5.0])
    Quartiles(low=2.0, median=3.0, high=4.0)
    >>> quartiles([4.0])
    Quartiles(low=4.0, median=4.0, high=4.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio_quartiles(own: Sequence[float], base: Sequence[float]) -> Quartiles:
    """Return the quartiles of the ratio to the baseline in the same round.

    >>> ratio_quartiles([2.0, 9.0, 3.0], [1.0, 3.0, 1.0]).median
    3.0
    """
    return quartiles([a / b for a, b in zip(own, base, strict=True)])
