"""What every normalization layer must do, whatever it computes. A new layer joins by a line in KINDS."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import wellcond.nn

FLOAT64 = torch.float64
POSITIONS: dict[int, tuple[int, ...]] = {1: (5,), 2: (3, 2), 3: (2, 1, 2)}
PLAIN: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


# How each layer normalizes a group x [n, positions] of one channel, from the formulas. `mean` and `var` are the group's
# own, with their graph; `state` are the channel's buffers before the batch. All in float64.
Standardize = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]


def as_batch_norm(layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return (x - mean) / (var + layer.eps) ** 0.5


def as_momentum(layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    share = layer.stat_momentum  # (2.9)
    mean = share * state["train_mean"] + (1 - share) * mean
    var = share * state["train_var"] + (1 - share) * var
    return (x - mean) / (var + layer.eps) ** 0.5


def as_cross_iteration(layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Without the compensation, which needs a layer before."""
    seen = int(state["batches_seen"])
    past = list(range(min(seen, layer.window - 1))) if seen >= layer.burn_in else []
    means, variances = [state["past_mean"][t] for t in past], [state["past_var"][t] for t in past]
    joint = (mean + sum(means)) / (1 + len(past))
    # Of all batches' values together; E[x²] − μ̄² would keep no digit of means far from zero.
    parts = [var + (mean - joint) ** 2, *(v + (m - joint) ** 2 for m, v in zip(means, variances, strict=True))]
    return (x - joint) / (sum(parts) / len(parts) + layer.eps) ** 0.5


def as_renorm(layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    own, running = (var + layer.eps) ** 0.5, (state["running_var"] + layer.eps) ** 0.5
    r = (own / running).detach().clamp(1 / layer.r_max, layer.r_max)
    d = ((mean - state["running_mean"]) / running).detach().clamp(-layer.d_max, layer.d_max)
    return (x - mean) / own * r + d


def as_population(layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    share = max(1 / (int(state["num_batches_tracked"]) + 1), layer.momentum)
    mean = (1 - share) * state["running_mean"] + share * mean
    var = (1 - share) * state["running_var"] + share * var
    return (x - mean) / (var + layer.eps) ** 0.5


class ByMovingAverages(torch.autograd.Function):
    """MABN of one group and channel, from the paper: its backward is no derivative, so autograd has to be told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, r: Tensor, past: Tensor | None) -> Tensor:
        z = x / root
        ctx.past = past
        ctx.save_for_backward(z, root, r)
        return r * z

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        z, root, r = ctx.saved_tensors
        g = r * upstream
        psi = (z * g).mean()
        if ctx.past is not None:
            psi = (psi + ctx.past.sum()) / (len(ctx.past) + 1)
        return (g - z * psi) / root, None, None, None


def as_moving_average(layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    root = (moving_square(layer, state, x.detach()) + layer.eps) ** 0.5
    r = (root / (state["running_var"] + layer.eps) ** 0.5).clamp(0.2, 5.0)
    if state["squares_seen"] < max(layer.scale_after, layer.warmup_steps):
        r = torch.ones(())
    full = state["products_seen"] >= max(layer.window - 1, layer.warmup_steps)
    return ByMovingAverages.apply(x - state["running_mean"], root, r, state["past_products"] if full else None)


def moving_square(layer: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    own = ((x - state["running_mean"]) ** 2).mean()
    if state["squares_seen"] < max(layer.window - 1, layer.warmup_steps):
        return own
    return (own + state["past_squares"].sum()) / layer.window


# What each layer evaluates an instance with, of the buffers, the instance's own mean and variance [N, C], and over how
# many positions these are.
Estimates = Callable[[dict[str, Tensor], Tensor, Tensor, int], tuple[Tensor, Tensor]]


def running(state: dict[str, Tensor], mean: Tensor, var: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    return state["running_mean"].expand_as(mean), state["running_var"].expand_as(var)


def regressed(state: dict[str, Tensor], mean: Tensor, var: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    alpha, beta = state["mean_weights"], state["var_weights"]
    off = (mean - state["running_mean"]) ** 2
    return alpha[:, 0] * mean + alpha[:, 1], beta[:, 0] * var + beta[:, 1] * off + beta[:, 2]  # (3.9)


def mixed(state: dict[str, Tensor], mean: Tensor, var: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    alpha, beta = state["mean_mixture"], state["var_mixture"]
    off = (mean - state["running_mean"]) ** 2
    f_mean = alpha * mean + (1 - alpha) * state["running_mean"]  # (3.6)
    return f_mean, beta * var + (1 - beta) * state["running_var"] + beta * (1 - beta) * off  # (3.6)


def mixed_with_finite_rest(state: dict[str, Tensor], mean: Tensor, var: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    f_mean, f_var = mixed(state, mean, var, elements)
    beta = state["var_mixture"]
    # (3.7): −(1 − β)²σ²/n, where the rest has n = hw(m − 1) values and β = 1/m.
    return f_mean, f_var - beta * (1 - beta) * state["running_var"] / elements


# What a group of one channel adds to the running mean and variance, given as `Standardize` is.
Tracked = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_moments(
    layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    return mean, var * x.numel() / max(x.numel() - 1, 1)


def second_moment(
    layer: nn.Module, state: dict[str, Tensor], x: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    return state["running_mean"], moving_square(layer, state, x)


# The weight of a batch of so many samples in the running statistics; `state` counts the batches before it.
Factor = Callable[[nn.Module, dict[str, Tensor], int], float]


def torch_factor(layer: nn.Module, state: dict[str, Tensor], samples: int) -> float:
    return 1 / (int(state["num_batches_tracked"]) + 1) if layer.momentum is None else layer.momentum


def momentum_factor(layer: nn.Module, state: dict[str, Tensor], samples: int) -> float:
    return 1 - 0.85 ** (samples / 32)  # (2.13)


def population_factor(layer: nn.Module, state: dict[str, Tensor], samples: int) -> float:
    return max(1 / (int(state["num_batches_tracked"]) + 1), layer.momentum)


# How a layer whose channels or instances depend on each other standardizes x [N, C, positions] of float64: in training,
# with the bounds of its ghost groups, and in evaluation, where these are None.
Whole = Callable[[nn.Module, dict[str, Tensor], Tensor, "list[tuple[int, int]] | None"], Tensor]


def shares(layer: nn.Module, logits: Tensor | None) -> dict[str, Tensor]:
    exponentials = (layer.mean_logits if logits is None else logits).double().exp()
    return dict(zip(layer.normalizers, exponentials / exponentials.sum(), strict=True))


def closed_shares(layer: nn.Module, logits: Tensor | None) -> dict[str, Tensor]:
    """SparsestMax where the circle's point is inside of the simplex; `test_sparsestmax` has the other cases."""
    values = (layer.mean_logits if logits is None else logits).double()
    centre = torch.full_like(values, 1 / len(values))
    flat = values - values.mean() + centre  # on the simplex's plane; inside of the simplex for small logits
    assert (flat > 0).all()
    away = flat - centre
    distance = (away**2).sum() ** 0.5
    pushed = flat if distance >= layer.radius else centre + layer.radius * away / distance
    assert (pushed > 0).all()
    return dict(zip(layer.normalizers, pushed, strict=True))


def switching(of: Callable[[nn.Module, Tensor | None], dict[str, Tensor]]) -> Whole:
    """Σ w μ and Σ w' σ² of instance, layer and batch, instance by instance."""

    def standardize(
        layer: nn.Module, state: dict[str, Tensor], x: Tensor, bounds: list[tuple[int, int]] | None
    ) -> Tensor:
        of_mean, of_var = of(layer, layer.mean_logits), of(layer, layer.var_logits)
        rows = []
        for number, instance in enumerate(x):
            means = {"in": instance.mean(1), "ln": instance.mean()}
            variances = {
                "in": ((instance - means["in"][:, None]) ** 2).mean(1),
                "ln": ((instance - means["ln"]) ** 2).mean(),
            }
            if "bn" in layer.normalizers and bounds is None:
                means["bn"], variances["bn"] = state["running_mean"], state["running_var"]
            elif "bn" in layer.normalizers:
                (start, stop) = next(each for each in bounds if each[0] <= number < each[1])
                batch = x[start:stop].transpose(0, 1).flatten(1)
                means["bn"] = batch.mean(1)
                variances["bn"] = ((batch - batch.mean(1, keepdim=True)) ** 2).mean(1)
            mean = sum(of_mean[name] * means[name] for name in layer.normalizers) + torch.zeros(len(instance))
            var = sum(of_var[name] * variances[name] for name in layer.normalizers) + torch.zeros(len(instance))
            rows.append((instance - mean[:, None]) / (var[:, None] + layer.eps) ** 0.5)
        return torch.stack(rows)

    return standardize


def splitting(layer: nn.Module, state: dict[str, Tensor], x: Tensor, bounds: list[tuple[int, int]] | None) -> Tensor:
    """Some channels by instance, the others by batch, channel by channel."""
    columns = []
    for channel in range(x.shape[1]):
        own, first = x[:, channel], layer.order == "instance_first"
        share = len(x[0]) * (layer.instance_fraction if first else 1 - layer.instance_fraction)
        if (channel < int(share)) == first:
            mean = own.mean(1, keepdim=True)
            var = ((own - mean) ** 2).mean(1, keepdim=True)
        elif bounds is None:
            mean, var = state["running_mean"][channel], state["running_var"][channel]
        else:
            parts = [own[start:stop] for start, stop in bounds]
            mean = torch.cat([part.mean().expand(len(part), 1) for part in parts])
            var = torch.cat([((part - part.mean()) ** 2).mean().expand(len(part), 1) for part in parts])
        columns.append((own - mean) / (var + layer.eps) ** 0.5)
    return torch.stack(columns, 1)


def inverse_root(matrix: Tensor) -> Tensor:
    """By Newton's iteration, whose gradient is finite for repeated eigenvalues too."""
    scale, identity = matrix.trace(), torch.eye(len(matrix), dtype=matrix.dtype)
    root, rest = identity, matrix / scale
    for _ in range(40):
        step = (3 * identity - rest) / 2
        root, rest = root @ step, step @ step @ rest
    return root / scale**0.5


def inverse_root_in_steps(matrix: Tensor, steps: int) -> Tensor:
    normed, power = matrix / matrix.trace(), torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(steps):
        power = 1.5 * power - 0.5 * torch.linalg.matrix_power(power, 3) @ normed
    return power / matrix.trace() ** 0.5


def whitening(layer: nn.Module, state: dict[str, Tensor], x: Tensor, bounds: list[tuple[int, int]] | None) -> Tensor:
    """Groups of channels by the inverse square root of their covariance, ghost group by ghost group."""
    width = layer.channels_per_group
    batches = []
    for start, stop in [(0, len(x))] if bounds is None else bounds:
        parts = []
        for number, group in enumerate(x[start:stop].split(width, 1)):
            rows = group.transpose(1, 2).reshape(-1, width)
            if bounds is None:
                mean, root = state["running_mean"].view(-1, width)[number], state["running_whitening"][number]
            else:
                mean = rows.mean(0)
                off = rows - mean
                damped = off.T @ off / len(rows) + layer.eps * torch.eye(width, dtype=x.dtype)
                steps = getattr(layer, "steps", None)
                root = inverse_root(damped) if steps is None else inverse_root_in_steps(damped, steps)
            parts.append(((rows - mean) @ root.T).view(stop - start, -1, width).transpose(1, 2))
        batches.append(torch.cat(parts, 1))
    return torch.cat(batches)


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


# ------------------------------------------------------------------------------------------------ the layer's formulas


@with_dimensions
def test_training_follows_the_formula(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(4):
        check_training(kind, layer, draw(dims, step))
    assert int(layer.num_batches_tracked) == 4


@with_dimensions
def test_evaluation_follows_the_formula(kind: Kind, dims: int) -> None:
    check_evaluation(kind, trained(kind, dims), draw(dims))


@with_dimensions(only=(1,))
def test_two_dimensional_input(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(3):
        check_training(kind, layer, draw(1, step, samples=6)[..., 0])
    check_evaluation(kind, layer, draw(1, 9)[..., 0])


@with_dimensions
def test_one_position(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    if kind.whole is splitting:
        for training in (True, False):
            with pytest.raises(ValueError, match="expected more than 1 position"):
                layer.train(training)(draw(dims, samples=6)[:, :, :1, :1])
        return
    for step in range(3):
        check_training(kind, layer, draw(dims, step, samples=6).flatten(2)[..., :1].unflatten(2, (1,) * dims))
    check_evaluation(kind, layer, draw(dims, 9).flatten(2)[..., :1].unflatten(2, (1,) * dims))


@with_dimensions
def test_one_instance(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(3):
        check_training(kind, layer, draw(dims, step, samples=1))
    check_evaluation(kind, layer, draw(dims, 9, samples=1))


@with_dimensions
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_constant_input(kind: Kind, dims: int, value: float) -> None:
    """No variance at all: what is left of x − μ is rounding, which 1/√ε magnifies."""
    layer = kind.make(dims, dtype=torch.float32)
    for _ in range(4):
        check_training(kind, layer, torch.full((4, 3, *POSITIONS[dims]), value), 2e-3)
    check_evaluation(kind, layer, torch.full((4, 3, *POSITIONS[dims]), value), 2e-3)
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@with_dimensions
def test_dead_channel(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    for step in range(4):
        x = draw(dims, step)
        x[:, 1] = 0
        check_training(kind, layer, x)
    check_evaluation(kind, layer, x)
    check_evaluation(kind, layer, draw(dims, 9))  # the channel comes alive
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@with_dimensions
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_mean_far_from_zero(kind: Kind, dims: int, dtype: torch.dtype) -> None:
    """E[x²] − μ² would keep no digit in float32: the squares are 10⁸ times the variance."""
    layer = kind.make(dims, dtype=dtype)
    tolerance = 1e-10 if dtype == FLOAT64 else 1e-2  # the mean's own rounding is 5e-4 of the deviation
    offset = torch.tensor([1e4, -1e4, 0.0], dtype=FLOAT64).view(1, 3, *(1 for _ in POSITIONS[dims]))
    for step in range(4):
        x = (draw(dims, step) + offset).to(dtype)
        expected, _ = reference(kind, layer, x)
        close(layer(x).double(), expected, tolerance)
    state = wide(dict(layer.named_buffers()))
    if kind.family not in (
        "MomentumBatchNorm",
        "MovingAverageBatchNorm",
        "PopulationNorm",
    ):  # whose running_var has much of 1 or of the mean left, or is no variance
        assert (state["running_var"] < 10).all()
    layer.eval()
    close(layer(x).double(), evaluated(kind, layer, x), tolerance)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_format_and_group(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(KINDS.values())), "kind")
    dims = data.draw(st.sampled_from(kind.dims), "dims")
    if kind.group_size:
        kind = Kind(**{**vars(kind), "options": {**kind.options, "group_size": data.draw(st.integers(2, 5), "group")}})
    channels = data.draw(st.integers(1 + (kind.whole is splitting), 4), "channels")  # Some must be of each part.
    layer = kind.make(dims, channels, affine=data.draw(st.booleans(), "affine"))
    for _ in range(2):
        # One position alone leaves nothing but the bias of what is normalized by instance, and is refused.
        least = [1] * (dims - 1) + [2 if kind.whole is splitting else 1]
        sizes = [data.draw(st.integers(size, 3)) for size in least]
        x = torch.randn(data.draw(st.integers(2, 8), "samples"), channels, *sizes, dtype=FLOAT64)
        memory = data.draw(
            st.sampled_from(["contiguous", "channels last", "transposed", "sliced", "flipped"]), "memory"
        )
        if memory == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif memory == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif memory == "sliced":
            x = torch.cat([x, x], -1)[..., ::2]
        elif memory == "flipped":
            x = x.flip(0)
        check_training(kind, layer, 3 * x - 1, 1e-8)
    check_evaluation(kind, layer, 3 * x - 1, 1e-8)


# --------------------------------------------------------------------------------------------------- as nn.BatchNorm


@with_dimensions(names=BATCH_NORMS)
@pytest.mark.parametrize("momentum", [0.1, 0.7])
@pytest.mark.parametrize("affine", [True, False])
def test_trains_as_batch_norm(kind: Kind, dims: int, momentum: float, affine: bool) -> None:
    layer = kind.make(dims, affine=affine)
    plain = PLAIN[dims](3, momentum=momentum, affine=affine).to(FLOAT64)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in plain.state_dict()})
    if kind.factor is torch_factor:
        layer.momentum = momentum
    else:
        plain.momentum = momentum_factor(layer, {}, 5)
    for step in range(4):
        x, other = draw(dims, step).requires_grad_(), draw(dims, step).requires_grad_()
        y, expected = layer(x), plain(other)
        close(y, expected, 1e-12)
        y.square().sum().backward()
        expected.square().sum().backward()
        close(x.grad, other.grad, 1e-12)
    for name, value in plain.state_dict().items():
        close(layer.state_dict()[name], value, 1e-12)
    for parameter, other in zip(layer.parameters(), plain.parameters(), strict=True):
        close(parameter.grad, other.grad, 1e-11)


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_momentum_none_averages_all_batches(name: str) -> None:
    kind = KINDS[name]
    layer = kind.make(2, momentum=None)
    means, variances = [], []
    for step in range(4):
        x = draw(2, step)
        for start, stop in groups(len(x), kind.group_size):
            means.append(x[start:stop].mean((0, 2, 3)))
            variances.append(x[start:stop].transpose(0, 1).flatten(1).var(1))
        check_training(kind, layer, x)
    close(layer.running_mean, torch.stack(means).mean(0))
    close(layer.running_var, torch.stack(variances).mean(0))


@with_dimensions
@pytest.mark.parametrize("counted", [True, False], ids=["with the counter", "of an old torch"])
def test_loads_a_plain_state_dict(kind: Kind, dims: int, counted: bool) -> None:
    plain = PLAIN[dims](3).to(FLOAT64)
    for step in range(3):
        plain(draw(dims, step))
    state = plain.state_dict()
    if not counted:
        state = {name: value for name, value in state.items() if name != "num_batches_tracked"}
    layer = trained(kind, dims).eval()  # what it had must go
    assert layer.load_state_dict(state, strict=True) == ([], [])
    fresh = kind.make(dims)
    fresh.load_state_dict(state)
    if kind.whole is None:
        close(layer(draw(dims, 9)), plain.eval()(draw(dims, 9)), 1e-12)
        close(fresh.eval()(draw(dims, 9)), plain(draw(dims, 9)), 1e-12)
    else:
        check_evaluation(kind, layer, draw(dims, 9))
        close(fresh.eval()(draw(dims, 9)), layer(draw(dims, 9)), 1e-12)
    for name, value in plain.state_dict().items():
        close(layer.state_dict()[name], value, 1e-12)


@with_dimensions
def test_state_loads_into_a_plain_one(kind: Kind, dims: int) -> None:
    layer, plain = trained(kind, dims), PLAIN[dims](3).to(FLOAT64)
    missing, _ = plain.load_state_dict(layer.state_dict(), strict=False)
    assert not missing
    x = draw(dims, 9)
    mean, var = layer.running_mean, layer.running_var
    close(plain.eval()(x), nn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps), 1e-12)
    if kind.estimates is running and kind.whole is None:
        close(layer.eval()(x), plain(x), 1e-12)


@kinds
def test_is_a_batch_norm(kind: Kind) -> None:
    for dims in kind.dims:
        assert isinstance(kind.make(dims), PLAIN[dims])


@with_dimensions
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["float32 module", "cast module"])
def test_half_precision(kind: Kind, dims: int, training: bool, dtype: torch.dtype, cast: bool) -> None:
    """Inputs are rounded, statistics are not."""
    layer = kind.make(dims, dtype=torch.float32)
    for step in range(2):
        layer(draw(dims, 50 + step).float())
    if cast:
        state = {name: value.clone() for name, value in layer.named_buffers()}
        layer.to(dtype)
        assert_same_state(dict(layer.named_buffers()), state)
        assert all(parameter.dtype == dtype for parameter in layer.parameters())
    layer.train(training)
    x = draw(dims, 1, dtype=dtype).requires_grad_()
    if training:
        expected, after = reference(kind, layer, x)
        y = layer(x)
        for name, value in after.items():
            close(getattr(layer, name).double(), value, 1e-5)
    else:
        expected, y = evaluated(kind, layer, x), layer(x)
    assert y.dtype == nn.functional.batch_norm(x, *([torch.ones(3)] * 4)).dtype == dtype
    unit = torch.finfo(dtype).eps
    close(y.double(), expected, 2 * unit)
    upstream = draw(dims, 2, dtype=dtype)
    tensors = [x, *layer.parameters()]
    raw = torch.autograd.grad(y, tensors, upstream)
    assert [grad.dtype for grad in raw] == [tensor.dtype for tensor in tensors]
    for grad, exact in zip(raw, gradients(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=4 * unit, atol=4 * unit * float(exact.abs().max()))


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_autocast(kind: Kind, training: bool) -> None:
    """Under autocast a layer is fed the previous one's half precision; a float32 input stays one."""
    layer, plain = trained(kind, dtype=torch.float32, steps=0).train(training), nn.BatchNorm2d(3).train(training)
    convolution = nn.Conv2d(3, 3, 1)
    x = draw(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = convolution(x)
        assert layer(hidden).dtype == plain(hidden).dtype == torch.bfloat16
        twin = copy.deepcopy(layer)
        expected = reference(kind, twin, x)[0] if training else evaluated(kind, twin, x)
        y = layer(x)
    assert y.dtype == torch.float32
    close(y.double(), expected, 1e-4)
    assert all(buffer.dtype in (torch.float32, FLOAT64, torch.int64) for buffer in layer.buffers())


# ------------------------------------------------------------------------------------------------------ memory layout


@with_dimensions(only=(2, 3))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.bfloat16], ids=str)
def test_channels_last_is_kept(kind: Kind, dims: int, training: bool, dtype: torch.dtype) -> None:
    memory_format = CHANNELS_LAST[dims]
    layer = kind.make(dims, dtype=FLOAT64 if dtype == FLOAT64 else torch.float32)
    x = draw(dims, dtype=dtype)
    other, twin = x.clone(), copy.deepcopy(layer)
    x = x.to(memory_format=memory_format)
    for tensor in (x, other):
        tensor.requires_grad_()
    y, expected = layer.train(training)(x), twin.train(training)(other)
    assert y.is_contiguous(memory_format=memory_format)
    assert expected.is_contiguous()
    upstream = draw(dims, 1, dtype=dtype)
    y.backward(upstream)  # whose format is another
    expected.backward(upstream.to(memory_format=memory_format))
    assert x.grad.is_contiguous(memory_format=memory_format)
    assert other.grad.is_contiguous()
    tolerance = {FLOAT64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close(y, expected, tolerance)
    close(x.grad, other.grad, tolerance)
    close(layer.weight.grad, twin.weight.grad, 5 * tolerance)


@with_dimensions
@pytest.mark.parametrize("training", [True, False])
def test_memory_that_is_not_contiguous(kind: Kind, dims: int, training: bool) -> None:
    views = {
        "strided": torch.cat([draw(dims), draw(dims, 1)], -1)[..., ::2],
        "permuted": draw(dims).transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": draw(dims)[:, :, :1].expand(-1, -1, 3, *(-1 for _ in POSITIONS[dims][1:])),
        "one for all": draw(dims, samples=1).expand(4, *(-1 for _ in draw(dims).shape[1:])),
    }
    for name, x in views.items():
        layer = trained(kind, dims).train(training)
        twin = copy.deepcopy(layer)
        other = x.clone(memory_format=torch.contiguous_format).requires_grad_()
        x = x.detach().requires_grad_()
        assert not x.is_contiguous(), name
        y, expected = layer(x), twin(other)
        close(y, expected, 1e-11)
        upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
        y.backward(upstream)
        expected.backward(upstream)
        close(x.grad, other.grad, 1e-11)
        close(dict(layer.named_buffers()), dict(twin.named_buffers()), 1e-9)


@with_dimensions
@pytest.mark.parametrize("training", [True, False])
def test_expanded_incoming_gradient(kind: Kind, dims: int, training: bool) -> None:
    layer = trained(kind, dims).train(training)
    x = draw(dims).requires_grad_()
    expected = reference(kind, layer, x)[0] if training else evaluated(kind, layer, x)
    y = layer(x)
    tensors = [x, *layer.parameters()]
    close(torch.autograd.grad(y.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))


@kinds
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_one_alone(kind: Kind, wanted: str, training: bool) -> None:
    layer = trained(kind).train(training)
    x = draw(2).requires_grad_(wanted == "x")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == wanted)
    expected = reference(kind, layer, x)[0] if training else evaluated(kind, layer, x)
    y = layer(x)
    tensor = x if wanted == "x" else getattr(layer, wanted)
    upstream = draw(2, 1)
    close(torch.autograd.grad(y, tensor, upstream), torch.autograd.grad(expected, tensor, upstream))


# -------------------------------------------------------------------------------------------------------------- state


@with_dimensions
def test_state_dict_round_trip(kind: Kind, dims: int) -> None:
    layer = trained(kind, dims)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = getattr(wellcond.nn, f"{kind.family}{dims}d")(3, **kind.options).to(FLOAT64)  # λ is state, r_max too
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(other.state_dict(), layer.state_dict())
    for step in range(2):
        assert torch.equal(other(draw(dims, step)), layer(draw(dims, step)))
    assert_same_state(other.state_dict(), layer.state_dict())
    assert torch.equal(other.eval()(draw(dims)), layer.eval()(draw(dims)))


@kinds
def test_loading_in_evaluation_mode(kind: Kind) -> None:
    layer, other = trained(kind), kind.make().eval()
    state = layer.state_dict()  # of a layer in training
    other.load_state_dict(state)
    assert torch.equal(other(draw(2)), layer.eval()(draw(2)))


@kinds
@pytest.mark.parametrize("way", ["deep copy", "pickle", "save"])
@pytest.mark.parametrize("training", [True, False])
def test_copies_go_on_by_themselves(kind: Kind, way: str, training: bool) -> None:
    layer = trained(kind).train(training)
    if way == "deep copy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.training == training
    assert repr(other) == repr(layer)
    state = copy.deepcopy(layer.state_dict())
    x = draw(2)
    y = other.train()(x)
    assert_same_state(layer.state_dict(), state)
    assert torch.equal(layer.train()(x), y)
    assert_same_state(layer.state_dict(), other.state_dict())
    assert torch.equal(layer.eval()(x), other.eval()(x))


@with_dimensions
def test_evaluation_does_not_depend_on_the_batch(kind: Kind, dims: int) -> None:
    layer, x = trained(kind, dims).eval(), draw(dims)
    close(layer(x), torch.cat([layer(instance) for instance in x.split(1)]), 1e-12)


@kinds
def test_back_to_training(kind: Kind) -> None:
    layer, other = trained(kind), trained(kind)
    layer.eval()(draw(2))
    layer.train()
    for step in range(2):
        assert torch.equal(layer(draw(2, step)), other(draw(2, step)))
    assert torch.equal(layer.eval()(draw(2)), other.eval()(draw(2)))


@kinds
def test_training_without_gradients_counts(kind: Kind) -> None:
    layer, other, third = trained(kind), trained(kind), trained(kind)
    expected = layer(draw(2))
    with torch.no_grad():
        assert torch.equal(other(draw(2)), expected)
    with torch.inference_mode():
        assert torch.equal(third(draw(2)), expected)
    assert_same_state(other.state_dict(), layer.state_dict())
    assert_same_state(third.state_dict(), layer.state_dict())
    layer(draw(2, 1).requires_grad_()).sum().backward()  # after inference mode, too
    third(draw(2, 1).requires_grad_()).sum().backward()
    assert_same_state(third.state_dict(), layer.state_dict())


@kinds
def test_reset(kind: Kind) -> None:
    layer, fresh = trained(kind), kind.make()
    layer.reset_parameters()
    fresh.reset_parameters()
    assert_same_state(layer.state_dict(), fresh.state_dict())
    close(layer.weight, torch.ones(3))
    close(layer.bias, torch.zeros(3))
    close(layer.running_var, torch.ones(3))
    assert torch.equal(layer(draw(2)), fresh(draw(2)))
    assert torch.equal(layer.eval()(draw(2)), fresh.eval()(draw(2)))


@kinds
def test_reset_of_memory_that_was_not_initialized(kind: Kind) -> None:
    """A model may be made on the meta device, given memory, and then reset."""
    layer = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(7)
    layer.reset_parameters()
    fresh = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options)
    assert_same_state(layer.state_dict(), fresh.state_dict())
    x = draw(2, dtype=torch.float32)
    assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer.eval()(x), fresh.eval()(x))


@kinds
def test_dtype_of_the_parameters(kind: Kind) -> None:
    layer = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    wide_layer = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options, dtype=FLOAT64)
    assert wide_layer.running_mean.dtype == wide_layer.running_var.dtype == FLOAT64


@kinds
def test_cast_there_and_back_rounds_no_statistics(kind: Kind) -> None:
    layer = kind.make(dtype=torch.float32)
    for step in range(3):
        layer(draw(2, step, dtype=torch.float32))
    state = {name: value.clone() for name, value in layer.named_buffers()}
    layer.half().bfloat16().float()
    assert_same_state(dict(layer.named_buffers()), state)


@kinds
def test_gradients_accumulate(kind: Kind) -> None:
    """Two passes, one after the other or both before the backward: each with the statistics that it had."""
    layer, other = trained(kind), trained(kind)
    x = [draw(2, step).requires_grad_() for step in range(3)]
    expected = [torch.zeros(3, dtype=FLOAT64), torch.zeros(3, dtype=FLOAT64)]
    by_hand = []
    for inputs in x:
        y, _ = reference(kind, layer, inputs)
        first, *rest = torch.autograd.grad(y, [inputs, layer.weight, layer.bias], draw(2, 7))
        by_hand.append(first)
        expected = [total + grad for total, grad in zip(expected, rest, strict=True)]
        layer(inputs).backward(draw(2, 7))
    close([inputs.grad for inputs in x], by_hand)
    close([layer.weight.grad, layer.bias.grad], expected)
    again = [inputs.detach().clone().requires_grad_() for inputs in x]
    outputs = [other(inputs) for inputs in again]
    for y in outputs:
        y.backward(draw(2, 7))
    close([inputs.grad for inputs in again], by_hand)
    close([other.weight.grad, other.bias.grad], expected)
    close(dict(other.named_buffers()), dict(layer.named_buffers()), 1e-14)


@pytest.mark.parametrize("kind", TRACKING.values(), ids=TRACKING)
def test_batch_norms_of_averaged_weights_are_updated(kind: Kind) -> None:
    """After weight averaging, torch's `update_bn` replaces running statistics by those of a pass over the data."""
    layer = trained(kind)
    momentum = layer.momentum
    data = [draw(2, step) for step in range(4)]
    torch.optim.swa_utils.update_bn(data, layer)
    chunks = [x[start:stop] for x in data for start, stop in groups(len(x), kind.group_size)]
    close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in chunks]).mean(0), 1e-6)
    close(layer.running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in chunks]).mean(0), 1e-6)
    assert layer.momentum == momentum


# ------------------------------------------------------------------------------------------------- too little, wrong


@with_dimensions
@pytest.mark.parametrize("training", [True, False])
def test_no_samples(kind: Kind, dims: int, training: bool) -> None:
    """As nn.BatchNorm, but for the statistics, which an empty batch says nothing about."""
    layer = trained(kind, dims).train(training)
    before = {name: value for name, value in wide(layer.state_dict()).items() if name != "num_batches_tracked"}
    x = draw(dims)[:0].requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    close(layer.weight.grad, torch.zeros(3))
    after = wide(layer.state_dict())
    close({name: after[name] for name in before}, before)


@with_dimensions
def test_one_value_per_channel_is_refused(kind: Kind, dims: int) -> None:
    layer = trained(kind, dims)
    state = copy.deepcopy(layer.state_dict())
    x = torch.ones(1, 3, *(1 for _ in POSITIONS[dims]), dtype=FLOAT64)
    with pytest.raises(ValueError, match="(?i)expected more than 1 value per channel when training, got input size"):
        layer(x)
    assert_same_state(layer.state_dict(), state)
    if kind.whole is not splitting:
        check_evaluation(kind, layer, x)


@with_dimensions
@pytest.mark.parametrize("training", [True, False])
def test_wrong_channels_are_refused(kind: Kind, dims: int, training: bool) -> None:
    layer = trained(kind, dims).train(training)
    state = copy.deepcopy(layer.state_dict())
    for channels in (1, 2, 4):  # one would broadcast
        with pytest.raises(ValueError, match="expected 3 channels"):
            layer(draw(dims, channels=channels))
    assert_same_state(layer.state_dict(), state)


@with_dimensions
def test_wrong_number_of_dimensions_is_refused(kind: Kind, dims: int) -> None:
    layer = kind.make(dims)
    with pytest.raises(ValueError, match=r"expected .* input \(got .* input\)"):
        layer(draw(dims).unsqueeze(-1))


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_not_a_number_does_not_spread_over_channels(kind: Kind, training: bool) -> None:
    layer = trained(kind).train(training)
    x = draw(2)
    x[0, 1, 0, 0] = torch.nan
    y = layer(x)
    assert y[0, 1, 0, 0].isnan()
    if not kind.mixes_channels:
        assert y[:, [0, 2]].isfinite().all()
    assert layer.running_mean[[0, 2]].isfinite().all()


@with_dimensions
def test_without_affine(kind: Kind, dims: int) -> None:
    layer = kind.make(dims, affine=False)
    assert layer.weight is None
    assert layer.bias is None
    for step in range(2):
        check_training(kind, layer, draw(dims, step))
    check_evaluation(kind, layer, draw(dims))


@kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1e-5}, "eps"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 1.5}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"synchronize": True, "group_size": 2}, "synchronize"),
        ({"num_features": 0}, "num_features"),
    ],
    ids=str,
)
def test_bad_options_are_refused(kind: Kind, options: dict[str, Any], message: str) -> None:
    takes = set(inspect.signature(type(kind.make())).parameters)
    if not takes >= options.keys():
        pytest.skip("has no such option")
    if kind.family == "GhostBatchNorm":
        options = {"group_size": 2, **options}
    with pytest.raises(ValueError, match=message):
        getattr(wellcond.nn, f"{kind.family}2d")(**{"num_features": 3, **options})


# ---------------------------------------------------------------------------------------------- torch's own machinery


class Net(nn.Module):
    """A convolution, the layer, and a nonlinearity: a piece to checkpoint."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 3, 1).to(FLOAT64), norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("forwards", [1, 2, 5])
def test_activation_checkpointing_changes_nothing(kind: Kind, use_reentrant: bool, forwards: int) -> None:
    net = Net(trained(kind))
    other = copy.deepcopy(net)
    for step in range(2):
        x = [draw(2, 10 * step + number).requires_grad_() for number in range(forwards)]
        again = [inputs.detach().clone().requires_grad_() for inputs in x]
        sum((net(inputs) * draw(2, 90 + i)).sum() for i, inputs in enumerate(x)).backward()
        outputs = [checkpoint(other, inputs, use_reentrant=use_reentrant) for inputs in again]
        sum((y * draw(2, 90 + i)).sum() for i, y in enumerate(outputs)).backward()
        close([inputs.grad for inputs in again], [inputs.grad for inputs in x], 1e-12)
        close([p.grad for p in other.parameters()], [p.grad for p in net.parameters()], 1e-12)
        assert_same_state(other.state_dict(), net.state_dict())
    assert torch.equal(other.eval()(draw(2)), net.eval()(draw(2)))


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_one_batch_twice(kind: Kind, use_reentrant: bool) -> None:
    """The same inputs pass twice before the backward, with another history each time."""
    net = Net(trained(kind))
    other = copy.deepcopy(net)
    x, again = draw(2).requires_grad_(), draw(2).requires_grad_()
    ((net(x) * draw(2, 1)).sum() + (net(x) * draw(2, 2)).sum()).backward()
    first = checkpoint(other, again, use_reentrant=use_reentrant)
    second = checkpoint(other, again, use_reentrant=use_reentrant)
    ((first * draw(2, 1)).sum() + (second * draw(2, 2)).sum()).backward()
    close(again.grad, x.grad, 1e-12)
    assert_same_state(other.state_dict(), net.state_dict())


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_many_micro_batches(kind: Kind, use_reentrant: bool) -> None:
    """A pipeline's schedule: all micro-batches go forward before the first one goes back."""
    net = Net(trained(kind))
    other = copy.deepcopy(net)
    x = [draw(2, number).requires_grad_() for number in range(40)]
    again = [inputs.detach().clone().requires_grad_() for inputs in x]
    for run, inputs in ((net, x), (other, again)):
        outputs = [run(i) if run is net else checkpoint(run, i, use_reentrant=use_reentrant) for i in inputs]
        for y in outputs:
            (y * draw(2, 99)).sum().backward()
    close([inputs.grad for inputs in again], [inputs.grad for inputs in x], 1e-12)
    assert_same_state(other.state_dict(), net.state_dict())


@kinds
def test_functional_call(kind: Kind) -> None:
    """The tensors that are given are used and updated, the module's own are left alone."""
    layer, other = trained(kind), trained(kind)
    state = copy.deepcopy(layer.state_dict())
    tensors = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    for step in range(2):
        assert torch.equal(functional_call(layer, tensors, draw(2, step)), other(draw(2, step)))
    assert_same_state(layer.state_dict(), state)
    named = {name: tensors[name] for name in other.state_dict()}
    assert_same_state(named, other.state_dict())


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_functional_gradient(kind: Kind, training: bool) -> None:
    layer = trained(kind).train(training)
    x, upstream = draw(2), draw(2, 1)
    leaf = x.clone().requires_grad_()
    expected = reference(kind, layer, leaf)[0] if training else evaluated(kind, layer, leaf)
    (by_hand,) = torch.autograd.grad(expected, leaf, upstream)
    function = pure(layer, training)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    close(torch.func.grad(lambda inputs: (function(inputs, weight, bias) * upstream).sum())(x), by_hand)


def pure(layer: nn.Module, training: bool) -> Callable[..., Tensor]:
    """The layer as a function of its inputs and parameters, its buffers always those of now."""
    layer.train(training)
    buffers = {name: value.clone() for name, value in layer.named_buffers()}

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        state = {name: value.clone() for name, value in buffers.items()}
        return functional_call(layer, {**state, "weight": weight, "bias": bias}, x)

    return function


# r and d are constants to the gradient: differences see none of that where they are clipped.
CLIPPED = Kind("BatchRenorm", {"r_max": 1.01, "d_max": 0.001}, as_renorm)
# And MABN's backward is no derivative.
WITHOUT = ("BatchRenorm", "MovingAverageBatchNorm")
DIFFERENTIABLE = {**{name: kind for name, kind in KINDS.items() if kind.family not in WITHOUT}, "renorm": CLIPPED}


@pytest.mark.parametrize("kind", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 2), (4, 2, 3)], ids=str)
def test_first_and_second_derivatives(kind: Kind, training: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = kind.make(kind.dims[0], 2)
    if kind.dims[0] > 1:
        shape = (*shape, *(1 for _ in range(kind.dims[0] + 2 - len(shape))))
    if kind.whole is splitting:
        shape = (*shape[:3], 2)  # It needs two positions.
    for _ in range(2):
        layer(3 * torch.randn(6, *shape[1:], dtype=FLOAT64) + 1)
    x = (2 * torch.randn(shape, dtype=FLOAT64) - 1).requires_grad_()
    weight, bias = (torch.randn(2, dtype=FLOAT64).requires_grad_() for _ in range(2))
    function = pure(layer, training)
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


COMPILED = (
    *("momentum", "momentum ghost", "ghost", "bsr", "bsr inexact", "renorm", "evalnorm", "population"),
    *(
        "cross-iteration",
        "cross-iteration ghost",
        "switchable",
        "switchable ghost",
        "sparse",
        "instance-batch",
        "batch-instance ghost",
        "kalman ghost",
        "decorrelated",
        "iternorm",
    ),
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name: str) -> None:
    """As a whole, once for each mode; values, gradients and statistics as without."""
    torch._dynamo.reset()
    # The partitioner of inductor, which recomputes in the backward what is cheap, without its code generation.
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    layer = trained(KINDS[name])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    graphs = []
    for step in range(3):
        x, again = draw(2, step).requires_grad_(), draw(2, step).requires_grad_()
        y = other(x)
        y.backward(draw(2, 9))
        output = compiled(again)
        output.backward(draw(2, 9))
        close(output, y, 1e-9)
        close(again.grad, x.grad, 1e-9)
        graphs.append(counter.frame_count)
    close([p.grad for p in layer.parameters()], [p.grad for p in other.parameters()], 1e-9)
    close(dict(layer.named_buffers()), dict(other.named_buffers()), 1e-9)
    layer.eval()
    other.eval()
    for step in range(2):
        close(compiled(draw(2, step)), other(draw(2, step)), 1e-9)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[2] < graphs[3] == graphs[4]


@pytest.mark.parametrize(
    ("name", "settings_of_a_schedule"),
    [
        ("momentum", [{"stat_momentum": value} for value in (0.625, 0.0, 0.25, 0.9, 1.0)]),
        ("renorm", [{"r_max": 1 + value, "d_max": value} for value in (0.5, 0.0, 0.25, 3.0)]),
    ],
)
def test_schedules_do_not_recompile(name: str, settings_of_a_schedule: list[dict[str, float]]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = trained(KINDS[name])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    graphs = []
    for step, attributes in enumerate(settings_of_a_schedule):
        for attribute, value in attributes.items():
            setattr(layer, attribute, value)
            setattr(other, attribute, value)
        close(compiled(draw(2, step)), other(draw(2, step)), 1e-9)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_compiles_by_inductor() -> None:
    torch._dynamo.reset()
    layer = trained(KINDS["momentum"])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    for step in range(3):
        x, again = draw(2, step).requires_grad_(), draw(2, step).requires_grad_()
        y, expected = compiled(x), other(again)
        y.backward(draw(2, 9))
        expected.backward(draw(2, 9))
        close(y, expected, 1e-9)
        close(x.grad, again.grad, 1e-9)
    close(dict(layer.named_buffers()), dict(other.named_buffers()), 1e-9)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_all_batch_sizes(name: str) -> None:
    """With the sizes left open from the second one on, unless the samples have to be grouped."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    layer = trained(KINDS[name])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    graphs = []
    for samples in (4, 5, 7, 9):
        close(compiled(draw(2, samples=samples)), other(draw(2, samples=samples)), 1e-9)
        graphs.append(counter.frame_count)
    close(dict(layer.named_buffers()), dict(other.named_buffers()), 1e-9)
    if KINDS[name].group_size is None:
        assert graphs[1] == graphs[3]


@kinds
def test_exports(kind: Kind) -> None:
    layer = trained(kind, dtype=torch.float32, steps=0)
    layer(draw(2, dtype=torch.float32))
    layer.eval()
    state = copy.deepcopy(layer.state_dict())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (draw(2, dtype=torch.float32),), dynamic_shapes=({0: batch},))
    for samples in (1, 5, 8):
        x = draw(2, 3, samples=samples, dtype=torch.float32)
        close(program.module()(x), layer(x), 1e-5)
    assert_same_state(layer.state_dict(), state)


@pytest.mark.parametrize(
    "name", ["momentum", "ghost", "bsr", "renorm", "evalnorm", "population", "switchable", "sparse"]
)
def test_exports_to_onnx(name: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    layer = KINDS[name].make(2, dtype=torch.float32)
    layer(draw(2, dtype=torch.float32))
    layer.eval()
    x = draw(2, 3, dtype=torch.float32)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    (y,) = ReferenceEvaluator(program.model_proto).run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    close(torch.from_numpy(y), layer(x), 1e-4)
