"""Test-time adaptation against its formula."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import wellcond
from wellcond.repair import adapting


def layer() -> nn.BatchNorm2d:
    torch.manual_seed(0)
    found = nn.BatchNorm2d(3).double().eval()
    found.running_mean.normal_()
    found.running_var.uniform_(0.5, 2)
    nn.init.uniform_(found.weight)
    return found


def images(seed: int = 0, count: int = 4) -> Tensor:
    return 2 + torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("remember", [False, True])
def test_batches_have_their_share(count: int, weight: float, remember: bool) -> None:
    norm = layer()
    model = nn.Sequential(norm)
    before = copy.deepcopy(norm.state_dict())
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    with adapting(model, weight, remember=remember) as adapted:
        assert adapted is model
        for seed in range(3):
            x = images(seed, count)
            new_mean = (1 - weight) * mean + weight * x.mean((0, 2, 3))
            new_var = (1 - weight) * var + weight * x.var((0, 2, 3), correction=0)
            torch.testing.assert_close(model(x), mixed(norm, new_mean, new_var, x))
            if remember:
                mean, var = new_mean, new_var
    assert "forward" not in vars(norm)
    torch.testing.assert_close(model(images()), mixed(norm, before["running_mean"], before["running_var"], images()))
    for name, value in before.items():
        assert torch.equal(norm.state_dict()[name], value)


def test_an_error_inside_leaves_nothing_and_layers_in_training_train() -> None:
    norm = layer()

    def failing() -> None:
        with adapting(nn.Sequential(norm), 0.5):
            norm.train()(images())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert int(norm.num_batches_tracked) == 1
    assert "forward" not in vars(norm)


def test_frozen_and_timms_layers_adapt_and_stay_what_they_are() -> None:
    timm = pytest.importorskip("timm.layers")
    frozen = FrozenBatchNorm2d(3).double()
    fused = timm.BatchNormAct2d(3).double().eval()
    model = nn.Sequential(frozen, fused)
    with adapting(model, 1.0):
        output = model(images())
    expected = F.batch_norm(F.batch_norm(images(), None, None, training=True), None, None, training=True).relu()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert type(model[0]) is FrozenBatchNorm2d
    assert list(model[0].parameters()) == []


def test_what_cannot_adapt_is_named() -> None:
    bsr = nn.Sequential(wellcond.nn.BSRBatchNorm2d(3))
    with pytest.raises(TypeError, match="'0', a BSRBatchNorm2d, does not evaluate with running"), adapting(bsr):
        pass
    with pytest.raises(ValueError, match="Linear has no batch normalization"), adapting(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\], got 2.0"), adapting(layer(), 2.0):
        pass
    with adapting(nn.Sequential(wellcond.nn.MomentumBatchNorm2d(3)).double().eval(), 1.0) as model:
        assert abs(float(model(images()).detach().mean())) < 1e-6
