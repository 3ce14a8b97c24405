"""A normalization layer's state can be saved, loaded, copied, cast and reset."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from norm_kinds import (
    FLOAT64,
    KINDS,
    TRACKING,
    Kind,
    assert_same_state,
    close,
    draw,
    groups,
    kinds,
    reference,
    trained,
    with_dimensions,
)

import wellcond.nn
from pairs import parametrize_pairs


@with_dimensions
def test_state_dict_round_trip(kind: Kind, dims: int) -> None:
    layer = trained(kind, dims)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = getattr(wellcond.nn, f"{kind.family}{dims}d")(3, **kind.options).to(FLOAT64)  # λ is state, r_max too
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(other.state_dict(), layer.state_dict())
    for step in range(2):
        assert torch.equal(other(draw(dims, step)), layer(draw(dims, step)))
    assert_same_state(other.state_dict(), layer.state_dict())
    assert torch.equal(other.eval()(draw(dims)), layer.eval()(draw(dims)))


@kinds
def test_loading_in_evaluation_mode(kind: Kind) -> None:
    layer, other = trained(kind), kind.make().eval()
    state = layer.state_dict()  # of a layer in training
    other.load_state_dict(state)
    assert torch.equal(other(draw(2)), layer.eval()(draw(2)))


@parametrize_pairs(("kind", KINDS), ("way", ["deep copy", "pickle", "save"]), ("training", [True, False]))
def test_copies_go_on_by_themselves(kind: Kind, way: str, training: bool) -> None:
    layer = trained(kind).train(training)
    if way == "deep copy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.training == training
    assert repr(other) == repr(layer)
    state = copy.deepcopy(layer.state_dict())
    x = draw(2)
    y = other.train()(x)
    assert_same_state(layer.state_dict(), state)
    assert torch.equal(layer.train()(x), y)
    assert_same_state(layer.state_dict(), other.state_dict())
    assert torch.equal(layer.eval()(x), other.eval()(x))


@with_dimensions
def test_evaluation_does_not_depend_on_the_batch(kind: Kind, dims: int) -> None:
    layer, x = trained(kind, dims).eval(), draw(dims)
    close(layer(x), torch.cat([layer(instance) for instance in x.split(1)]), 1e-12)


@kinds
def test_back_to_training(kind: Kind) -> None:
    layer, other = trained(kind), trained(kind)
    layer.eval()(draw(2))
    layer.train()
    for step in range(2):
        assert torch.equal(layer(draw(2, step)), other(draw(2, step)))
    assert torch.equal(layer.eval()(draw(2)), other.eval()(draw(2)))


@kinds
def test_training_without_gradients_counts(kind: Kind) -> None:
    layer, other, third = trained(kind), trained(kind), trained(kind)
    expected = layer(draw(2))
    with torch.no_grad():
        assert torch.equal(other(draw(2)), expected)
    with torch.inference_mode():
        assert torch.equal(third(draw(2)), expected)
    assert_same_state(other.state_dict(), layer.state_dict())
    assert_same_state(third.state_dict(), layer.state_dict())
    layer(draw(2, 1).requires_grad_()).sum().backward()  # after inference mode, too
    third(draw(2, 1).requires_grad_()).sum().backward()
    assert_same_state(third.state_dict(), layer.state_dict())


@kinds
def test_reset(kind: Kind) -> None:
    layer, fresh = trained(kind), kind.make()
    layer.reset_parameters()
    fresh.reset_parameters()
    assert_same_state(layer.state_dict(), fresh.state_dict())
    close(layer.weight, torch.ones(3))
    close(layer.bias, torch.zeros(3))
    close(layer.running_var, torch.ones(3))
    assert torch.equal(layer(draw(2)), fresh(draw(2)))
    assert torch.equal(layer.eval()(draw(2)), fresh.eval()(draw(2)))


@kinds
def test_reset_of_memory_that_was_not_initialized(kind: Kind) -> None:
    """A model may be made on the meta device, given memory, and then reset."""
    layer = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(7)
    layer.reset_parameters()
    fresh = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options)
    assert_same_state(layer.state_dict(), fresh.state_dict())
    x = draw(2, dtype=torch.float32)
    assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer.eval()(x), fresh.eval()(x))


@kinds
def test_dtype_of_the_parameters(kind: Kind) -> None:
    layer = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    wide_layer = getattr(wellcond.nn, f"{kind.family}2d")(3, **kind.options, dtype=FLOAT64)
    assert wide_layer.running_mean.dtype == wide_layer.running_var.dtype == FLOAT64


@kinds
def test_cast_there_and_back_rounds_no_statistics(kind: Kind) -> None:
    layer = kind.make(dtype=torch.float32)
    for step in range(3):
        layer(draw(2, step, dtype=torch.float32))
    state = {name: value.clone() for name, value in layer.named_buffers()}
    layer.half().bfloat16().float()
    assert_same_state(dict(layer.named_buffers()), state)


@kinds
def test_gradients_accumulate(kind: Kind) -> None:
    """Two passes, one after the other or both before the backward: each with the statistics that it had."""
    layer, other = trained(kind), trained(kind)
    x = [draw(2, step).requires_grad_() for step in range(3)]
    expected = [torch.zeros(3, dtype=FLOAT64), torch.zeros(3, dtype=FLOAT64)]
    by_hand = []
    for inputs in x:
        y, _ = reference(kind, layer, inputs)
        first, *rest = torch.autograd.grad(y, [inputs, layer.weight, layer.bias], draw(2, 7))
        by_hand.append(first)
        expected = [total + grad for total, grad in zip(expected, rest, strict=True)]
        layer(inputs).backward(draw(2, 7))
    close([inputs.grad for inputs in x], by_hand)
    close([layer.weight.grad, layer.bias.grad], expected)
    again = [inputs.detach().clone().requires_grad_() for inputs in x]
    outputs = [other(inputs) for inputs in again]
    for y in outputs:
        y.backward(draw(2, 7))
    close([inputs.grad for inputs in again], by_hand)
    close([other.weight.grad, other.bias.grad], expected)
    close(dict(other.named_buffers()), dict(layer.named_buffers()), 1e-14)


@pytest.mark.parametrize("kind", TRACKING.values(), ids=TRACKING)
def test_batch_norms_of_averaged_weights_are_updated(kind: Kind) -> None:
    """After weight averaging, torch's `update_bn` replaces running statistics by those of a pass over the data."""
    layer = trained(kind)
    momentum = layer.momentum
    data = [draw(2, step) for step in range(4)]
    torch.optim.swa_utils.update_bn(data, layer)
    chunks = [x[start:stop] for x in data for start, stop in groups(len(x), kind.group_size)]
    close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in chunks]).mean(0), 1e-6)
    close(layer.running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in chunks]).mean(0), 1e-6)
    assert layer.momentum == momentum
