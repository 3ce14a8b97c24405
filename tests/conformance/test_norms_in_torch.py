"""Normalization layers under torch's own machinery: checkpointing, functional calls, double backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from norm_formulas import as_renorm, splitting
from norm_kinds import FLOAT64, KINDS, Kind, assert_same_state, close, draw, evaluated, kinds, reference, trained
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from pairs import parametrize_pairs


class Net(nn.Module):
    """A convolution, the layer, and a nonlinearity: a piece to checkpoint."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 3, 1).to(FLOAT64), norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))


@parametrize_pairs(
    ("kind", KINDS), ("use_reentrant", {"reentrant": True, "not reentrant": False}), ("forwards", [1, 2, 5])
)
def test_activation_checkpointing_changes_nothing(kind: Kind, use_reentrant: bool, forwards: int) -> None:
    net = Net(trained(kind))
    other = copy.deepcopy(net)
    for step in range(2):
        x = [draw(2, 10 * step + number).requires_grad_() for number in range(forwards)]
        again = [inputs.detach().clone().requires_grad_() for inputs in x]
        sum((net(inputs) * draw(2, 90 + i)).sum() for i, inputs in enumerate(x)).backward()
        outputs = [checkpoint(other, inputs, use_reentrant=use_reentrant) for inputs in again]
        sum((y * draw(2, 90 + i)).sum() for i, y in enumerate(outputs)).backward()
        close([inputs.grad for inputs in again], [inputs.grad for inputs in x], 1e-12)
        close([p.grad for p in other.parameters()], [p.grad for p in net.parameters()], 1e-12)
        assert_same_state(other.state_dict(), net.state_dict())
    assert torch.equal(other.eval()(draw(2)), net.eval()(draw(2)))


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_one_batch_twice(kind: Kind, use_reentrant: bool) -> None:
    """The same inputs pass twice before the backward, with another history each time."""
    net = Net(trained(kind))
    other = copy.deepcopy(net)
    x, again = draw(2).requires_grad_(), draw(2).requires_grad_()
    ((net(x) * draw(2, 1)).sum() + (net(x) * draw(2, 2)).sum()).backward()
    first = checkpoint(other, again, use_reentrant=use_reentrant)
    second = checkpoint(other, again, use_reentrant=use_reentrant)
    ((first * draw(2, 1)).sum() + (second * draw(2, 2)).sum()).backward()
    close(again.grad, x.grad, 1e-12)
    assert_same_state(other.state_dict(), net.state_dict())


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_many_micro_batches(kind: Kind, use_reentrant: bool) -> None:
    """A pipeline's schedule: all micro-batches go forward before the first one goes back."""
    net = Net(trained(kind))
    other = copy.deepcopy(net)
    x = [draw(2, number).requires_grad_() for number in range(40)]
    again = [inputs.detach().clone().requires_grad_() for inputs in x]
    for run, inputs in ((net, x), (other, again)):
        outputs = [run(i) if run is net else checkpoint(run, i, use_reentrant=use_reentrant) for i in inputs]
        for y in outputs:
            (y * draw(2, 99)).sum().backward()
    close([inputs.grad for inputs in again], [inputs.grad for inputs in x], 1e-12)
    assert_same_state(other.state_dict(), net.state_dict())


@kinds
def test_functional_call(kind: Kind) -> None:
    """The tensors that are given are used and updated, the module's own are left alone."""
    layer, other = trained(kind), trained(kind)
    state = copy.deepcopy(layer.state_dict())
    tensors = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    for step in range(2):
        assert torch.equal(functional_call(layer, tensors, draw(2, step)), other(draw(2, step)))
    assert_same_state(layer.state_dict(), state)
    named = {name: tensors[name] for name in other.state_dict()}
    assert_same_state(named, other.state_dict())


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_functional_gradient(kind: Kind, training: bool) -> None:
    layer = trained(kind).train(training)
    x, upstream = draw(2), draw(2, 1)
    leaf = x.clone().requires_grad_()
    expected = reference(kind, layer, leaf)[0] if training else evaluated(kind, layer, leaf)
    (by_hand,) = torch.autograd.grad(expected, leaf, upstream)
    function = pure(layer, training)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    close(torch.func.grad(lambda inputs: (function(inputs, weight, bias) * upstream).sum())(x), by_hand)


def pure(layer: nn.Module, training: bool) -> Callable[..., Tensor]:
    """The layer as a function of its inputs and parameters, its buffers always those of now."""
    layer.train(training)
    buffers = {name: value.clone() for name, value in layer.named_buffers()}

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        state = {name: value.clone() for name, value in buffers.items()}
        return functional_call(layer, {**state, "weight": weight, "bias": bias}, x)

    return function


# r and d are constants to the gradient: differences see none of that where they are clipped.
CLIPPED = Kind("BatchRenorm", {"r_max": 1.01, "d_max": 0.001}, as_renorm)
# And MABN's backward is no derivative.
WITHOUT = ("BatchRenorm", "MovingAverageBatchNorm")
DIFFERENTIABLE = {**{name: kind for name, kind in KINDS.items() if kind.family not in WITHOUT}, "renorm": CLIPPED}


@parametrize_pairs(("kind", DIFFERENTIABLE), ("training", [True, False]), ("shape", [(5, 2), (4, 2, 3)]))
def test_first_and_second_derivatives(kind: Kind, training: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = kind.make(kind.dims[0], 2)
    if kind.dims[0] > 1:
        shape = (*shape, *(1 for _ in range(kind.dims[0] + 2 - len(shape))))
    if kind.whole is splitting:
        shape = (*shape[:3], 2)  # It needs two positions.
    for _ in range(2):
        layer(3 * torch.randn(6, *shape[1:], dtype=FLOAT64) + 1)
    x = (2 * torch.randn(shape, dtype=FLOAT64) - 1).requires_grad_()
    weight, bias = (torch.randn(2, dtype=FLOAT64).requires_grad_() for _ in range(2))
    function = pure(layer, training)
    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))
