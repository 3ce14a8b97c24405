"""How each normalization layer computes, from the formulas, by loops in float64: what conformance is measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
