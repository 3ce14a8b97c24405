"""EigenNet's layers against the formula: both Kronecker factors of the Fisher block are whitened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.nn.whitened.eigen import EigenConv2d, EigenLinear

FLOAT64 = torch.float64


def batch(step: int = 0, samples: int = 40, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    mixing = torch.randn(width, width, generator=generator, dtype=FLOAT64)
    return torch.randn(samples, width, generator=generator, dtype=FLOAT64) @ mixing + 3


def images(step: int = 0, samples: int = 8) -> Tensor:
    return batch(step, samples * 30).view(samples, 6, 5, 4).movedim(3, 1)


def upstream_of(output: Tensor, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    channels = output.shape[1]
    mixing = torch.randn(channels, channels, generator=generator, dtype=FLOAT64)
    rows = torch.randn(output.numel() // channels, channels, generator=generator, dtype=FLOAT64) @ mixing
    return rows.view(*output.movedim(1, -1).shape).movedim(-1, 1)


def second_moment(rows: Tensor) -> Tensor:
    return sum(torch.outer(row, row) for row in rows) / len(rows)


def rows_of(values: Tensor, groups: int) -> list[Tensor]:
    """Rows [n, out/groups] of each group of channels."""
    return [part.movedim(1, -1).flatten(0, -2) for part in values.chunk(groups, dim=1)]


def make(kind: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    options = {"stats_every": 1, "refresh_every": None} | options
    if kind == "linear":
        return EigenLinear(4, 3, dtype=FLOAT64, **options), batch()
    if kind == "bare linear":
        return EigenLinear(4, 3, bias=False, dtype=FLOAT64, **options), batch()
    return EigenConv2d(4, 6, 3, padding=1, groups=2, dtype=FLOAT64, **options), images()


every_kind = pytest.mark.parametrize("kind", ["linear", "bare linear", "conv"])


@every_kind
def test_both_factors_are_white_after_a_refresh(kind: str) -> None:
    """E[δz δzᵀ] ∝ I and E[õ õᵀ] = I without damping; δz = Qᵀδh, whose mean square is that of δh."""
    layer, x = make(kind, damping=0.0)
    y = layer(x)
    upstream = upstream_of(y)
    y.backward(upstream)
    assert layer.refresh()
    groups = len(layer.error_transform)
    for transform, errors in zip(layer.error_transform, rows_of(upstream, groups), strict=True):
        seen = errors @ transform
        factor = second_moment(seen)
        size = errors.square().sum() / errors.numel()
        torch.testing.assert_close(
            factor, size * torch.eye(len(transform), dtype=FLOAT64), rtol=0, atol=1e-9 * float(size)
        )
        # far from it before
        assert torch.linalg.cond(second_moment(errors)) > 3
    if kind != "conv":
        whitened = (x - layer.center[0]) @ layer.transform[0].T
        torch.testing.assert_close(second_moment(whitened), torch.eye(4, dtype=FLOAT64), rtol=0, atol=1e-9)


def test_fisher_block_of_a_network() -> None:
    """The middle layer's factors in training: near multiples of I, where a plain layer's are far from them."""
    torch.manual_seed(0)
    layer = EigenLinear(8, 6, dtype=FLOAT64, stats_every=1, refresh_every=10, stats_decay=0.9, damping=1e-3)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(o=args[0].detach()) or keep(output))

    def keep(output: Tensor) -> None:
        output.register_hook(lambda grad: seen.update(delta=grad))

    conditions = []
    x = torch.randn(2000, 5, dtype=FLOAT64) @ torch.randn(5, 5, dtype=FLOAT64)
    target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    for step in range(61):
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()
        if step == 60:
            o, delta = seen["o"], seen["delta"]
            whitened, errors = (o - layer.center[0]) @ layer.transform[0].T, delta @ layer.error_transform[0]
            conditions = [
                [float(torch.linalg.cond(second_moment(rows))) for rows in pair]
                for pair in ((o - o.mean(0), whitened), (delta, errors))
            ]
        optimizer.step()
    # Three classes give errors of rank two in front of a Tanh's derivative: the smallest are what damping holds down.
    (input_before, input_after), (error_before, error_after) = conditions
    assert input_after < 3 < 20 < input_before
    assert error_after < error_before / 50


@every_kind
def test_refreshes_in_training_leave_the_function_unchanged(kind: str) -> None:
    layer, x = make(kind)
    data = images if kind == "conv" else batch
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    for step in range(6):
        optimizer.zero_grad()
        y = layer(data(step))
        (y.square().mean() + 0.1 * (y * upstream_of(y, step)).mean()).backward()
        optimizer.step()
        before, weight, transform = layer(x).detach(), layer.weight.detach().clone(), layer.error_transform.clone()
        assert layer.refresh()
        assert not torch.allclose(layer.weight, weight)
        assert not torch.allclose(layer.error_transform, transform)
        torch.testing.assert_close(layer(x), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("whitening", ["zca", "pca"])
def test_output_is_the_formula(whitening: Any) -> None:
    """h = Q (V P (o − μ) + d)."""
    layer, x = make("linear", whitening=whitening)
    y = layer(x)
    y.backward(upstream_of(y))
    assert layer.refresh()
    outer, P, mean = layer.error_transform[0], layer.transform[0], layer.center[0]
    expected = torch.stack([outer @ (layer.weight @ P @ (row - mean) + layer.bias) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-6, 65536.0])
def test_scale_of_the_loss_does_not_matter(scale: float) -> None:
    """A GradScaler's factor, or a mean in place of a sum, gives the same Q; so does a factor that changes."""
    layers = []
    for factors in ((1.0, 1.0), (scale, scale), (1.0, scale)):
        layer, x = make("linear")
        for step, factor in enumerate(factors):
            y = layer(x)
            y.backward(factor * upstream_of(y, step))
            with torch.no_grad():
                layer.weight.mul_(1)  # a step that changes nothing
            layer(x)
            layer.errors.pending = None if step else layer.errors.pending
        layers.append(layer)
    for layer in layers:
        assert layer.refresh()
        torch.testing.assert_close(layer.error_transform, layers[0].error_transform)


def test_without_errors_outputs_are_left_alone() -> None:
    layer, x = make("linear")
    layer(x)
    assert layer.refresh()
    assert torch.equal(layer.error_transform[0], torch.eye(3, dtype=FLOAT64))
    layer(x).backward(torch.zeros(40, 3, dtype=FLOAT64))
    assert layer.refresh()
    assert torch.equal(layer.error_transform[0], torch.eye(3, dtype=FLOAT64))


def test_errors_that_are_not_finite_do_not_enter() -> None:
    """A GradScaler that overflows sends infinities back."""
    layer, x = make("linear")
    y = layer(x)
    y.backward(torch.full_like(y, float("inf")))
    assert layer.refresh()
    assert int(layer.errors.skipped) == 1
    assert torch.equal(layer.error_transform[0], torch.eye(3, dtype=FLOAT64))


def test_a_direction_without_errors_does_not_blow_up_the_others() -> None:
    """Softmax errors sum to zero: the others keep their size."""
    layer, x = make("linear", damping=1e-3)
    y = layer(x)
    F.cross_entropy(y, torch.arange(40) % 3).backward()
    delta = (F.softmax(y, 1) - F.one_hot(torch.arange(40) % 3, 3)).detach() / 40
    assert layer.refresh()
    seen = delta @ layer.error_transform[0]
    torch.testing.assert_close(seen.square().sum(), delta.square().sum(), rtol=1e-9, atol=0)
    values = torch.linalg.eigvalsh(second_moment(seen))
    assert values[2] / values[1] < 1.01


def test_damping_of_the_errors() -> None:
    """c (Σ_δ/mean variance + ε λ_max)^(−1/2), c from the errors' mean square."""
    layer, x = make("linear", damping=1e-3, error_damping=0.5)
    y = layer(x)
    upstream = upstream_of(y)
    y.backward(upstream)
    assert layer.refresh()
    moment = second_moment(upstream)
    values, vectors = torch.linalg.eigh(moment + 0.5 * torch.linalg.eigvalsh(moment)[-1] * torch.eye(3, dtype=FLOAT64))
    root = vectors @ values.rsqrt().diag() @ vectors.T
    root *= (moment.trace() / (root @ moment @ root).trace()).sqrt()
    torch.testing.assert_close(layer.error_transform[0], root, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="error_damping must be a finite number of at least 0, got -1"):
        EigenLinear(4, 3, error_damping=-1)


def test_errors_of_unobserved_steps_are_not_taken() -> None:
    layer, x = make("linear", stats_every=2)
    for step in range(3):
        layer(x).square().mean().backward()
        assert (layer.errors.pending is None) == (step == 1)
        with torch.no_grad():
            layer.weight.mul_(0.9)
        if step == 0:
            assert layer.errors.pending is not None
            assert float(layer.errors.pending.number) == 40
