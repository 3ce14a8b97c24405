"""Moving Average Batch Normalization: its averages, and the centralized weights before it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.nn import (
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    conversion_report,
    convert_norm,
    weight_centralize,
    weight_standardize,
)

FLOAT64 = torch.float64


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def draw(step: int, samples: int = 4) -> Tensor:
    return torch.randn(samples, 3, 5, generator=torch.Generator().manual_seed(step), dtype=FLOAT64) + step


def test_both_averages_over_many_batches() -> None:
    """χ² and Ψ by lists, as the paper has them; r from the fifth batch on, clipped in the first channel."""
    layer = MovingAverageBatchNorm1d(3, window=3, warmup_steps=1, scale_after=4, momentum=0.4).to(FLOAT64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
    squares, products, running = [], [], torch.ones(3, dtype=FLOAT64)
    for step in range(7):
        x = draw(step) * (1 if step < 5 else torch.tensor([30.0, 1.0, 1.0]).view(3, 1))
        x.requires_grad_()
        upstream = draw(50 + step)
        squares.append(x.detach().square().mean((0, 2)))
        chi = (sum(squares[-3:]) / 3 if step >= 2 else squares[-1]) + layer.eps
        r = (chi / (running + layer.eps)).sqrt().clamp(0.2, 5) if step >= 4 else torch.ones(3, dtype=FLOAT64)
        z = x.detach() / chi.sqrt().view(3, 1)
        g = upstream * (layer.weight * r).detach().view(3, 1)
        products.append((z * g).mean((0, 2)))
        psi = sum(products[-3:]) / 3 if step >= 2 else products[-1]
        y = layer(x)
        close(y, (layer.weight * r).view(3, 1) * z + layer.bias.view(3, 1))
        close(torch.autograd.grad(y, x, upstream)[0], (g - z * psi.view(3, 1)) / chi.sqrt().view(3, 1))
        share = max(0.4, 1 / (step + 1))  # the first batch takes the place of what no batch has said
        running = (1 - share) * running + share * (chi - layer.eps)
        close(layer.running_var, running)
    assert not layer.running_mean.any()


def test_one_batch_alone_has_the_derivative() -> None:
    layer = MovingAverageBatchNorm1d(3, window=1).to(FLOAT64)
    x, again = draw(1).requires_grad_(), draw(1).requires_grad_()
    layer(x).sin().sum().backward()
    (again / (again.square().mean((0, 2)) + layer.eps).sqrt().view(3, 1)).sin().sum().backward()
    close(x.grad, again.grad)


def test_a_second_derivative_is_refused() -> None:
    layer, x = MovingAverageBatchNorm1d(3).to(FLOAT64), draw(1).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Moving Average Batch Normalization has no second derivative"):
        gradient.sum().backward()


def test_compiled_it_runs_uncompiled() -> None:
    torch._dynamo.reset()
    layer = MovingAverageBatchNorm1d(3, window=2, warmup_steps=0).to(FLOAT64)
    other = copy.deepcopy(layer)
    compiled = torch.compile(nn.Sequential(layer, nn.Tanh()), backend="aot_eager")
    for step in range(4):
        x, again = draw(step).requires_grad_(), draw(step).requires_grad_()
        (compiled(x) * draw(9)).sum().backward()
        (other(again).tanh() * draw(9)).sum().backward()
        close(x.grad, again.grad)
    close(dict(layer.named_buffers()), dict(other.named_buffers()))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)
    )


def test_conversion_centralizes_the_weights_before() -> None:
    plain = model()
    converted = convert_norm(copy.deepcopy(plain), "mabn", window=2)
    for index in (0, 3):
        kept = converted[index].parametrizations.weight.original
        assert torch.equal(kept, plain[index].weight)
        close(converted[index].weight.mean((1, 2, 3)), torch.zeros(4), 1e-7)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        converted(x).square().sum().backward()
    expected = converted.eval()(x)
    parameters = [converted[0].parametrizations.weight.original, converted[1].weight]
    copied = copy.deepcopy(converted)
    for each in (converted, copied):
        convert_norm(each, "bn")
        assert type(each[0]) is nn.Conv2d
        assert each.state_dict().keys() == plain.state_dict().keys()
        close(each.eval()(x), expected, 1e-5)
    assert converted[0].weight is parameters[0]  # an optimizer goes on with it
    assert converted[1].weight is parameters[1]


def test_conversion_of_one_ends_its_own_alone() -> None:
    converted = convert_norm(model(), "mabn")
    convert_norm(converted, "bn", where=lambda name, module: name == "1")
    assert not parametrize.is_parametrized(converted[0])
    assert parametrize.is_parametrized(converted[3])
    converted[4] = nn.BatchNorm2d(4)  # by hand: the next conversion sees it
    convert_norm(converted, "ghost", group_size=2)
    assert not parametrize.is_parametrized(converted[3])


def test_standardized_weights_are_centralized_already() -> None:
    net = model()
    weight_standardize(net[0])
    weight_centralize(net[3])
    convert_norm(net, "mabn")
    assert [len(net[index].parametrizations.weight) for index in (0, 3)] == [1, 1]
    convert_norm(net, "bn")  # and what was there before stays
    assert all(parametrize.is_parametrized(net[index]) for index in (0, 3))


def test_units_of_one_input_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    convert_norm(net, "mabn")
    assert "comes after '0', which cannot be centralized" in conversion_report(net).left["1"]
    assert isinstance(net[3], MovingAverageBatchNorm2d)


def test_features_of_trained_statistics_have_no_mean_any_more() -> None:
    net = model()
    net(torch.randn(4, 3, 8, 8))
    assert net[1].running_mean.any()
    convert_norm(net, "mabn")
    assert not net[1].running_mean.any()
    with torch.no_grad():
        net[1].running_mean.fill_(0.5)  # as a checkpoint has it: it is subtracted, in training, too
    y, x = net[1](net[0](torch.ones(2, 3, 8, 8))), net[0](torch.ones(2, 3, 8, 8)) - 0.5
    close(y, x / (x.square().mean((0, 2, 3)) + 1e-5).sqrt().view(4, 1, 1), 1e-5)


@pytest.mark.parametrize("name", ["window", "warmup_steps", "scale_after"])
def test_bad_options(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        MovingAverageBatchNorm1d(3, **{name: -1})


@pytest.mark.parametrize(
    ("to", "options"), [("mabn", {"warmup_steps": 0}), ("cbn", {}), ("cbn", {"compensate": False})]
)
@pytest.mark.parametrize("window", [1, 2, 4, 7])
def test_another_window_begins_empty(to: str, options: dict, window: int) -> None:
    """A counter of what the old window held would count entries that the new one does not have."""
    net = convert_norm(model(), to, window=4, **options)
    for step in range(6):
        net(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
    fresh = convert_norm(copy.deepcopy(net), "bn")
    convert_norm(net, to, window=window, **options)
    convert_norm(fresh, to, window=window, **options)
    x = torch.randn(2, 3, 8, 8)
    if window != 4:
        torch.testing.assert_close(net(x), fresh(x))
    else:
        counts = [int(value) for name, value in net[1].named_buffers() if name.endswith("seen")]
        # One that compensates is told of the layer before anew.
        assert set(counts) == ({0} if (to, options) == ("cbn", {}) else {6})
