"""Weight normalization: torch's own where it is not centred, the paper's formula where it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from wellcond.nn import weight_centralize, weight_normalize

LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, bias=False),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@every_layer
def test_without_centring_it_is_torchs(make):
    layer = make().double()
    plain = copy.deepcopy(layer)
    torchs = parametrizations.weight_norm(copy.deepcopy(layer))
    weight_normalize(layer, centred=False)
    torch.testing.assert_close(layer.weight, plain.weight)
    upstream = torch.randn_like(plain.weight)
    for each in (layer, torchs):
        with torch.no_grad():
            each.parametrizations.weight.original0.mul_(1.5)
        (each.weight * upstream).sum().backward()
    torch.testing.assert_close(layer.weight, torchs.weight)
    for name in ("original0", "original1"):
        one, other = (getattr(each.parametrizations.weight, name) for each in (layer, torchs))
        assert one.shape == other.shape
        torch.testing.assert_close(one.grad, other.grad)


@every_layer
def test_centred_it_is_the_papers_formula(make):
    layer = make().double()
    v = layer.weight.detach().clone().requires_grad_()
    weight_normalize(layer)
    g = layer.parametrizations.weight.original0
    rows = v.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    torch.testing.assert_close(g.flatten(), rows.norm(dim=1))
    upstream = torch.randn_like(v)
    expected = (g.detach().flatten(1) * rows / rows.norm(dim=1, keepdim=True)).view_as(v)
    torch.testing.assert_close(layer.weight, expected)
    (layer.weight * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original1.grad, v.grad)


def test_it_ends_with_the_weight_that_it_had():
    layer = weight_normalize(nn.Conv2d(4, 6, 3))
    x = torch.randn(2, 4, 5, 5)
    expected = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), expected)


def test_a_unit_of_equal_weights_has_no_direction():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    weight_normalize(layer)
    assert not layer.weight.any()
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original1.grad.isfinite().all()


def test_what_cannot_be_normalized_is_refused():
    with pytest.raises(ValueError, match="weight is parametrized already"):
        weight_normalize(parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="centralized already"):
        weight_normalize(weight_centralize(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="at least 2 inputs"):
        weight_normalize(nn.Linear(1, 2))
    with pytest.raises(TypeError, match="no layout is known for ReLU"):
        weight_normalize(nn.ReLU())
