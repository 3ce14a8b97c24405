"""Orthogonalize: torch.optim.Muon's numbers, for every layout, and the split of a model's parameters."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, Orthogonalize

# Converges to the polar factor.
EXACT: dict[str, Any] = {"steps": 40, "coefficients": (1.875, -1.25, 0.375), "scale": "none", "momentum": 0.0}


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def updated(model: nn.Module, transform: Orthogonalize, *inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each parameter's gradient before and after."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wellcond.attach(optimizer, model, transform)
    output = model(*inputs)
    (output[0] if isinstance(output, tuple) else output).sin().sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return {name: (before[name], parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw", "spectral_unclamped"])
def test_over_sgd_it_is_torchs_muon(nesterov: bool, scale: Any) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((6, 9), (9, 4), (4, 1), (1, 5))))
    theirs = copy.deepcopy(ours)
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov}
    sgd = torch.optim.SGD(ours.parameters(), lr=0.02)
    wellcond.attach(sgd, ours, Orthogonalize(scale=scale, precision="bfloat16", **options))
    muon = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.0, adjust_lr_fn=scale, **options)
    for step in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, sgd), (theirs, muon)):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_every_layout_gets_the_polar_factor_of_its_own_matrices() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    before, after = updated(conv, Orthogonalize(**EXACT), torch.randn(5, 4, 6, 6, dtype=torch.float64))["weight"]
    for group in range(2):
        expected = polar(before[3 * group : 3 * group + 3].flatten(1))
        torch.testing.assert_close(after[3 * group : 3 * group + 3].flatten(1), expected, rtol=1e-6, atol=1e-6)

    up = nn.ConvTranspose2d(4, 6, 2, groups=2).double()
    before, after = updated(up, Orthogonalize(**EXACT), torch.randn(5, 4, 3, 3, dtype=torch.float64))["weight"]
    for group in range(2):
        rows = [w[2 * group : 2 * group + 2].transpose(0, 1).flatten(1) for w in (before, after)]
        torch.testing.assert_close(rows[1], polar(rows[0]), rtol=1e-6, atol=1e-6)

    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    found = updated(attention, Orthogonalize(**EXACT), x, x.flip(1), x.square())
    for before, after in zip(*(w.chunk(3) for w in found["in_proj_weight"]), strict=True):
        torch.testing.assert_close(after, polar(before), rtol=1e-6, atol=1e-6)


def test_a_packed_projection_is_cut_by_projections_or_by_heads() -> None:
    torch.manual_seed(0)
    packed = nn.Sequential(nn.Linear(8, 24)).double()
    x = torch.randn(9, 8, dtype=torch.float64)
    for parts in (3, 12):
        transform = Orthogonalize(parts=lambda name, module, parts=parts: parts, **EXACT)
        before, after = updated(copy.deepcopy(packed), transform, x)["0.weight"]
        for one, other in zip(before.chunk(parts), after.chunk(parts), strict=True):
            torch.testing.assert_close(other, polar(one), rtol=1e-6, atol=1e-6)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    heads = Orthogonalize(parts=lambda name, module: getattr(module, "num_heads", 1), **EXACT)
    before, after = updated(attention, heads, x[None], x[None], x[None])["in_proj_weight"]
    for one, other in zip(before.chunk(6), after.chunk(6), strict=True):
        if float(one.norm()) > 1e-6:
            torch.testing.assert_close(other, polar(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_one_row_or_one_column_gets_its_direction(shape: tuple[int, int]) -> None:
    model = nn.Linear(shape[1], shape[0], bias=False).double()
    before, after = updated(model, Orthogonalize(**EXACT), torch.randn(5, shape[1], dtype=torch.float64))["weight"]
    torch.testing.assert_close(after, before / before.norm())


def test_after_feature_descent_it_is_newton_muon_in_one_line() -> None:
    """W ← W − η·msign(G (XᵀX/N + δI)⁻¹), δ = 0.2 times the mean eigenvalue."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    descent = FeatureDescent(damping=0.2, damping_mode="mean", norm="none")
    wellcond.attach(optimizer, model, descent, Orthogonalize(**EXACT))
    x = torch.randn(9, 6, dtype=torch.float64)
    model(x).sin().sum().backward()
    moment = x.mT @ x / 9
    damped = moment + 0.2 * moment.trace() / 6 * torch.eye(6, dtype=torch.float64)
    expected = polar(model.weight.grad @ torch.linalg.inv(damped))
    optimizer.step()
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-6, atol=1e-6)


def test_bf16_weights_keep_their_momentum_in_float32() -> None:
    model = nn.Linear(6, 4).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, Orthogonalize())
    model(torch.randn(3, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["wellcond_orthogonalization_momentum"].dtype == torch.float32
    assert bool(torch.isfinite(model.weight).all())


class Tiny(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_the_split_keeps_embeddings_norms_biases_and_the_head_for_the_other_optimizer(tied: bool) -> None:
    model = Tiny(tied)
    weights = Orthogonalize().split(model, outputs=() if tied else None)
    assert [id(p) for p in weights.hidden] == [id(model.block.weight)]
    together = [id(p) for p in (*weights.hidden, *weights.rest)]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    table = "shared with head.weight, a layer of another kind" if tied else "an embedding table"
    assert weights.reasons["embed.weight"] == ("rest", table)
    assert weights.reasons["norm.weight"] == ("rest", "a norm layer's scale")
    if not tied:
        assert weights.reasons["head.weight"] == ("rest", "the last layer")


def test_named_outputs_frozen_weights_and_models_without_hidden_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    weights = Orthogonalize().split(model, outputs=["0"])
    assert [id(p) for p in weights.hidden] == [id(model[2].weight)]
    assert weights.reasons["1.weight"][0] == "frozen"
    assert weights.reasons["0.weight"] == ("rest", "an output layer")
    for wrong in (["3"], "0"):
        with pytest.raises(ValueError, match=r"outputs must be a list of names of layers .* there are: 0, 1, 2"):
            Orthogonalize().split(model, outputs=wrong)
    with pytest.raises(ValueError, match="Linear has no hidden weight"):
        Orthogonalize().split(nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        Orthogonalize().split([])


def test_an_embedding_in_the_optimizer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = wellcond.attach(optimizer, model, Orthogonalize()).report()
    line = next(line for line in report.splitlines() if line.startswith("0.weight"))
    assert "unchanged: an embedding table" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("momentum", 1.0),
        ("momentum", math.nan),
        ("nesterov", 1),
        ("steps", 0),
        ("coefficients", (1.0, 2.0)),
        ("scale", "rms"),
        ("precision", "half"),
        ("where", 3),
        ("parts", 3),
    ],
)
def test_wrong_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        Orthogonalize(**{option: value})


def test_parts_that_do_not_divide_are_an_error_that_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'0\.weight' has 7, parts is 3"):
        wellcond.attach(optimizer, model, Orthogonalize(parts=lambda name, module: 3))
