"""Moments with their graph, and normalization by them: derivatives by finite differences, values by loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad as func_grad
from torch.func import vmap

from wellcond.nn.functional.live import live_moments, normalize_with

FLOAT64 = torch.float64
EPS = 1e-2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def as_it_comes(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


FORMATS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((3, 2, 2, 3), as_it_comes),
    "channels_last": ((3, 2, 2, 3), channels_last),
    "transposed": ((3, 2, 2, 3), transposed),
    "strided": ((3, 2, 2, 3), every_other),
    "flat": ((4, 3), as_it_comes),
    "1x1": ((4, 3, 1, 1), as_it_comes),
    "sequence": ((3, 2, 4), as_it_comes),
    "volume": ((2, 2, 2, 1, 2), as_it_comes),
    "one instance": ((1, 2, 3, 2), as_it_comes),
}
formats = pytest.mark.parametrize(("shape", "layout"), FORMATS.values(), ids=FORMATS)


def mixture(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Normalize with something of the instance and something of the batch, as the layers do, but not evenly."""
    moments, features = live_moments(x)
    mean = 0.3 * moments.mean + 0.5 * moments.mean.mean(0) + 0.1
    var = 0.4 * moments.var + 0.2 * moments.mean.square().mean(1, keepdim=True) + 0.3
    return normalize_with(features, mean, var, weight, bias, EPS)


def mixture_by_loops(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    samples, channels = x.shape[:2]
    own = [[x[n, c].sum() / x[n, c].numel() for c in range(channels)] for n in range(samples)]
    rows = []
    for n in range(samples):
        row = []
        for c in range(channels):
            values = x[n, c]
            var = ((values - own[n][c]) ** 2).sum() / values.numel()
            mean = 0.3 * own[n][c] + 0.5 * sum(own[k][c] for k in range(samples)) / samples + 0.1
            var = 0.4 * var + 0.2 * sum(own[n][k] ** 2 for k in range(channels)) / channels + 0.3
            y = (values - mean) / (var + EPS) ** 0.5
            y = y if weight is None else y * weight[c]
            row.append(y if bias is None else y + bias[c])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@formats
@pytest.mark.parametrize("affine", [True, False])
def test_values_and_gradients_are_those_of_loops(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], affine: bool
) -> None:
    leaf, other = draw(*shape).requires_grad_(), draw(*shape).requires_grad_()
    parameters = [draw(shape[1], seed=seed).requires_grad_() for seed in (1, 2)] if affine else [None, None]
    wanted = [part for part in parameters if part is not None]
    x = layout(leaf)
    y, expected = mixture(x, *parameters), mixture_by_loops(other, *parameters)
    close(y, expected)
    assert y.stride() == torch.empty_like(x).stride()
    upstream = draw(*shape, seed=5)
    close(
        torch.autograd.grad(y, [leaf, *wanted], upstream),
        torch.autograd.grad(expected, [other, *wanted], upstream),
    )


@formats
def test_the_gradient_that_comes_in_may_have_any_format(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    """As after a sum, whose gradient is expanded, and after a transposition."""
    leaf, other = draw(*shape).requires_grad_(), draw(*shape).requires_grad_()
    weight, bias = draw(shape[1], seed=1), draw(shape[1], seed=2)
    mixture(layout(leaf), weight, bias).sum().backward()
    mixture_by_loops(other, weight, bias).sum().backward()
    close(leaf.grad, other.grad)
    leaf.grad = other.grad = None
    upstream = draw(*reversed(shape), seed=5)
    mixture(layout(leaf), weight, bias).permute(*reversed(range(len(shape)))).backward(upstream)
    mixture_by_loops(other, weight, bias).permute(*reversed(range(len(shape)))).backward(upstream)
    close(leaf.grad, other.grad)


@formats
def test_first_and_second_derivatives(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]) -> None:
    inputs = [draw(*shape), draw(shape[1], seed=1), draw(shape[1], seed=2)]
    inputs = [each.requires_grad_() for each in inputs]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return mixture(layout(x), weight, bias)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@formats
def test_derivatives_of_the_moments_alone(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]) -> None:
    """The features are not used."""
    x = draw(*shape).requires_grad_()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        moments, _ = live_moments(layout(x))
        return moments.mean, moments.var

    assert gradcheck(both, (x,))
    assert gradgradcheck(both, (x,))
    assert gradcheck(lambda x: both(x)[0], (x,))
    assert gradcheck(lambda x: both(x)[1], (x,))
    assert gradgradcheck(lambda x: both(x)[1], (x,))


# Of a channel, as running statistics are; of an instance; of both; one number.
STATISTICS = {"[C]": (False, True), "[N, 1]": (True, False), "[N, C]": (True, True), "[1, 1]": (False, False)}


@formats
@pytest.mark.parametrize("of", STATISTICS.values(), ids=STATISTICS)
def test_derivatives_with_given_moments(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], of: tuple[bool, bool]
) -> None:
    """They do not depend on x."""
    statistics = shape[1:2] if of == (False, True) else tuple(shape[k] if of[k] else 1 for k in (0, 1))
    inputs = [draw(*shape), draw(*statistics, seed=1), draw(*statistics, seed=2).square() + 0.5]
    x, mean, var, weight = inputs = [each.requires_grad_() for each in [*inputs, draw(shape[1], seed=3)]]

    def function(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
        return normalize_with(live_moments(layout(x))[1], mean, var, weight, None, EPS)

    def formula(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
        over = (*shape[:2], *(1 for _ in shape[2:]))
        mean, var = mean.expand(shape[:2]).reshape(over), var.expand(shape[:2]).reshape(over)
        return (x - mean) / (var + EPS) ** 0.5 * weight.expand(shape[:2]).reshape(over)

    upstream = draw(*shape, seed=5)
    close(function(*inputs), formula(*inputs))
    close(
        torch.autograd.grad(function(*inputs), inputs, upstream),
        torch.autograd.grad(formula(*inputs), inputs, upstream),
    )
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    (gradient,) = torch.autograd.grad(function(x, mean.detach(), var.detach(), weight.detach()), x, upstream)
    close(gradient, torch.autograd.grad(formula(*inputs), x, upstream)[0])


@formats
def test_inputs_without_a_gradient(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]) -> None:
    """Those of a first layer: parameters and given moments get theirs."""
    x = layout(draw(*shape))
    weight, bias = draw(shape[1], seed=1).requires_grad_(), draw(shape[1], seed=2).requires_grad_()
    upstream = draw(*shape, seed=5)
    close(
        torch.autograd.grad(mixture(x, weight, bias), [weight, bias], upstream),
        torch.autograd.grad(mixture_by_loops(x, weight, bias), [weight, bias], upstream),
    )
    share = torch.tensor(0.3, dtype=FLOAT64, requires_grad=True)

    def function(share: Tensor, weight: Tensor) -> Tensor:
        moments, features = live_moments(x)
        return normalize_with(features, share * moments.mean, share * moments.var + share**2, weight, bias, EPS)

    assert gradcheck(function, (share, weight))
    assert gradgradcheck(function, (share, weight))


def test_no_graph_where_none_is_wanted() -> None:
    x = draw(3, 2, 4)
    moments, features = live_moments(x)
    assert not moments.mean.requires_grad
    assert not normalize_with(features, moments.mean, moments.var, None, None, EPS).requires_grad
    with torch.no_grad():
        moments, features = live_moments(x.requires_grad_())
        assert not moments.var.requires_grad
        assert not normalize_with(features, moments.mean, moments.var, None, None, EPS).requires_grad


def test_moments_are_those_of_each_channel_of_each_instance() -> None:
    x = draw(3, 2, 4, 5)
    moments, _ = live_moments(x)
    assert moments.elements == 20
    for n in range(3):
        for c in range(2):
            mean = x[n, c].sum() / 20
            close(moments.mean[n, c], mean)
            close(moments.var[n, c], ((x[n, c] - mean) ** 2).sum() / 20)


def test_one_position_has_no_variance_and_no_gradient_of_it() -> None:
    x = draw(3, 2, 1, 1).requires_grad_()
    moments, _ = live_moments(x)
    close(moments.var, torch.zeros(3, 2, dtype=FLOAT64))
    close(moments.mean, x.view(3, 2))
    (moments.mean.sum() + moments.var.sum()).backward()
    close(x.grad, torch.ones_like(x))


def test_moments_need_two_dimensions() -> None:
    for x in (torch.randn(3), torch.randn(3, requires_grad=True)):
        with pytest.raises(ValueError, match=r"\[N, C, \*positions\], got \[3\]"):
            live_moments(x)


def test_the_output_may_be_changed_in_place() -> None:
    """As an in-place ReLU after the layer does."""
    leaf, other = draw(3, 2, 4).requires_grad_(), draw(3, 2, 4).requires_grad_()
    mixture(leaf, None, None).relu_().sum().backward()
    mixture_by_loops(other, None, None).relu().sum().backward()
    close(leaf.grad, other.grad)


def test_the_input_has_other_uses() -> None:
    """As of a residual connection."""
    leaf, other = draw(3, 2, 4).requires_grad_(), draw(3, 2, 4).requires_grad_()
    x, y = leaf * 2, other * 2
    (mixture(x, None, None) * x.sin()).sum().backward()
    (mixture_by_loops(y, None, None) * y.sin()).sum().backward()
    close(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5)], ids=str
)
@formats
def test_narrow_dtypes(
    shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """Statistics in float32, the output and the gradient of x in the input's dtype, parameters' in theirs."""
    leaf = draw(*shape).to(dtype).requires_grad_()
    other = leaf.detach().double().requires_grad_()
    for kind in {dtype, torch.float32}:
        weight, bias = (draw(shape[1], seed=seed).to(kind).requires_grad_() for seed in (1, 2))
        moments, _ = live_moments(layout(leaf))
        assert moments.mean.dtype == moments.var.dtype == torch.float32
        y = mixture(layout(leaf), weight, bias)
        assert y.dtype == dtype
        wide = [each.detach().double().requires_grad_() for each in (weight, bias)]
        expected = mixture_by_loops(other, *wide)
        upstream = draw(*shape, seed=5).to(dtype)
        found = torch.autograd.grad(y, [leaf, weight, bias], upstream)
        assert [each.dtype for each in found] == [dtype, kind, kind]
        close(y.double(), expected, tolerance)
        wanted = torch.autograd.grad(expected, [other, *wide], upstream.double())
        for each, reference in zip(found, wanted, strict=True):
            scale = max(1.0, float(reference.abs().max()))
            close(each.double() / scale, reference / scale, tolerance)


@pytest.mark.parametrize("layout", [as_it_comes, channels_last], ids=["contiguous", "channels_last"])
def test_a_large_mean_does_not_cancel(layout: Callable[[Tensor], Tensor]) -> None:
    """Of 3000 and a deviation of 1, in float32: E[x²] − μ² has an error of the order of the variance."""
    x = (draw(4, 3, 16, 16) + 3000).float()
    moments, _ = live_moments(layout(x))
    close(moments.var.double(), x.double().flatten(2).var(2, correction=0), 1e-3)
    live, _ = live_moments(layout(x).requires_grad_())
    close(live.var.double(), x.double().flatten(2).var(2, correction=0), 1e-3)


def test_function_transforms() -> None:
    x = draw(3, 2, 4)

    def loss(x: Tensor) -> Tensor:
        return mixture(x, None, None).pow(3).sum()

    leaf = x.clone().requires_grad_()
    close(func_grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    several = torch.stack([x, 2 * x])
    close(vmap(lambda x: mixture(x, None, None))(several), torch.stack([mixture(x, None, None) for x in several]))


def test_nothing() -> None:
    x = torch.empty(0, 3, 2, 2, requires_grad=True)
    moments, features = live_moments(x)
    weight = torch.ones(3, requires_grad=True)
    y = normalize_with(features, moments.mean, moments.var + 1, weight, None, EPS)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    close(weight.grad, torch.zeros(3))
