"""Kinds of tensors: of inputs, weights and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from by_hand import ByHand, assert_equal, batch, loss_of, net, plain_step, whitened, whitening
from cells import attach, cell, reason_of
from cells_layers import as_rows, gradients, numbers, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import wellcond

AREA = "Kinds of tensors"
FORMULA = "the gradient against the formula"
PLAIN = "the gradient, bit for bit as without transforms, with the reason in the report"


def whitened_or_told(layer: nn.Module, forward: Callable[[], Tensor], rows: Tensor) -> str | None:
    """Train a linear layer without a bias on inputs of some kind: the formula holds, or the user is told why not."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", wellcond.WellcondWarning)
        handle = attach(optimizer, layer, whitening())
        for _ in range(2):
            layer.zero_grad()
            forward().backward()
            before = gradients(layer)
            optimizer.step()
    after = gradients(layer)
    if not torch.equal(before["weight"], after["weight"]):
        assert_equal([after["weight"]], [whitened(before["weight"][None], rows[None])[0]], 1e-6, "gradient")
        return None
    row = handle.coverage()["whitening"][0]
    if row.state_bytes is None:
        return row.how
    told = [str(w.message) for w in record if issubclass(w.category, wellcond.WellcondWarning)]
    assert told, f"the gradient stays plain, but the report says '{row.how}' and nothing warns"
    return told[0]


def nested(layout: torch.layout) -> str | None:
    """Give a linear layer a ragged batch."""
    parts = [numbers((3, 4)), numbers((5, 4), 1)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    layer = nn.Linear(4, 3, bias=False).double()
    return whitened_or_told(layer, lambda: sum(loss_of(part) for part in layer(x).unbind()), torch.cat(parts))


for name, layout in (("jagged", torch.jagged), ("strided", torch.strided)):
    cell(AREA, f"nested inputs ({name})", verified=FORMULA)(lambda layout=layout: nested(layout))


@cell(AREA, "sparse (COO) inputs", "plain gradient", verified=PLAIN)
def sparse_inputs() -> str | None:
    x = numbers((6, 4))
    x[x < 0.4] = 0.0
    layer = nn.Linear(4, 3, bias=False).double()
    return whitened_or_told(layer, lambda: loss_of(layer(x.to_sparse())), x)


cell(AREA, "sparse gradients (Embedding(sparse=True))", "plain gradient", verified="the gradient, bit for bit")(
    lambda: sparse_gradient()
)


def sparse_gradient() -> str:
    """Train a table with sparse gradients beside a linear layer."""
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(optimizer, model, whitening())
    loss_of(model(torch.tensor([0, 1, 1, 4]))).backward()
    before = model[0].weight.grad.to_dense().clone()
    optimizer.step()
    assert torch.equal(model[0].weight.grad.to_dense(), before)
    return reason_of(handle, "0.weight")


@cell(
    AREA,
    "complex weights",
    "plain gradient",
    verified=PLAIN,
)
def complex_weights() -> str:
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex128))
    x = torch.complex(numbers((6, 4)), numbers((6, 4), 1))

    def run(attached: bool) -> tuple[Any, dict[str, Tensor]]:
        handle = None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if attached:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*covers none", wellcond.WellcondWarning)
                handle = attach(optimizer, model, whitening())
        model.zero_grad()
        model(x).abs().square().sum().backward()
        optimizer.step()
        return handle, gradients(model)

    (_, before), (handle, after) = run(False), run(True)
    assert torch.equal(before["0.weight"], after["0.weight"])
    return reason_of(handle, "0.weight")


def low_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Train in a low precision: near the formula in float64, with statistics in float32."""
    model, other = net(), net()
    model = model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(optimizer, model, whitening())
    hand = ByHand(other)
    x = batch(0)
    loss_of(model(x.to(dtype)).double()).backward()
    loss_of(other(x)).backward()
    optimizer.step()
    hand.change_gradients()
    assert_equal(
        [p.grad.double() for p in model.parameters()], [p.grad for p in other.parameters()], tolerance, str(dtype)
    )
    moment = optimizer.state[model[0].weight]["wellcond_whitening_mass"]
    assert moment.dtype == torch.float32, f"statistics are {moment.dtype}"


cell(AREA, "float16 weights", verified="the gradient against the formula in float64, to 2 %; statistics in float32")(
    lambda: low_precision(torch.float16, 0.02)
)
cell(AREA, "bfloat16 weights", verified="the gradient against the formula in float64, to 10 %; statistics in float32")(
    lambda: low_precision(torch.bfloat16, 0.1)
)


@cell(AREA, "autocast to bfloat16", verified="the gradient against the formula in float64, to 10 %")
def autocast() -> None:
    model, other = net(dtype=torch.float32), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(optimizer, model, whitening())
    hand = ByHand(other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch(0).float())
    loss_of(output.double()).backward()
    loss_of(other(batch(0))).backward()
    optimizer.step()
    hand.change_gradients()
    assert_equal([p.grad.double() for p in model.parameters()], [p.grad for p in other.parameters()], 0.1, "autocast")


class Frozen(nn.Module):
    """A linear layer whose weight is kept in another type, beside one that trains."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.frozen = nn.Parameter(weight, requires_grad=False)
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        base = self.frozen.dequantize() if self.frozen.is_quantized else self.frozen.to(torch.float64)
        return self.head(x @ base.double().T)


def beside_frozen(weight: Tensor) -> None:
    """Train a head behind frozen weights of another type, all of them held by the optimizer."""
    model = Frozen(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(optimizer, model, whitening())
    x = batch(0)
    loss_of(model(x)).backward()
    before = torch.cat([model.head.weight.grad, model.head.bias.grad[:, None]], dim=1)
    optimizer.step()
    with torch.no_grad():
        rows = x @ (weight.dequantize() if weight.is_quantized else weight).double().T
    changed = whitened(before[None], torch.cat([rows, rows.new_ones(8, 1)], dim=1)[None])[0]
    assert_equal([model.head.weight.grad], [changed[:, :-1]], 1e-7, "the head")


BESIDE = "the gradient of the layer behind them against the formula"
cell(AREA, "frozen float8 weights", verified=BESIDE)(
    lambda: beside_frozen(numbers((4, 4)).float().to(torch.float8_e4m3fn))
)
cell(AREA, "frozen quantized weights (qint8)", verified=BESIDE)(
    lambda: beside_frozen(torch.quantize_per_tensor(numbers((4, 4)).float(), 0.05, 0, torch.qint8))
)


@cell(AREA, "fake tensors", verified="a pass under FakeTensorMode raises nothing, and leaves training as without it")
def fake() -> None:
    results = []
    for faked in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attach(optimizer, model, whitening())
        if faked:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                model(mode.from_tensor(batch(9)))
        for index in range(2):
            plain_step(model, optimizer, index, lambda: None)
        results.append(list(model.parameters()))
    assert_equal(*results, 0.0, "after a fake pass")


@cell(
    AREA,
    "inputs on the meta device",
    verified="a pass of a meta copy raises nothing, and leaves training as without it",
)
def meta_pass() -> None:
    results = []
    for passed in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        attach(optimizer, model, whitening())
        if passed:
            weights = {name: p.detach().to("meta").requires_grad_() for name, p in model.named_parameters()}
            torch.func.functional_call(model, weights, (batch(9).to("meta"),))
        for index in range(2):
            plain_step(model, optimizer, index, lambda: None)
        results.append(list(model.parameters()))
    assert_equal(*results, 0.0, "after a meta pass")


@cell(AREA, "channels_last memory", verified="the gradient against the same in contiguous memory")
def channels_last() -> None:
    found = []
    for memory in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3).double().to(memory_format=memory)
        found.append(step(layer, numbers((2, 3, 5, 5)).contiguous(memory_format=memory))[2])
    assert_equal(found[0].values(), found[1].values(), 1e-9, "channels_last")


@cell(AREA, "a batch of no elements", verified="nothing is raised, and the next step is as the first")
def empty() -> None:
    model, other = net(), net()
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.0)
        attach(optimizer, each, whitening())
        for x in (batch(0)[:0], batch(0)) if each is model else (batch(0),):
            optimizer.zero_grad()
            loss_of(each(x)).backward()
            optimizer.step()
    assert_equal(
        [p.grad for p in model.parameters()], [p.grad for p in other.parameters()], 1e-12, "after an empty batch"
    )


@cell(
    AREA,
    "inputs that are not finite",
    verified="the update of M is skipped and counted, and the next step is as the first",
)
def not_finite() -> None:
    model, other = net(), net()
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.0)
        handle = attach(optimizer, each, whitening())
        for bad in (True, False) if each is model else (False,):
            optimizer.zero_grad()
            loss_of(each(batch(0) / (0.0 if bad else 1.0))).backward()
            if bad:
                for parameter in each.parameters():
                    parameter.grad.zero_()
            optimizer.step()
        assert (handle.stats()["whitening"]["skipped_updates"] > 0) == (each is model)
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in other.parameters()], 1e-9, "after infinities")


@cell(AREA, "a weight that is a view with strides", verified="the gradient against the formula")
def strided() -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    layer.weight = nn.Parameter(numbers((4, 3)).T)
    x = numbers((6, 4), 1)
    _, before, after = step(layer, x)
    assert_equal([after["weight"]], [whitened(as_rows(before["weight"]), x[None])[0]], 1e-7, "gradient")
