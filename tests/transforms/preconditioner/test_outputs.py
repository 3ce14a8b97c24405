"""``outputs=True`` against (L + δI)^(−1/2) G (M + δI)^(−p), both summed in float64 from the formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.transforms.preconditioner.factors import SketchedFactor
from wellcond.transforms.preconditioner.outputs import TwoSidedForm

DECAY, EVERY, SOLVE = 0.7, 2, 4
SOLVES = (0, 2, 4, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 2, groups=2, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(75, 4),
    ).double()


def inputs(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 4, 6, 6, generator=generator, dtype=torch.float64) * (1 + 0.3 * step)


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """[groups, n, d], a 1 appended for the bias."""
    if isinstance(layer, nn.Linear):
        found = x.unsqueeze(0)
    elif isinstance(layer, nn.ConvTranspose2d):
        # Of stride 1: a convolution of the padded input with the mirrored kernel.
        patches = F.unfold(x, 2, padding=1).transpose(1, 2).reshape(-1, 6, 4).flip(-1)
        found = patches.reshape(1, -1, 24)
    else:
        assert isinstance(layer, nn.Conv2d)
        found = F.unfold(x, 2, stride=2, padding=1).transpose(1, 2).reshape(-1, 2, 8).transpose(0, 1)
    return F.pad(found, (0, 1), value=1.0) if layer.bias is not None else found


def joined(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[groups, out, d] of a weight-shaped and a bias-shaped tensor."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return matrix if bias is None else torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=2)


def power(matrix: Tensor, exponent: float, damping: float, relative: bool) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    added = damping * values[..., -1:] if relative else damping
    return vectors @ torch.diag_embed((values.clamp_min(0) + added) ** exponent) @ vectors.mT


class Reference:
    """One layer's change of gradients, step by step."""

    def __init__(self, exponent: float, damping: float, norm: str, momentum: float) -> None:
        self.exponent, self.damping, self.norm, self.momentum = exponent, damping, norm, momentum
        self.step, self.moment, self.outer, self.mean = 0, 0.0, 0.0, 0.0
        self.left: Any = None
        self.right: Any = None

    def change(self, gradient: Tensor, x: Tensor) -> Tensor:
        due = self.step % EVERY == 0
        updates = self.step // EVERY + 1
        if due:
            self.moment = DECAY * self.moment + (1 - DECAY) * x.mT @ x / x.shape[1]
        if self.step in SOLVES:
            self.right = power(
                self.moment / (1 - DECAY**updates), -self.exponent, self.damping, relative=self.exponent == 0.5
            )
            if isinstance(self.outer, Tensor):
                seen = (self.step + EVERY - 1) // EVERY
                self.left = power(self.outer / (1 - DECAY**seen), -0.5, 1e-3, relative=True)
        self.mean = self.momentum * self.mean + gradient
        used = self.mean if self.momentum else gradient
        product = used @ self.right
        if due:
            self.outer = DECAY * self.outer + (1 - DECAY) * product @ product.mT
        if self.left is not None:
            product = self.left @ product
        self.step += 1
        if self.norm == "restore":
            return product * used.norm() / product.norm()
        if self.norm == "fixed":
            groups, units, width = gradient.shape
            return product * (groups * min(units, width)) ** 0.5 / product.norm()
        return product


@pytest.mark.parametrize("kind", [FeatureWhitening, FeatureDescent])
@pytest.mark.parametrize("norm", ["restore", "fixed", "none"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_both_sides_are_the_formula_for_every_layer_before_and_after_momentum(
    kind: Any, norm: Any, momentum: float
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.0 if momentum else 0.9)
    options: dict[str, Any] = {"stats_decay": DECAY, "stats_every": EVERY, "solve_every": SOLVE}
    transform = kind(norm=norm, outputs=True, gradient_momentum=momentum, second_moment="dense", **options)
    wellcond.attach(optimizer, model, transform)
    layers = [layer for layer in model if hasattr(layer, "weight")]
    references = {layer: Reference(transform.exponent, transform.damping, norm, momentum) for layer in layers}
    for step in range(10):
        optimizer.zero_grad()
        x = inputs(step)
        model(x).sin().sum().backward()
        expected = {}
        for layer in model:
            if layer in references:
                bias = None if layer.bias is None else layer.bias.grad
                gradient = joined(layer, layer.weight.grad, bias).clone()
                # √min(out, inputs) counts the weight alone.
                expected[layer] = references[layer].change(gradient, rows(layer, x))
                if norm == "fixed":
                    width = layer.weight[0].numel() if not isinstance(layer, nn.ConvTranspose2d) else 24
                    groups, units, _ = gradient.shape
                    expected[layer] *= (groups * min(units, width)) ** 0.5 / expected[layer].norm()
            x = layer(x).detach()
        optimizer.step()
        for layer in layers:
            bias = None if layer.bias is None else layer.bias.grad
            torch.testing.assert_close(
                joined(layer, layer.weight.grad, bias), expected[layer], rtol=1e-8, atol=1e-8, msg=f"step {step}"
            )


def test_of_one_step_alone_it_is_the_polar_factor_of_the_product() -> None:
    """With the same gradient twice, undamped but for a thousandth: what an orthogonal update is."""
    torch.manual_seed(0)
    model = nn.Linear(7, 4, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wellcond.attach(
        optimizer, model, FeatureDescent(outputs=True, norm="none", stats_decay=0.0, stats_every=1, solve_every=1)
    )
    x = torch.randn(9, 7, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sin().sum().backward()
        gradient = model.weight.grad.clone()
        optimizer.step()
    product = gradient @ torch.linalg.inv(x.mT @ x / 9 + 0.1 * torch.eye(7, dtype=torch.float64))
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    damped = values / (values.square() + 1e-3 * values[0] ** 2).sqrt()
    torch.testing.assert_close(model.weight.grad, left @ torch.diag(damped) @ right, rtol=1e-9, atol=1e-9)


def test_a_product_that_is_not_finite_leaves_the_average_as_it_was() -> None:
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wellcond.attach(optimizer, model, FeatureWhitening(outputs=True, stats_every=1, solve_every=1))
    state = optimizer.state[model.weight]
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 3, dtype=torch.float64) * (step + 1)).sum().backward()
        if step == 1:
            before = copy.deepcopy(state["wellcond_whitening_outputs_second_moment"])
            model.weight.grad[0, 0] = torch.inf
        optimizer.step()
        if step == 1:
            assert torch.equal(before, state["wellcond_whitening_outputs_second_moment"])
    assert not torch.equal(before, state["wellcond_whitening_outputs_second_moment"])


def test_more_outputs_than_max_dim_are_sketched_and_said_so() -> None:
    model = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(outputs=True, max_dim=16))
    assert "outputs 40 × 40 sketched at rank 2" in handle.report()
    assert "outputs 3 × 3" in handle.report()
    (first, _) = handle._slots["whitening"]
    assert isinstance(first.coverage.plan, TwoSidedForm)
    assert isinstance(first.coverage.plan.output, SketchedFactor)


def test_outputs_must_be_true_or_false() -> None:
    with pytest.raises(ValueError, match="outputs must be True or False, got 'both'"):
        FeatureWhitening(outputs="both")
