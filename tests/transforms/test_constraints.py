"""Z-scores and clipping by layer, from their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import NormClipping, ZScore


def gradients(model: nn.Module, transform: wellcond.GradientTransform, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wellcond.attach(optimizer, model, transform)
    model(x).sin().sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return {name: (before[name], parameter.grad) for name, parameter in model.named_parameters()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)).double()


X = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_z_score_has_mean_zero_and_variance_one_for_each_output_unit() -> None:
    for name, (before, after) in gradients(net(), ZScore(), X).items():
        if before.dim() == 1:
            assert torch.equal(before, after), name
            continue
        rows = before.flatten(1)
        expected = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True, correction=0)
        torch.testing.assert_close(after.flatten(1), expected)


def test_a_constant_gradient_scores_zero_and_a_tiny_one_as_any_other() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wellcond.attach(optimizer, model, ZScore())
    model.weight.grad = torch.tensor([[3.0] * 4, [1e-30, 2e-30, 3e-30, 4e-30]])
    optimizer.step()
    row = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = torch.stack([torch.zeros(4), (row - 2.5) / row.std(correction=0)])
    assert torch.equal(model.weight.grad[0], expected[0])
    model.weight.grad = torch.tensor([[1e-30, 2e-30, 3e-30, 4e-30]] * 2)
    optimizer.step()
    torch.testing.assert_close(model.weight.grad[1], expected[1])


@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e6])
def test_clipping_shortens_each_layer_to_its_norm_weight_and_bias_together(limit: float) -> None:
    found = gradients(net(), NormClipping(limit), X)
    for layer in ("0", "1", "3"):
        before, after = (torch.cat([found[f"{layer}.{p}"][i].flatten() for p in ("weight", "bias")]) for i in (0, 1))
        torch.testing.assert_close(after, before * min(1.0, limit / float(before.norm())))


def test_a_bias_that_three_projections_share_is_left_alone() -> None:
    model = nn.MultiheadAttention(4, 2, kdim=3, vdim=3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, model, NormClipping(0.1))
    line = next(line for line in handle.report().splitlines() if line.startswith("in_proj_bias"))
    assert "unchanged" in line


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "1", True])
def test_the_norm_must_be_positive(value: object) -> None:
    with pytest.raises(ValueError, match="max_norm must be a positive number"):
        NormClipping(value)


def test_layers_are_those_of_centralization() -> None:
    with pytest.raises(ValueError, match="layers must be one of"):
        ZScore(layers="linear")
    model = net()
    report = wellcond.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, ZScore("conv")).report()
    assert "0.weight  (4, 2, 3, 3)  gradient standardized over 18 inputs of each of 4 output units" in report
    assert "unchanged: not a convolution" in report
