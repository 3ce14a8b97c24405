"""Batch Renormalization against x̂ = (x − μ_B)/σ_B·r + d."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.nn import BatchRenorm1d

FLOAT64 = torch.float64


def batch(step: int, scale: float = 1.0, shift: float = 0.0, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return scale * torch.randn(samples, 3, 4, generator=generator, dtype=FLOAT64) + shift


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def warm(**options: float) -> BatchRenorm1d:
    """A layer with running statistics of some batches, and parameters that show."""
    layer = BatchRenorm1d(3, r_max=1e6, d_max=1e6, momentum=0.5).double()
    for step in range(4):
        layer(batch(step, 2.0, 1.0))
    layer.r_max, layer.d_max = options.get("r_max", 1e6), options.get("d_max", 1e6)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    return layer


def by_formula(layer: BatchRenorm1d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, r and d."""
    mean, own = x.mean((0, 2)), (x.var((0, 2), correction=0) + layer.eps).sqrt()
    running = (layer.running_var + layer.eps).sqrt()
    with torch.no_grad():
        r = torch.clamp(own / running, 1 / layer.r_max, layer.r_max)
        d = torch.clamp((mean - layer.running_mean) / running, -layer.d_max, layer.d_max)
    x_hat = (x - mean[:, None]) / own[:, None] * r[:, None] + d[:, None]
    return x_hat * layer.weight[:, None] + layer.bias[:, None], r, d


CASES = {
    "nothing clipped": ({}, 1.0, 0.0),
    "r from above": ({"r_max": 1.2}, 10.0, 1.0),
    "r from below": ({"r_max": 1.2}, 0.1, 1.0),
    "d from above": ({"d_max": 0.2}, 2.0, 9.0),
    "d from below": ({"d_max": 0.2}, 2.0, -9.0),
    "both": ({"r_max": 1.5, "d_max": 0.1}, 20.0, 9.0),
    "closed": ({"r_max": 1.0, "d_max": 0.0}, 5.0, 2.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_formula(case: tuple[dict[str, float], float, float]) -> None:
    """With the running statistics before the batch; no gradient through r and d."""
    options, scale, shift = case
    layer = warm(**options)
    x = batch(9, scale, shift).requires_grad_()
    expected, r, d = by_formula(layer, x)
    before = layer.running_mean.clone(), layer.running_var.clone()
    if "r_max" in options:
        bounds = (options["r_max"], 1 / options["r_max"])
        assert all(min(abs(float(value) - bound) for bound in bounds) < 1e-12 for value in r)
    if "d_max" in options:
        close(d.abs(), torch.full((3,), options["d_max"]), 1e-7)
    y = layer(x)
    close(y, expected)
    tensors = [x, layer.weight, layer.bias]
    upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
    close(torch.autograd.grad(y, tensors, upstream), torch.autograd.grad(expected, tensors, upstream))
    own_mean, own_var = x.detach().mean((0, 2)), x.detach().transpose(0, 1).flatten(1).var(1)
    close((layer.running_mean, layer.running_var), ((before[0] + own_mean) / 2, (before[1] + own_var) / 2))


def test_unclipped_output_is_that_of_evaluation() -> None:
    layer = warm()
    x = batch(9, 3.0, -2.0)
    expected = copy.deepcopy(layer).eval()(x)
    close(layer(x), expected)
    # But its gradient is not: it passes through the batch's statistics.
    layer = warm()
    leaf = batch(9, 3.0, -2.0).requires_grad_()
    layer(leaf).sin().sum().backward()
    frozen = warm().eval()
    other = batch(9, 3.0, -2.0).requires_grad_()
    frozen(other).sin().sum().backward()
    assert not torch.allclose(leaf.grad, other.grad)
    # Σ ∂L/∂x = 0 in each channel, as for batch normalization.
    close(leaf.grad.sum((0, 2)), torch.zeros(3))


def test_closed_bounds_are_batch_norm() -> None:
    layer, plain = BatchRenorm1d(3, r_max=1.0, d_max=0.0).double(), nn.BatchNorm1d(3).double()
    for step in range(4):
        x, other = batch(step, 3.0, 5.0).requires_grad_(), batch(step, 3.0, 5.0).requires_grad_()
        y, expected = layer(x), plain(other)
        close(y, expected, 1e-12)
        close(
            torch.autograd.grad(y.sin().sum(), x),
            torch.autograd.grad(expected.sin().sum(), other),
            1e-12,
        )
    close(layer.running_mean, plain.running_mean, 1e-12)
    close(layer.running_var, plain.running_var, 1e-12)


def test_ghost_groups_are_corrected_each_by_its_own() -> None:
    layer = BatchRenorm1d(3, r_max=1.3, d_max=0.5, group_size=2).double()
    layer(batch(0, 2.0, 1.0))
    x = batch(1, 2.0, 1.0)
    with torch.no_grad():
        expected = torch.cat([by_formula(layer, chunk)[0] for chunk in x.split(2)])
    close(layer(x), expected)


def test_evaluation_is_batch_norms() -> None:
    layer = warm(r_max=1.1)
    x = batch(5)
    layer.eval()
    close(layer(x), F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps))


def test_bounds_travel_with_the_state() -> None:
    layer, other = warm(r_max=1.25, d_max=0.5), BatchRenorm1d(3).double()
    other.load_state_dict(layer.state_dict())
    assert (other.r_max, other.d_max) == (1.25, 0.5)
    assert torch.equal(other(batch(7, 4.0)), layer(batch(7, 4.0)))


def test_constant_channel_has_a_bounded_output() -> None:
    """σ_B = √ε: r is clipped, so is d."""
    layer = BatchRenorm1d(3, affine=False)
    y = layer(torch.full((4, 3, 5), 4096.0))
    close(y, torch.full((4, 3, 5), 5.0), 1e-5)


@pytest.mark.parametrize(("r_max", "d_max"), [(0.5, 1.0), (0.0, 1.0), (float("nan"), 1.0), (2.0, -1.0)])
def test_bounds_are_checked(r_max: float, d_max: float) -> None:
    with pytest.raises(ValueError, match=r"[rd]_max"):
        BatchRenorm1d(3, r_max=r_max, d_max=d_max)
    layer = BatchRenorm1d(3)
    with pytest.raises(ValueError, match=r"[rd]_max"):
        layer.r_max, layer.d_max = r_max, d_max
