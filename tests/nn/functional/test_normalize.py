"""The one normalizer, its backward (2.14) and second derivatives against explicit loops in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wellcond.nn.functional.normalize import normalize
from wellcond.numerics.moments import Moments, batch_moments, ghost_moments, ghost_sizes

FLOAT64 = torch.float64


def by_loops(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    history: list[Moments],
    share: float,
    eps: float,
    bounds: list,
) -> Tensor:
    """(x − μ)/√(σ² + ε)·γ + β with μ = share·μ_B + (1 − share)·history, by channel and group, with autograd's graph."""
    columns = []
    for channel in range(x.shape[1]):
        rows = []
        for group, (start, stop) in enumerate(bounds):
            own = x[start:stop, channel]
            count = own.numel()
            mean = own.sum() / count
            var = ((own - mean) ** 2).sum() / count
            mean = share * mean + (1 - share) * history[group].mean[channel]
            var = share * var + (1 - share) * history[group].var[channel]
            y = (own - mean) / (var + eps) ** 0.5
            if weight is not None:
                y = y * (weight if weight.dim() == 1 else weight[group])[channel]
            if bias is not None:
                y = y + (bias if bias.dim() == 1 else bias[group])[channel]
            rows.append(y)
        columns.append(torch.cat(rows))
    return torch.stack(columns, 1)


class Case:
    """Inputs, an old mean and variance for each group, and what the normalizer is to be called with."""

    def __init__(
        self,
        shape: tuple[int, ...],
        size: int | None = None,
        share: float = 1.0,
        weight: str = "channel",
        bias: str = "channel",
        memory: str = "contiguous",
        dtype: torch.dtype = FLOAT64,
        eps: float = 1e-3,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape))

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=FLOAT64)

        x = (1.5 * random(*shape) + 0.5).to(dtype)
        if memory == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif memory == "sliced":
            x = torch.cat([x, x], 0)[::2]
        elif memory == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        self.x = x.requires_grad_()
        self.sizes = ghost_sizes(shape[0], size)
        ends = np.cumsum([0, *(self.sizes or (shape[0],))]).tolist()
        self.bounds = list(itertools.pairwise(ends))
        groups, channels = len(self.bounds), shape[1]
        parameter = torch.promote_types(dtype, torch.float32)
        shapes = {"channel": (channels,), "group": (groups, channels) if self.sizes else (channels,)}
        self.weight = None if weight == "none" else random(*shapes[weight]).to(parameter).requires_grad_()
        self.bias = None if bias == "none" else random(*shapes[bias]).to(parameter).requires_grad_()
        old_mean, old_var = random(groups, channels), random(groups, channels).square() + 0.1
        self.history = [Moments(m, v, 1) for m, v in zip(old_mean, old_var, strict=True)]
        self.old = (old_mean, old_var) if self.sizes else (old_mean[0], old_var[0])
        self.share, self.eps = share, eps
        self.upstream = random(*shape)

    def call(self, x: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        own = ghost_moments(x, self.sizes)
        old_mean, old_var = (old.to(own.mean) for old in self.old)
        mean = self.share * own.mean + (1 - self.share) * old_mean
        var = self.share * own.var + (1 - self.share) * old_var
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        if self.share == 0:
            return normalize(x, mean, var, weight, bias, self.eps, sizes=self.sizes, batch_weight=0.0)
        return normalize(x, mean, var, weight, bias, self.eps, own, self.share, self.sizes)

    def expected(self) -> Tensor:
        return by_loops(self.x, self.weight, self.bias, self.history, self.share, self.eps, self.bounds)

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.x, self.weight, self.bias) if tensor is not None]


def close(actual: object, expected: object, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@settings(max_examples=120, deadline=None)
@given(
    samples=st.integers(2, 7),
    rest=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    size=st.none() | st.integers(2, 7),
    share=st.sampled_from([0.0, 0.25, 1.0]),
    weight=st.sampled_from(["none", "channel", "group"]),
    bias=st.sampled_from(["none", "channel", "group"]),
    memory=st.sampled_from(["contiguous", "channels last", "sliced", "transposed"]),
)
def test_any_shape(
    samples: int, rest: list[int], size: int | None, share: float, weight: str, bias: str, memory: str
) -> None:
    case = Case((samples, *rest), size, share, weight, bias, memory)
    y, expected = case.call(), case.expected()
    close(y, expected)
    found = torch.autograd.grad(y, case.leaves, case.upstream, retain_graph=True)
    wanted = torch.autograd.grad(expected, case.leaves, case.upstream, create_graph=True)
    close(found, wanted)
    # Second derivatives, of a function of the first ones that mixes them.
    upstream = case.upstream.clone().requires_grad_()
    again = torch.autograd.grad(case.call(), case.leaves, upstream, create_graph=True)
    outer = case.expected()
    reference = torch.autograd.grad(outer, case.leaves, upstream, create_graph=True)
    tensors = [*case.leaves, upstream]
    close(
        torch.autograd.grad(
            sum(grad.sin().sum() for grad in again), tensors, allow_unused=True, materialize_grads=True
        ),
        torch.autograd.grad(
            sum(grad.sin().sum() for grad in reference), tensors, allow_unused=True, materialize_grads=True
        ),
        1e-8,
    )


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_equation_2_14_by_hand(share: float) -> None:
    case = Case((3, 2, 4), share=share)
    x, grad, weight = case.x.detach(), case.upstream, case.weight.detach()
    m = 12
    expected = torch.empty_like(x)
    for c in range(2):
        own, old = x[:, c], case.history[0]
        mean_b, var_b = own.mean(), own.var(correction=0)
        mean = share * mean_b + (1 - share) * old.mean[c]
        var = share * var_b + (1 - share) * old.var[c] + case.eps
        g = grad[:, c] * weight[c]
        d_var = (g * (own - mean)).sum() * -0.5 * var**-1.5 * share
        d_mean = g.sum() * -share / var.sqrt()
        expected[:, c] = g / var.sqrt() + d_var * 2 * (own - mean_b) / m + d_mean / m
    (found,) = torch.autograd.grad(case.call(), case.x, grad)
    close(found, expected, 1e-12)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gradcheck(size: int | None, share: float) -> None:
    case = Case((4, 2, 3), size, share)
    assert torch.autograd.gradcheck(case.call, (case.x, case.weight, case.bias))
    assert torch.autograd.gradgradcheck(case.call, (case.x, case.weight, case.bias))


@pytest.mark.parametrize("size", [None, 2])
def test_the_weight_may_be_a_tensor(size: int | None) -> None:
    case, other = Case((4, 3, 5), size, 0.25), Case((4, 3, 5), size, 0.25)
    expected = case.call()
    other.share = torch.tensor(0.25, dtype=FLOAT64)
    y = other.call()
    close(y, expected, 1e-14)
    close(
        torch.autograd.grad(y, other.leaves, case.upstream), torch.autograd.grad(expected, case.leaves, case.upstream)
    )


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("size", [None, 2])
def test_only_what_is_asked_for(wanted: tuple[bool, ...], size: int | None) -> None:
    if not any(wanted):
        return
    case = Case((5, 3, 2), size, 0.5)
    expected = torch.autograd.grad(case.expected(), case.leaves, case.upstream)
    for tensor, needed in zip(case.leaves, wanted, strict=True):
        tensor.requires_grad_(needed)
    found = torch.autograd.grad(
        case.call(), [t for t, needed in zip(case.leaves, wanted, strict=True) if needed], case.upstream
    )
    close(found, tuple(grad for grad, needed in zip(expected, wanted, strict=True) if needed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_half_precision(dtype: torch.dtype, size: int | None, memory: str) -> None:
    """Computed in float32, rounded once; parameters of float32 get gradients of float32."""
    case = Case((4, 3, 5, 2), size, 0.5, memory=memory, dtype=dtype)
    y = case.call()
    assert y.dtype == dtype
    assert y.stride() == case.x.stride()
    rounding = torch.finfo(dtype).eps
    exact = Case((4, 3, 5, 2), size, 0.5, memory=memory, dtype=dtype)
    exact.x = case.x.detach().double().requires_grad_()
    close(y.double(), exact.expected(), rounding)
    upstream = case.upstream.to(dtype)
    found = torch.autograd.grad(y, case.leaves, upstream)
    wanted = torch.autograd.grad(exact.expected(), exact.leaves, upstream.double())
    assert [grad.dtype for grad in found] == [dtype, torch.float32, torch.float32]
    close(found[0].double(), wanted[0], 2 * rounding)
    # Torch's own kernel for channels_last, which nn.BatchNorm2d uses too, adds up in half precision.
    tolerance = rounding if memory == "channels last" else 1e-4
    close([grad.double() for grad in found[1:]], list(wanted[1:]), tolerance)


@pytest.mark.parametrize("size", [None, 2])
def test_a_gradient_of_another_layout(size: int | None) -> None:
    case = Case((4, 3, 5, 2), size, 0.5, memory="channels last")
    expected = torch.autograd.grad(case.expected(), case.x, case.upstream)
    views = {
        "contiguous": case.upstream.contiguous(),
        "flipped": case.upstream.flip(3).contiguous().flip(3),
        "transposed": case.upstream.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for upstream in views.values():
        found = torch.autograd.grad(case.call(), case.x, upstream)
        close(found, expected)
        assert found[0].stride() == case.x.stride()
    ones = torch.autograd.grad(case.expected(), case.x, torch.ones_like(case.upstream))
    close(torch.autograd.grad(case.call(), case.x, torch.ones((), dtype=FLOAT64).expand(4, 3, 5, 2)), ones)


def test_sums_over_ranks() -> None:
    """Two ranks with equal batches: each gets its half of what the joined batch gets."""
    x = torch.randn(3, 2, 4, dtype=FLOAT64)
    weight, bias = torch.randn(2, dtype=FLOAT64), torch.randn(2, dtype=FLOAT64)
    upstream = torch.randn(3, 2, 4, dtype=FLOAT64)
    joined = [torch.cat([x, x]).requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    own = batch_moments(joined[0])
    whole = torch.autograd.grad(
        normalize(joined[0], own.mean, own.var, *joined[1:], 1e-5, own), joined, torch.cat([upstream, upstream])
    )
    half = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = normalize(half[0], own.mean, own.var, *half[1:], 1e-5, own, all_reduce=lambda tensor: 2 * tensor)
    found = torch.autograd.grad(y, half, upstream, retain_graph=True)
    close(found[0], whole[0][:3], 1e-12)
    close([2 * grad for grad in found[1:]], list(whole[1:]), 1e-12)  # averaged over ranks by whoever trains
    first = torch.autograd.grad(y, half[0], upstream, create_graph=True)
    with pytest.raises(RuntimeError):
        first[0].sum().backward()


def test_inputs_are_left_alone() -> None:
    case = Case((4, 3, 5), 2, 0.5)
    kept = [tensor.detach().clone() for tensor in (*case.leaves, case.upstream)]
    case.call().backward(case.upstream)
    for tensor, before in zip((*case.leaves, case.upstream), kept, strict=True):
        assert torch.equal(tensor, before)


def test_a_changed_input_is_noticed() -> None:
    case = Case((4, 3, 5))
    x = case.x.detach().clone().requires_grad_()
    y = case.call(hidden := x * 1.0)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
