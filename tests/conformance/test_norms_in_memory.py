"""Normalization layers take inputs and gradients however they lie in memory."""

from __future__ import annotations

import copy

import torch
from norm_kinds import (
    CHANNELS_LAST,
    FLOAT64,
    KINDS,
    POSITIONS,
    Kind,
    close,
    draw,
    evaluated,
    reference,
    trained,
    with_pairs,
)

from pairs import parametrize_pairs


@with_pairs(("training", [True, False]), ("dtype", [FLOAT64, torch.float32, torch.bfloat16]), only=(2, 3))
def test_channels_last_is_kept(kind: Kind, dims: int, training: bool, dtype: torch.dtype) -> None:
    memory_format = CHANNELS_LAST[dims]
    layer = kind.make(dims, dtype=FLOAT64 if dtype == FLOAT64 else torch.float32)
    x = draw(dims, dtype=dtype)
    other, twin = x.clone(), copy.deepcopy(layer)
    x = x.to(memory_format=memory_format)
    for tensor in (x, other):
        tensor.requires_grad_()
    y, expected = layer.train(training)(x), twin.train(training)(other)
    assert y.is_contiguous(memory_format=memory_format)
    assert expected.is_contiguous()
    upstream = draw(dims, 1, dtype=dtype)
    y.backward(upstream)  # whose format is another
    expected.backward(upstream.to(memory_format=memory_format))
    assert x.grad.is_contiguous(memory_format=memory_format)
    assert other.grad.is_contiguous()
    tolerance = {FLOAT64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    close(y, expected, tolerance)
    close(x.grad, other.grad, tolerance)
    close(layer.weight.grad, twin.weight.grad, 5 * tolerance)


@with_pairs(("training", [True, False]))
def test_memory_that_is_not_contiguous(kind: Kind, dims: int, training: bool) -> None:
    views = {
        "strided": torch.cat([draw(dims), draw(dims, 1)], -1)[..., ::2],
        "permuted": draw(dims).transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": draw(dims)[:, :, :1].expand(-1, -1, 3, *(-1 for _ in POSITIONS[dims][1:])),
        "one for all": draw(dims, samples=1).expand(4, *(-1 for _ in draw(dims).shape[1:])),
    }
    for name, x in views.items():
        layer = trained(kind, dims).train(training)
        twin = copy.deepcopy(layer)
        other = x.clone(memory_format=torch.contiguous_format).requires_grad_()
        x = x.detach().requires_grad_()
        assert not x.is_contiguous(), name
        y, expected = layer(x), twin(other)
        close(y, expected, 1e-11)
        upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
        y.backward(upstream)
        expected.backward(upstream)
        close(x.grad, other.grad, 1e-11)
        close(dict(layer.named_buffers()), dict(twin.named_buffers()), 1e-9)


@with_pairs(("training", [True, False]))
def test_expanded_incoming_gradient(kind: Kind, dims: int, training: bool) -> None:
    layer = trained(kind, dims).train(training)
    x = draw(dims).requires_grad_()
    expected = reference(kind, layer, x)[0] if training else evaluated(kind, layer, x)
    y = layer(x)
    tensors = [x, *layer.parameters()]
    close(torch.autograd.grad(y.sum(), tensors), torch.autograd.grad(expected.sum(), tensors))


@parametrize_pairs(("kind", KINDS), ("wanted", ["x", "weight", "bias"]), ("training", [True, False]))
def test_gradient_of_one_alone(kind: Kind, wanted: str, training: bool) -> None:
    layer = trained(kind).train(training)
    x = draw(2).requires_grad_(wanted == "x")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == wanted)
    expected = reference(kind, layer, x)[0] if training else evaluated(kind, layer, x)
    y = layer(x)
    tensor = x if wanted == "x" else getattr(layer, wanted)
    upstream = draw(2, 1)
    close(torch.autograd.grad(y, tensor, upstream), torch.autograd.grad(expected, tensor, upstream))
