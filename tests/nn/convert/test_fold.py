"""Folding: sparse switchable normalizations that have chosen become plain layers that compute the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wellcond import WellcondWarning
from wellcond.nn import (
    SparseSwitchableNorm1d,
    SparseSwitchableNorm2d,
    SparseSwitchableNorm3d,
    SwitchableNorm2d,
    fold_switchable,
    switch_logits,
)

FLOAT64 = torch.float64
ALL = ("in", "ln", "bn")
PLAIN: dict[str, dict[int, type[nn.Module]]] = {
    "in": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "ln": dict.fromkeys((1, 2, 3), nn.GroupNorm),
    "bn": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
KINDS = {1: SparseSwitchableNorm1d, 2: SparseSwitchableNorm2d, 3: SparseSwitchableNorm3d}


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def batch(step: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 2 * torch.randn(shape or (6, 4, 5, 5), generator=generator, dtype=FLOAT64) + 1


def chosen(mean: str, var: str | None = None, channels: int = 4, dims: int = 2, **options: Any) -> Any:
    """A layer that has trained for two batches and chosen; for both the same where `var` is None."""
    shared = options.pop("shared_logits", var is None)
    layer = KINDS[dims](channels, shared_logits=shared, **options).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.copy_(torch.randn(channels, generator=generator) + 1)
        for logits, name in ((layer.mean_logits, mean), (layer.var_logits, var or mean)):
            if logits is not None:
                logits.copy_(torch.tensor([float(each == name) for each in layer.normalizers]))
    layer.radius = 1.0
    for step in range(2):
        layer(batch(step, 6, channels, *(5, 2, 3)[:dims]))
    assert layer.chosen == (mean, var or mean)
    return layer


def check_same(folded: nn.Module, original: nn.Module, *shape: int) -> None:
    """In training, for several steps, and in evaluation: outputs, gradients of inputs and parameters."""
    for step, training in enumerate((True, False, True, True, False)):
        x, other = batch(step, *shape).requires_grad_(), batch(step, *shape).requires_grad_()
        folded.train(training)
        original.train(training)
        y, expected = folded(x), original(other)
        close(y, expected)
        upstream = batch(20 + step, *y.shape)
        folded.zero_grad()
        original.zero_grad()
        y.backward(upstream)
        expected.backward(upstream)
        close(x.grad, other.grad, 1e-11)
        theirs = dict(original.named_parameters())
        for name, parameter in folded.named_parameters():
            close(parameter.grad, theirs[name].grad, 1e-11)
        buffers = dict(original.named_buffers())
        for name, buffer in folded.named_buffers():
            close(buffer, buffers[name])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shared", [True, False])
def test_folded_computes_the_same(name: str, dims: int, shared: bool) -> None:
    layer = chosen(name, dims=dims, shared_logits=shared)
    original = copy.deepcopy(layer)
    weight, bias = layer.weight, layer.bias
    folded = fold_switchable(layer)
    assert folded is layer
    assert type(folded) is PLAIN[name][dims]
    assert folded.weight is weight
    assert folded.bias is bias
    assert {key for key, _ in folded.named_parameters()} == {"weight", "bias"}
    assert folded.eps == original.eps
    check_same(folded, original, 6, 4, *(5, 2, 3)[:dims])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3}, {"eps": 0.1}],
    ids=str,
)
def test_options_go_on(name: str, options: dict[str, Any]) -> None:
    layer = chosen(name, **options)
    original = copy.deepcopy(layer)
    check_same(fold_switchable(layer), original, 6, 4, 3, 3)


def test_batch_normalization_goes_on_with_its_running_statistics() -> None:
    layer = chosen("bn")
    running = {name: layer.get_buffer(name) for name in ("running_mean", "running_var", "num_batches_tracked")}
    before = {name: buffer.clone() for name, buffer in running.items()}
    fold_switchable(layer)
    assert dict(layer.named_buffers()).keys() == running.keys()
    for name, buffer in running.items():
        assert layer.get_buffer(name) is buffer
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("name", ["in", "ln"])
def test_the_others_drop_them(name: str) -> None:
    assert dict(fold_switchable(chosen(name)).named_buffers()) == {}


@pytest.mark.parametrize("name", ["in", "ln"])
def test_without_batch_normalization(name: str) -> None:
    layer = chosen(name, normalizers=("in", "ln"))
    original = copy.deepcopy(layer)
    check_same(fold_switchable(layer), original, 6, 4, 3, 3)


class Net(nn.Module):
    """A small network with a residual connection and one normalization of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), chosen("bn"), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = chosen("in")
        self.head = nn.Sequential(chosen("ln"), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.norm(self.conv(x)))


def test_a_network_with_all_three_kinds() -> None:
    torch.manual_seed(0)
    net = Net()
    original = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fold_switchable(net) is net
    kinds = [type(module) for module in net.modules() if hasattr(module, "eps")]
    assert kinds == [nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm]
    assert net.head[0].num_groups == 1
    check_same(net, original, 5, 3, 4, 4)


def test_an_optimizer_goes_on() -> None:
    """It holds the same parameters, so its momentum is still theirs; the logits get no gradient any more."""
    torch.manual_seed(0)
    net = Net()
    original = copy.deepcopy(net)
    first = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    second = torch.optim.SGD(original.parameters(), 0.05, momentum=0.9)
    for step in range(6):
        if step == 3:
            held = {id(parameter) for group in first.param_groups for parameter in group["params"]}
            logits = {id(parameter) for parameter in switch_logits(net)}
            fold_switchable(net)
            assert {id(parameter) for parameter in net.parameters()} == held - logits
        for model, optimizer in ((net, first), (original, second)):
            optimizer.zero_grad()
            model(batch(step, 5, 3, 4, 4)).square().sum().mul(1e-3).backward()
            optimizer.step()
        theirs = dict(original.named_parameters())
        for name, parameter in net.named_parameters():
            close(parameter.detach(), theirs[name].detach(), 1e-10)
    assert switch_logits(net) == []


# what is not folded -------------------------------------------------------------------------------------------------


def test_a_model_without_such_layers_is_refused() -> None:
    for model in (nn.Conv2d(3, 3, 1), SwitchableNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))):
        with pytest.raises(ValueError, match="has no SparseSwitchableNorm1d, 2d or 3d to fold"):
            fold_switchable(model)


def test_none_that_has_chosen_is_refused() -> None:
    model = nn.Sequential(SparseSwitchableNorm2d(4), chosen("in", "bn"))
    state, kinds = copy.deepcopy(model.state_dict()), [type(layer) for layer in model]
    with pytest.raises(ValueError, match="no layer can be folded: .* has not chosen yet"):
        fold_switchable(model)
    assert [type(layer) for layer in model] == kinds
    close(dict(model.state_dict()), dict(state), 0)


def test_a_radius_of_1_alone_is_no_choice() -> None:
    layer = SparseSwitchableNorm2d(4)
    layer.radius = 1.0
    with pytest.raises(ValueError, match="has not chosen yet"):
        fold_switchable(layer)


def test_layers_that_stay_are_named() -> None:
    half = chosen("in", "bn")
    model = nn.Sequential(SparseSwitchableNorm2d(4), chosen("ln"), nn.Sequential(half, chosen("bn"))).double()
    original = copy.deepcopy(model)
    with pytest.warns(
        WellcondWarning, match="'0' has not chosen yet; '2.0' chose 'in' for the means and 'bn' for"
    ) as record:
        fold_switchable(model)
    assert len(record) == 1
    assert "'1'" not in str(record[0].message)
    assert record[0].filename == __file__
    assert isinstance(model[0], SparseSwitchableNorm2d)
    assert isinstance(model[1], nn.GroupNorm)
    assert model[2][0] is half
    assert isinstance(half, SparseSwitchableNorm2d)
    assert isinstance(model[2][1], nn.BatchNorm2d)
    assert not isinstance(model[2][1], SparseSwitchableNorm2d)
    model[0].radius = original[0].radius = 0.5
    check_same(model, original, 6, 4, 3, 3)


def test_where() -> None:
    model = nn.Sequential(chosen("in"), chosen("ln"), SparseSwitchableNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold_switchable(model, lambda name, module: name == "1")
    assert [type(layer) for layer in model] == [SparseSwitchableNorm2d, nn.GroupNorm, SparseSwitchableNorm2d]
    with pytest.raises(ValueError, match="to fold"):
        fold_switchable(model, lambda name, module: False)


def test_a_layer_that_is_used_twice() -> None:
    layer = chosen("in")
    model = nn.ModuleDict({"first": layer, "second": layer})
    fold_switchable(model)
    assert model["first"] is model["second"]
    assert type(model["second"]) is nn.InstanceNorm2d


def test_folded_twice() -> None:
    model = nn.Sequential(chosen("in"), SparseSwitchableNorm2d(4))
    with pytest.warns(WellcondWarning, match="'1'"):
        fold_switchable(model)
    with pytest.raises(ValueError, match="no layer can be folded"):
        fold_switchable(model)


# what plain layers do not do -----------------------------------------------------------------------------------------


def folded_if_possible(layer: nn.Module) -> nn.Module:
    """Return the layer, folded unless that is refused."""
    try:
        return fold_switchable(layer)
    except ValueError:
        return layer


@pytest.mark.parametrize("name", ALL)
def test_unbiased_variances(name: str) -> None:
    """No plain layer has instances' unbiased variances, nor a training batch's variance made of them."""
    layer = chosen(name, unbiased=True)
    original = copy.deepcopy(layer)
    check_same(folded_if_possible(layer), original, 6, 4, 3, 3)


@pytest.mark.parametrize("name", ALL)
def test_ghost_groups(name: str) -> None:
    """`nn.BatchNorm2d` has none, so that it would train differently."""
    layer = chosen(name, group_size=2)
    original = copy.deepcopy(layer)
    check_same(folded_if_possible(layer), original, 6, 4, 3, 3)


@pytest.mark.parametrize("name", ["ln", "bn"])
def test_features_without_positions(name: str) -> None:
    layer = chosen(name, dims=1)
    original = copy.deepcopy(layer)
    check_same(fold_switchable(layer), original, 6, 4)
    layer = chosen(name)
    original = copy.deepcopy(layer)
    check_same(fold_switchable(layer), original, 6, 4, 1, 1)


def test_instances_without_positions_are_torch_s_error() -> None:
    """Where all that is left of an instance is β; `nn.InstanceNorm*` takes no such features."""
    with pytest.raises(ValueError, match="num_features"):
        fold_switchable(chosen("in", dims=1))(batch(5, 6, 4))
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        fold_switchable(chosen("in"))(batch(5, 6, 4, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer = chosen(name).to(dtype).eval()
    original = copy.deepcopy(layer)
    x = batch(3).to(dtype)
    y = fold_switchable(layer)(x)
    assert y.dtype == dtype
    close(y.double(), original(x).double(), {2: 4e-2, 4: 1e-5}[dtype.itemsize])
