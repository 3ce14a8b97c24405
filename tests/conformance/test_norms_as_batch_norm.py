"""Each normalization layer is a torch batch norm: its options, its state, its rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from norm_formulas import momentum_factor, running, torch_factor
from norm_kinds import (
    BATCH_NORMS,
    FLOAT64,
    KINDS,
    PLAIN,
    WITH_MOMENTUM,
    Kind,
    assert_same_state,
    check_evaluation,
    check_training,
    close,
    draw,
    evaluated,
    gradients,
    groups,
    kinds,
    reference,
    trained,
    with_dimensions,
    with_pairs,
)
from torch import nn


@with_pairs(("momentum", [0.1, 0.7]), ("affine", [True, False]), of={name: KINDS[name] for name in BATCH_NORMS})
def test_trains_as_batch_norm(kind: Kind, dims: int, momentum: float, affine: bool) -> None:
    layer = kind.make(dims, affine=affine)
    plain = PLAIN[dims](3, momentum=momentum, affine=affine).to(FLOAT64)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in plain.state_dict()})
    if kind.factor is torch_factor:
        layer.momentum = momentum
    else:
        plain.momentum = momentum_factor(layer, {}, 5)
    for step in range(4):
        x, other = draw(dims, step).requires_grad_(), draw(dims, step).requires_grad_()
        y, expected = layer(x), plain(other)
        close(y, expected, 1e-12)
        y.square().sum().backward()
        expected.square().sum().backward()
        close(x.grad, other.grad, 1e-12)
    for name, value in plain.state_dict().items():
        close(layer.state_dict()[name], value, 1e-12)
    for parameter, other in zip(layer.parameters(), plain.parameters(), strict=True):
        close(parameter.grad, other.grad, 1e-11)


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_momentum_none_averages_all_batches(name: str) -> None:
    kind = KINDS[name]
    layer = kind.make(2, momentum=None)
    means, variances = [], []
    for step in range(4):
        x = draw(2, step)
        for start, stop in groups(len(x), kind.group_size):
            means.append(x[start:stop].mean((0, 2, 3)))
            variances.append(x[start:stop].transpose(0, 1).flatten(1).var(1))
        check_training(kind, layer, x)
    close(layer.running_mean, torch.stack(means).mean(0))
    close(layer.running_var, torch.stack(variances).mean(0))


@with_pairs(("counted", {"with the counter": True, "of an old torch": False}))
def test_loads_a_plain_state_dict(kind: Kind, dims: int, counted: bool) -> None:
    plain = PLAIN[dims](3).to(FLOAT64)
    for step in range(3):
        plain(draw(dims, step))
    state = plain.state_dict()
    if not counted:
        state = {name: value for name, value in state.items() if name != "num_batches_tracked"}
    layer = trained(kind, dims).eval()  # what it had must go
    assert layer.load_state_dict(state, strict=True) == ([], [])
    fresh = kind.make(dims)
    fresh.load_state_dict(state)
    if kind.whole is None:
        close(layer(draw(dims, 9)), plain.eval()(draw(dims, 9)), 1e-12)
        close(fresh.eval()(draw(dims, 9)), plain(draw(dims, 9)), 1e-12)
    else:
        check_evaluation(kind, layer, draw(dims, 9))
        close(fresh.eval()(draw(dims, 9)), layer(draw(dims, 9)), 1e-12)
    for name, value in plain.state_dict().items():
        close(layer.state_dict()[name], value, 1e-12)


@with_dimensions
def test_state_loads_into_a_plain_one(kind: Kind, dims: int) -> None:
    layer, plain = trained(kind, dims), PLAIN[dims](3).to(FLOAT64)
    missing, _ = plain.load_state_dict(layer.state_dict(), strict=False)
    assert not missing
    x = draw(dims, 9)
    mean, var = layer.running_mean, layer.running_var
    close(plain.eval()(x), nn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps), 1e-12)
    if kind.estimates is running and kind.whole is None:
        close(layer.eval()(x), plain(x), 1e-12)


@kinds
def test_is_a_batch_norm(kind: Kind) -> None:
    for dims in kind.dims:
        assert isinstance(kind.make(dims), PLAIN[dims])


@with_pairs(
    ("training", [True, False]),
    ("dtype", [torch.bfloat16, torch.float16]),
    ("cast", {"float32 module": False, "cast module": True}),
)
def test_half_precision(kind: Kind, dims: int, training: bool, dtype: torch.dtype, cast: bool) -> None:
    """Inputs are rounded, statistics are not."""
    layer = kind.make(dims, dtype=torch.float32)
    for step in range(2):
        layer(draw(dims, 50 + step).float())
    if cast:
        state = {name: value.clone() for name, value in layer.named_buffers()}
        layer.to(dtype)
        assert_same_state(dict(layer.named_buffers()), state)
        assert all(parameter.dtype == dtype for parameter in layer.parameters())
    layer.train(training)
    x = draw(dims, 1, dtype=dtype).requires_grad_()
    if training:
        expected, after = reference(kind, layer, x)
        y = layer(x)
        for name, value in after.items():
            close(getattr(layer, name).double(), value, 1e-5)
    else:
        expected, y = evaluated(kind, layer, x), layer(x)
    assert y.dtype == nn.functional.batch_norm(x, *([torch.ones(3)] * 4)).dtype == dtype
    unit = torch.finfo(dtype).eps
    close(y.double(), expected, 2 * unit)
    upstream = draw(dims, 2, dtype=dtype)
    tensors = [x, *layer.parameters()]
    raw = torch.autograd.grad(y, tensors, upstream)
    assert [grad.dtype for grad in raw] == [tensor.dtype for tensor in tensors]
    for grad, exact in zip(raw, gradients(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=4 * unit, atol=4 * unit * float(exact.abs().max()))


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_autocast(kind: Kind, training: bool) -> None:
    """Under autocast a layer is fed the previous one's half precision; a float32 input stays one."""
    layer, plain = trained(kind, dtype=torch.float32, steps=0).train(training), nn.BatchNorm2d(3).train(training)
    convolution = nn.Conv2d(3, 3, 1)
    x = draw(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = convolution(x)
        assert layer(hidden).dtype == plain(hidden).dtype == torch.bfloat16
        twin = copy.deepcopy(layer)
        expected = reference(kind, twin, x)[0] if training else evaluated(kind, twin, x)
        y = layer(x)
    assert y.dtype == torch.float32
    close(y.double(), expected, 1e-4)
    assert all(buffer.dtype in (torch.float32, FLOAT64, torch.int64) for buffer in layer.buffers())
