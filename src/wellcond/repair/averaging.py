"""Averages the weights of models of one architecture: stochastic weight averaging, moving averages, model soups."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.calibration.models import calibrate
from wellcond.runtime.checks import checked
from wellcond.runtime.models import unwrapped


@checked
def average(
    models: Sequence[Any],
    loader: Iterable[Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> nn.Module:
    """Return the average of models of one architecture, with statistics that are its own.

    The average of running statistics is not the statistics of the averaged network, which are why an average evaluates
    far worse than any of the models. With a loader they are taken anew (`wellcond.calibrate`).

    Args:
        models: Two or more; the first is a module, of which a copy is returned; the others may be state dicts of it,
            such as checkpoints of one run.
        loader: Training data, as `wellcond.calibrate` takes it. None: statistics are averaged as the weights are, and
            wait for a `wellcond.calibrate` of yours.
        weights: Of each model, whose sum is 1; None for equal ones.
        **options: Further ones of `wellcond.calibrate`.

    Returns:
        A new model, in the first one's mode. Sums are float32 or wider; buffers of integers are the first one's.

    Raises:
        TypeError: If the first is no module, or another is neither that nor a state dict.
        ValueError: If there are fewer than two models, they differ in names or shapes, or the weights do not fit.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (UAI 2018).

    Example:
        >>> models = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2)]
        >>> averaged = average(models, [torch.randn(8, 2)])
        >>> bool(torch.allclose(averaged[0].weight, (models[0][0].weight + models[1][0].weight) / 2))
        True
    """
    models = list(models)
    if len(models) < 2:
        raise ValueError(f"models must be two or more, got {len(models)}")
    shares = [1 / len(models)] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(models) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"weights must be {len(models)} numbers whose sum is 1, got {list(weights or ())}")
    if not isinstance(models[0], nn.Module):
        raise TypeError(f"models[0] must be a torch.nn.Module, got {type(models[0]).__name__}")
    result = copy.deepcopy(unwrapped(models[0]))
    states = [_state_of(model, position) for position, model in enumerate(models)]
    for position, state in enumerate(states[1:], 1):
        _check_alike(states[0], state, position)
    with torch.no_grad():
        for name, tensor in result.state_dict().items():
            if tensor.is_floating_point() or tensor.is_complex():
                wide = torch.promote_types(tensor.dtype, torch.float32)
                parts = (
                    share * state[name].to(tensor.device, wide) for share, state in zip(shares, states, strict=True)
                )
                tensor.copy_(sum(parts, torch.zeros((), dtype=wide, device=tensor.device)))
    return result if loader is None else calibrate(result, loader, **options)


def _state_of(model: Any, position: int) -> Mapping[str, Tensor]:
    if isinstance(model, nn.Module):
        return unwrapped(model).state_dict()
    if isinstance(model, Mapping):
        return model
    raise TypeError(f"models[{position}] must be a torch.nn.Module or a state dict, got {type(model).__name__}")


def _check_alike(first: Mapping[str, Tensor], other: Mapping[str, Tensor], position: int) -> None:
    differing = sorted(first.keys() ^ other.keys())
    if differing:
        raise ValueError(
            f"models[{position}] is of another architecture than models[0]: {differing[0]!r} is in one only"
        )
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"models[{position}] is of another architecture than models[0]: {name!r} has shape "
                f"{list(other[name].shape)}, not {list(tensor.shape)}"
            )
