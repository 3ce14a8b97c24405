"""Recurrent layers: their rows span every gradient, are as many as there are steps, and equal a loop over cells."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import wellcond
from wellcond.layouts import find_layers

WIDTH = 24  # more features than rows, so that rows of others would not span the gradient


def random_call(seed: int) -> tuple[nn.Module, tuple[Any, ...], int, int]:
    """Return a layer, the arguments of a call, and how many rows its input and its states have."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = rng.choice((nn.RNN, nn.LSTM, nn.GRU))
    options: dict[str, Any] = {
        "num_layers": rng.randint(1, 3),
        "bidirectional": rng.random() < 0.5,
        "batch_first": rng.random() < 0.5,
        "bias": rng.random() < 0.7,
    }
    if kind is nn.RNN:
        options["nonlinearity"] = rng.choice(("tanh", "relu"))
    if kind is nn.LSTM and rng.random() < 0.3:
        options["proj_size"] = WIDTH - 2
    layer = kind(WIDTH, WIDTH, **options).double()
    form = rng.choice(("batch", "batch", "single", "packed"))
    size = layer.proj_size or WIDTH
    count = layer.num_layers * (1 + layer.bidirectional)
    sequence: Any
    if form == "single":
        sequence, steps, batch = torch.randn(5, WIDTH).double(), 5, ()
    else:
        batch = (3,)
        sequence = torch.randn(3, 3, WIDTH).double()
        steps = 9
    if form == "packed":
        lengths = [2, 3, 1]
        sequence = pack_padded_sequence(sequence, torch.tensor(lengths), layer.batch_first, enforce_sorted=False)
        steps = sum(lengths)
    if rng.random() < 0.5:
        return layer, (sequence,), steps, size
    state: Any = torch.randn(count, *batch, size).double()
    if kind is nn.LSTM:
        state = (state, torch.randn(count, *batch, WIDTH).double())
    return layer, (sequence, state), steps, size


def summed(output: Any) -> Tensor:
    data = output[0] if isinstance(output[0], Tensor) else output[0].data
    return (data * torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).double()).sum()


@pytest.mark.parametrize("seed", range(60))
def test_rows_span_the_gradient_of_every_weight(seed: int) -> None:
    layer, args, steps, _ = random_call(seed)
    summed(layer(*args)).backward()
    for found in find_layers(layer):
        if found.name.startswith("weight_hr"):
            assert not found.layout.has_rows
            assert "projection" in found.layout.missing_rows
            continue
        inputs = found.inputs(args, {})
        assert inputs is not None
        rows = found.rows(*inputs)[0]
        assert rows.shape == (steps, found.weight.shape[1])
        gradient = found.weight.grad
        assert gradient is not None
        assert gradient.norm() > 0
        basis = torch.linalg.svd(rows, full_matrices=False)
        kept = basis.Vh[basis.S / basis.S[0] > 1e-12]
        off = gradient - gradient @ kept.T @ kept
        assert off.norm() < 1e-10 * gradient.norm(), found.name


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_rows_are_those_of_a_loop_over_cells(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4).double()
    cell = getattr(nn, f"{kind.__name__}Cell")(3, 4).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.randn(5, 2, 3).double()
    state: Any = None
    states, moments = [], [torch.zeros(3, 3).double(), torch.zeros(4, 4).double()]
    of_cell = {found.name: found for found in find_layers(cell)}
    for step in x:
        for total, name in zip(moments, ("weight_ih", "weight_hh"), strict=True):
            rows = of_cell[name].rows(*of_cell[name].inputs((step, state), {}))[0]
            total += rows.T @ rows
        hidden = torch.zeros(2, 4).double() if state is None else (state[0] if kind is nn.LSTM else state)
        states.append(hidden.detach())
        state = cell(step, state)
    for found in find_layers(layer):
        rows = found.rows(*found.inputs((), {"input": x}))[0]
        wanted = x.flatten(0, 1) if "ih" in found.name else torch.cat(states)
        torch.testing.assert_close(rows, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows.T @ rows, moments["hh" in found.name], rtol=1e-12, atol=1e-12)


def test_dropout_between_layers_is_that_of_the_call() -> None:
    """The rows of the second layer span its gradient only if the same elements were dropped."""
    torch.manual_seed(0)
    layer = nn.GRU(WIDTH, WIDTH, num_layers=2, dropout=0.5).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, layer, wellcond.FeatureWhitening(stats_every=1))
    summed(layer(torch.randn(4, 2, WIDTH).double())).backward()
    gradient = layer.weight_ih_l1.grad.clone()
    optimizer.step()
    values, vectors = handle.second_moments().eigh("weight_ih_l1")
    null = vectors[:, values < 1e-12 * values[-1]]
    assert null.shape[1] == WIDTH - 8
    assert (gradient @ null).norm() < 1e-10 * gradient.norm()


def test_parametrized_and_overridden_layers() -> None:
    layer = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    found = {found.name: found for found in find_layers(layer)}
    own = found["parametrizations.weight_hh_l0.original1"]
    x = torch.randn(5, 2, 3)
    rows = own.rows(*own.inputs((x,), {}))
    torch.testing.assert_close(rows.view(5, 2, 4)[1:], layer(x)[0][:-1])

    class Own(nn.LSTM):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    assert all("overrides the forward" in found.layout.missing_rows for found in find_layers(Own(3, 4)))
    assert not any(found.layout.has_rows for found in find_layers(Own(3, 4)))
