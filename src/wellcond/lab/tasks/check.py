"""Checks a user's task before anything is trained."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from wellcond.lab.data.randomness import seeded
from wellcond.lab.errors import DataError
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.evaluation import ROLES, Role
from wellcond.lab.tasks.seed_data import Scored, TaskSeed

_COMPARED_BATCHES = 3


class Checked(Scored, Protocol):
    """The part of a task that is checked."""

    def model(self, seed: int) -> nn.Module:
        """Return a network."""

    def describe(self) -> dict[str, Any]:
        """Return what the report says of the task."""


def check_task(task: Checked, device: torch.device, naming: Callable[[str], AbstractContextManager[None]]) -> float:
    """Check that two builds of a seed are equal, and what batches, loss and scores return.

    Args:
        task: The task.
        device: What trains.
        naming: Turns an exception of the task's code into one line that begins so.

    Returns:
        What the untrained network scores on the test split.

    Raises:
        DataError: If runs of the task could not be compared; the message says what to change.
    """
    _check_splits(task.splits)
    with naming("model(seed=0)"):
        one, other = (_built(task) for _ in range(2))
    _check_networks(one, other)
    with naming("batches(seed=0, epoch=0)"):
        _check_batches(task.batches)
    data = TaskSeed(task, 0, device)
    model = one.to(device).train()
    with naming("batches(seed=0, epoch=0)"):
        batch = next(iter(data.batches()))
    with naming("loss(model, batch)"):
        loss = data.loss(model, batch)
    _check_loss(loss, model, naming)
    return _check_scores(data, other.to(device), naming)


def _built(task: Checked) -> nn.Module:
    with seeded("weights", 0):
        model = task.model(0)
    if not isinstance(model, nn.Module):
        raise DataError(f"model(seed) must return a torch.nn.Module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DataError("model(seed) must return a network with parameters to train, got none")
    return model


def _check_splits(splits: Any) -> None:
    if not isinstance(splits, (tuple, list)) or "test" not in splits or not set(splits) <= set(ROLES):
        raise DataError(f"splits must be ('validation', 'test') or ('test',), got {splits!r}")


def _check_networks(one: nn.Module, other: nn.Module) -> None:
    if one is other:
        raise DataError("model(seed) must build a network each time, got the same object twice")
    first, second = one.state_dict(), other.state_dict()
    differing = next(
        (name for name in {**first, **second} if not _equal(first.get(name), second.get(name))),
        None,
    )
    if differing is not None:
        raise DataError(
            f"model(seed) must give equal networks for one seed, and two of seed 0 differ in {differing}: methods "
            "would begin with different weights, and pairing would be void; draw them from torch's generator, which is "
            "seeded before, or from one that is seeded by `seed`"
        )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = one.detach(), other.detach()
        return one.shape == other.shape and one.dtype == other.dtype and bool(_same(one, other).all())
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    try:
        return bool(one == other)
    except (ValueError, RuntimeError, TypeError):  # arrays
        return bool((one == other).all()) if hasattr(one == other, "all") else True


def _same(one: Tensor, other: Tensor) -> Tensor:
    same = one == other
    return same | (one.isnan() & other.isnan()) if one.is_floating_point() else same


def _check_batches(batches: Callable[..., Iterable[Any]]) -> None:
    drawn = []
    for _ in range(2):
        with seeded("batches of epoch 0", 0):
            given = batches(0, 0)
            if not isinstance(given, Iterable):
                raise DataError(f"batches(seed, epoch) must return batches to iterate over, got {type(given).__name__}")
            drawn.append(list(itertools.islice(given, _COMPARED_BATCHES)))
    if not drawn[0]:
        raise DataError("batches(seed, epoch) gave no batch: an epoch must have at least one")
    for number, (one, other) in enumerate(itertools.zip_longest(*drawn)):
        (parts, kind), (others, other_kind) = tree_flatten(one), tree_flatten(other)
        if kind != other_kind or not all(_equal(*pair) for pair in zip(parts, others, strict=True)):
            raise DataError(
                f"batches(seed, epoch) must be the same each time, and batch {number} of seed 0 and epoch 0 differs "
                "between two calls: methods would see different batches, and a run that goes on would not go on there; "
                "draw from the global generators, which are seeded before, or from one that is seeded by both"
            )


def _check_loss(loss: Any, model: nn.Module, naming: Callable[[str], AbstractContextManager[None]]) -> None:
    if not isinstance(loss, Tensor):
        raise DataError(f"loss(model, batch) must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or loss.dim() > 1:
        raise DataError(f"loss(model, batch) must return one number, got a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise DataError(
            "loss(model, batch) must have a gradient, and its tensor has none: it was detached, made of a number, or "
            "computed under torch.no_grad()"
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(f"loss(model, batch) must be finite, and that of the untrained network is {value}")
    with naming("backward through loss(model, batch)"):
        loss.backward()
    if all(parameter.grad is None for parameter in model.parameters()):
        raise DataError("loss(model, batch) must depend on the network, and none of its parameters gets a gradient")


def _check_scores(data: TaskSeed, model: nn.Module, naming: Callable[[str], AbstractContextManager[None]]) -> float:
    metric, score = data.task.metric, math.nan
    before = copy.deepcopy(model.state_dict())
    roles: list[Role] = [role for role in ROLES if role in data.task.splits]
    for role in roles:
        with naming(f"scores(model, {role!r})"), torch.no_grad():
            score = data.evaluate(model.eval(), role, Stopwatch(data.device)).score
        if not math.isfinite(score):
            raise DataError(
                f"scores(model, {role!r}) must be finite, and the untrained network's {metric.name} is {score}"
            )
    if not all(_equal(value, before[name]) for name, value in model.state_dict().items()):
        raise DataError("scores(model, split) must leave the network as it is, and it changed its weights or buffers")
    return score
