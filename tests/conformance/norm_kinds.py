"""The normalization layers of the conformance tests, and what these share. A new layer joins by a line in KINDS."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from norm_formulas import (
    Estimates,
    Factor,
    Standardize,
    Tracked,
    Whole,
    as_batch_norm,
    as_cross_iteration,
    as_momentum,
    as_moving_average,
    as_population,
    as_renorm,
    batch_moments,
    closed_shares,
    mixed,
    mixed_with_finite_rest,
    momentum_factor,
    population_factor,
    regressed,
    running,
    second_moment,
    shares,
    splitting,
    switching,
    torch_factor,
    whitening,
)
from torch import Tensor, nn

import wellcond.nn
from pairs import parametrize_pairs

FLOAT64 = torch.float64
POSITIONS: dict[int, tuple[int, ...]] = {1: (5,), 2: (3, 2), 3: (2, 1, 2)}
PLAIN: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Kind:
    """A layer with options, and its formulas: of a channel (`standardize`, `estimates`), or of a batch (`whole`)."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    standardize: Standardize = as_batch_norm
    estimates: Estimates = running
    factor: Factor = torch_factor
    tracked: Tracked = batch_moments
    attributes: dict[str, float] = field(default_factory=dict)
    whole: Whole | None = None
    dims: tuple[int, ...] = (1, 2, 3)
    mixes_channels: bool = False

    def make(self, dims: int = 2, channels: int = 3, dtype: torch.dtype = FLOAT64, **overrides: Any) -> nn.Module:
        layer = getattr(wellcond.nn, f"{self.family}{dims}d")(channels, **{**self.options, **overrides}).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for number, (name, parameter) in enumerate(layer.named_parameters()):
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.1 * values if name.endswith("logits") else values + 1 - number)
        for name, value in self.attributes.items():
            setattr(layer, name, value)
        return layer

    @property
    def group_size(self) -> int | None:
        return self.options.get("group_size")


MOMENTUM = {"standardize": as_momentum, "factor": momentum_factor}
MOVING: dict[str, Any] = {
    "standardize": as_moving_average,
    "tracked": second_moment,
    "factor": population_factor,
}
HALF = {"stat_momentum": 0.625}  # a float32 number
WHITENING: dict[str, Any] = {"whole": whitening, "dims": (2,), "mixes_channels": True}
SWITCHABLE: dict[str, Any] = {"whole": switching(shares), "mixes_channels": True}
SPARSE: dict[str, Any] = {"whole": switching(closed_shares), "mixes_channels": True}

KINDS: dict[str, Kind] = {
    "momentum 0": Kind("MomentumBatchNorm", **MOMENTUM),
    "momentum": Kind("MomentumBatchNorm", **MOMENTUM, attributes=HALF),
    "momentum 1": Kind("MomentumBatchNorm", **MOMENTUM, attributes={"stat_momentum": 1.0}),
    "momentum ghost": Kind("MomentumBatchNorm", {"group_size": 2}, **MOMENTUM, attributes=HALF),
    "ghost": Kind("GhostBatchNorm", {"group_size": 2}),
    "ghost whole": Kind("GhostBatchNorm", {"group_size": 64}),
    "bsr": Kind("BSRBatchNorm", estimates=regressed),
    "bsr inexact": Kind("BSRBatchNorm", {"exact": False, "nonneg": "nnls"}, estimates=regressed),
    "bsr ghost": Kind("BSRBatchNorm", {"group_size": 2, "nonneg": "nnls"}, estimates=regressed),
    "renorm": Kind("BatchRenorm", {"r_max": 1.5, "d_max": 0.25}, as_renorm),
    "renorm closed": Kind("BatchRenorm", {"r_max": 1.0, "d_max": 0.0}, as_renorm),
    "renorm ghost": Kind("BatchRenorm", {"group_size": 2}, as_renorm),
    "evalnorm": Kind("EvalNorm", estimates=mixed),
    "evalnorm fixed": Kind("EvalNorm", {"learn": False}, estimates=mixed_with_finite_rest),
    "evalnorm ghost": Kind("EvalNorm", {"group_size": 2}, estimates=mixed),
    "moving average": Kind("MovingAverageBatchNorm", {"window": 3, "warmup_steps": 1, "scale_after": 2}, **MOVING),
    "moving average alone": Kind("MovingAverageBatchNorm", {"window": 1}, **MOVING),
    "moving average ghost": Kind("MovingAverageBatchNorm", {"window": 2, "group_size": 2, "warmup_steps": 0}, **MOVING),
    "cross-iteration": Kind("CrossIterationBatchNorm", {"compensate": False, "window": 3}, as_cross_iteration),
    "cross-iteration ghost": Kind(
        "CrossIterationBatchNorm",
        {"compensate": False, "window": 2, "burn_in": 2, "group_size": 2},
        as_cross_iteration,
    ),
    "cross-iteration alone": Kind("CrossIterationBatchNorm", {"compensate": False, "window": 1}),
    "population": Kind("PopulationNorm", {"momentum": 0.3}, as_population, factor=population_factor),
    "instance-batch": Kind("InstanceBatchNorm", whole=splitting, dims=(2,)),
    "batch-instance ghost": Kind(
        "InstanceBatchNorm", {"order": "batch_first", "group_size": 2}, whole=splitting, dims=(2,)
    ),
    "decorrelated": Kind("DecorrelatedBatchNorm", **WHITENING),
    "decorrelated alone": Kind("DecorrelatedBatchNorm", {"channels_per_group": 1}, whole=whitening, dims=(2,)),
    "iternorm": Kind("IterNorm", **WHITENING),
    "iternorm ghost": Kind("IterNorm", {"group_size": 2}, **WHITENING),
    "kalman": Kind("KalmanBatchNorm", dims=(2,)),
    "kalman ghost": Kind("KalmanBatchNorm", {"group_size": 2, "learned": False}, dims=(2,)),
    "switchable": Kind("SwitchableNorm", **SWITCHABLE),
    "switchable shared": Kind("SwitchableNorm", {"shared_logits": True, "normalizers": ("ln", "bn")}, **SWITCHABLE),
    "switchable ghost": Kind("SwitchableNorm", {"group_size": 2}, **SWITCHABLE),
    "sparse open": Kind("SparseSwitchableNorm", **SPARSE),
    "sparse": Kind("SparseSwitchableNorm", {"shared_logits": True}, **SPARSE, attributes={"radius": 0.25}),
}
# Those that train as nn.BatchNorm does.
BATCH_NORMS = (
    "momentum 0",
    "ghost whole",
    "bsr",
    "bsr inexact",
    "renorm closed",
    "evalnorm",
    "evalnorm fixed",
    "cross-iteration alone",
    "decorrelated alone",
)
# Those whose running statistics move by `momentum`.
TRACKING = {name: kind for name, kind in KINDS.items() if kind.tracked is batch_moments}
WITH_MOMENTUM = tuple(name for name, kind in TRACKING.items() if kind.factor is torch_factor)


def with_dimensions(
    test: Callable[..., None] | None = None, names: tuple[str, ...] = tuple(KINDS), only: tuple[int, ...] = (1, 2, 3)
) -> Any:
    """Run a test for each kind, and each of its numbers of dimensions."""
    cases = {f"{name}-{dims}": (KINDS[name], dims) for name in names for dims in KINDS[name].dims if dims in only}
    mark = pytest.mark.parametrize(("kind", "dims"), cases.values(), ids=cases)
    return mark if test is None else mark(test)


def with_pairs(
    *axes: tuple[str, Any], of: dict[str, Kind] = KINDS, only: tuple[int, ...] = (1, 2, 3)
) -> pytest.MarkDecorator:
    """Run a test for each kind, each of its numbers of dimensions, and any two values of these and of the axes."""

    def exists(kind: Kind, dims: int, *_: Any) -> bool:
        return dims in kind.dims

    return parametrize_pairs(("kind", of), ("dims", only), *axes, allowed=exists)


kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def draw(dims: int, step: int = 0, samples: int = 5, channels: int = 3, dtype: torch.dtype = FLOAT64) -> Tensor:
    generator = torch.Generator().manual_seed(100 * dims + step)
    x = torch.randn(samples, channels, *POSITIONS[dims], generator=generator, dtype=FLOAT64)
    instance = torch.randn(samples, channels, *(1 for _ in POSITIONS[dims]), generator=generator, dtype=FLOAT64)
    return ((0.7 * x + instance) * 1.5 + 0.5).to(dtype)


def groups(samples: int, size: int | None) -> list[tuple[int, int]]:
    """Consecutive samples, `size` at a time; a remainder of at most half a group joins the last group."""
    if size is None or samples <= size:
        return [(0, samples)]
    starts = list(range(0, samples, size))
    if len(starts) > 1 and 2 * (samples - starts[-1]) <= size:
        starts.pop()
    return list(zip(starts, [*starts[1:], samples], strict=True))


def wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().double() for name, value in state.items()}


def reference(kind: Kind, layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Train on x by loops in float64: the output, with a graph through x and the parameters; the running statistics."""
    before = wide(dict(layer.named_buffers()))
    bounds = groups(x.shape[0], kind.group_size)
    columns, means, variances = [], [], []
    for channel in range(x.shape[1]):
        of_channels = {name: value.dim() > 0 and len(value) == x.shape[1] for name, value in before.items()}
        state = {name: value[channel] if of_channels[name] else value for name, value in before.items()}
        rows = []
        for start, stop in bounds:
            own = x[start:stop, channel].double()
            count = own.numel()
            mean = own.sum() / count
            var = ((own - mean) ** 2).sum() / count
            rows.append(kind.standardize(layer, state, own, mean, var))
            for found, value in zip((means, variances), kind.tracked(layer, state, own, mean, var), strict=True):
                found.append(value.detach())
        columns.append(torch.cat(rows))
    y = torch.stack(columns, 1)
    if kind.whole is not None:
        y = kind.whole(layer, before, x.double().reshape(*x.shape[:2], -1), bounds).reshape(x.shape)
    factor = kind.factor(layer, before, x.shape[0])
    shape = (x.shape[1], len(bounds))
    after = {
        "running_mean": (1 - factor) * before["running_mean"] + factor * torch.stack(means).view(shape).mean(1),
        "running_var": (1 - factor) * before["running_var"] + factor * torch.stack(variances).view(shape).mean(1),
    }
    return with_affine(layer, y), after


def with_affine(layer: nn.Module, y: Tensor) -> Tensor:
    if layer.weight is None:
        return y
    shape = (-1,) + (1,) * (y.dim() - 2)
    return y * layer.weight.double().view(shape) + layer.bias.double().view(shape)


def evaluated(kind: Kind, layer: nn.Module, x: Tensor) -> Tensor:
    """Evaluate on x by the formula in float64."""
    state, x = wide(dict(layer.named_buffers())), x.double()
    flat = x.reshape(*x.shape[:2], -1)
    if kind.whole is not None:
        return with_affine(layer, kind.whole(layer, state, flat, None).reshape(x.shape))
    mean, var = kind.estimates(state, flat.mean(2), flat.var(2, correction=0), flat.shape[2])
    y = (flat - mean.unsqueeze(2)) / (var.unsqueeze(2) + layer.eps) ** 0.5
    return with_affine(layer, y.reshape(x.shape))


def gradients(y: Tensor, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    return [grad.double() for grad in torch.autograd.grad(y, tensors, upstream.to(y.dtype))]


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def check_training(kind: Kind, layer: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """One training step's output, gradients and running statistics against the loops."""
    x = x.detach().requires_grad_()
    expected, running_after = reference(kind, layer, x)
    y = layer(x)
    close(y.double(), expected, tolerance)
    assert y.dtype == x.dtype
    upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
    tensors = [x, *layer.parameters()]
    close(gradients(y, tensors, upstream), gradients(expected, tensors, upstream.to(y.dtype)), tolerance)
    close({name: getattr(layer, name).double() for name in running_after}, running_after, tolerance)


def check_evaluation(kind: Kind, layer: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """Evaluation's output and gradients against the formula, and that it changes nothing."""
    layer.eval()
    x, state = x.detach().requires_grad_(), copy.deepcopy(layer.state_dict())
    y, expected = layer(x), evaluated(kind, layer, x)
    close(y.double(), expected, tolerance)
    upstream = torch.cos(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
    tensors = [x, *layer.parameters()]
    close(gradients(y, tensors, upstream), gradients(expected, tensors, upstream.to(y.dtype)), tolerance)
    assert torch.equal(layer(x), y)
    assert_same_state(layer.state_dict(), state)


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def trained(kind: Kind, dims: int = 2, steps: int = 3, **options: Any) -> nn.Module:
    layer = kind.make(dims, **options)
    for step in range(steps):
        layer(draw(dims, 50 + step))
    return layer
