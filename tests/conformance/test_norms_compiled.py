"""Normalization layers compile, and can be exported."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from norm_kinds import KINDS, Kind, assert_same_state, close, draw, kinds, trained
from torch._dynamo.testing import CompileCounterWithBackend

COMPILED = (
    *("momentum", "momentum ghost", "ghost", "bsr", "bsr inexact", "renorm", "evalnorm", "population"),
    *(
        "cross-iteration",
        "cross-iteration ghost",
        "switchable",
        "switchable ghost",
        "sparse",
        "instance-batch",
        "batch-instance ghost",
        "kalman ghost",
        "decorrelated",
        "iternorm",
    ),
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name: str) -> None:
    """As a whole, once for each mode; values, gradients and statistics as without."""
    torch._dynamo.reset()
    # The partitioner of inductor, which recomputes in the backward what is cheap, without its code generation.
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    layer = trained(KINDS[name])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    graphs = []
    for step in range(3):
        x, again = draw(2, step).requires_grad_(), draw(2, step).requires_grad_()
        y = other(x)
        y.backward(draw(2, 9))
        output = compiled(again)
        output.backward(draw(2, 9))
        close(output, y, 1e-9)
        close(again.grad, x.grad, 1e-9)
        graphs.append(counter.frame_count)
    close([p.grad for p in layer.parameters()], [p.grad for p in other.parameters()], 1e-9)
    close(dict(layer.named_buffers()), dict(other.named_buffers()), 1e-9)
    layer.eval()
    other.eval()
    for step in range(2):
        close(compiled(draw(2, step)), other(draw(2, step)), 1e-9)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[2] < graphs[3] == graphs[4]


@pytest.mark.parametrize(
    ("name", "settings_of_a_schedule"),
    [
        ("momentum", [{"stat_momentum": value} for value in (0.625, 0.0, 0.25, 0.9, 1.0)]),
        ("renorm", [{"r_max": 1 + value, "d_max": value} for value in (0.5, 0.0, 0.25, 3.0)]),
    ],
)
def test_schedules_do_not_recompile(name: str, settings_of_a_schedule: list[dict[str, float]]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = trained(KINDS[name])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    graphs = []
    for step, attributes in enumerate(settings_of_a_schedule):
        for attribute, value in attributes.items():
            setattr(layer, attribute, value)
            setattr(other, attribute, value)
        close(compiled(draw(2, step)), other(draw(2, step)), 1e-9)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_compiles_by_inductor() -> None:
    torch._dynamo.reset()
    layer = trained(KINDS["momentum"])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    for step in range(3):
        x, again = draw(2, step).requires_grad_(), draw(2, step).requires_grad_()
        y, expected = compiled(x), other(again)
        y.backward(draw(2, 9))
        expected.backward(draw(2, 9))
        close(y, expected, 1e-9)
        close(x.grad, again.grad, 1e-9)
    close(dict(layer.named_buffers()), dict(other.named_buffers()), 1e-9)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_all_batch_sizes(name: str) -> None:
    """With the sizes left open from the second one on, unless the samples have to be grouped."""
    grouped = KINDS[name].group_size is not None  # and so each size is compiled, which takes a second
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    layer = trained(KINDS[name])
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    graphs = []
    for samples in (4, 7) if grouped else (4, 5, 7, 9):
        close(compiled(draw(2, samples=samples)), other(draw(2, samples=samples)), 1e-9)
        graphs.append(counter.frame_count)
    close(dict(layer.named_buffers()), dict(other.named_buffers()), 1e-9)
    if not grouped:
        assert graphs[1] == graphs[3]


@kinds
def test_exports(kind: Kind) -> None:
    layer = trained(kind, dtype=torch.float32, steps=0)
    layer(draw(2, dtype=torch.float32))
    layer.eval()
    state = copy.deepcopy(layer.state_dict())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (draw(2, dtype=torch.float32),), dynamic_shapes=({0: batch},))
    for samples in (1, 5, 8):
        x = draw(2, 3, samples=samples, dtype=torch.float32)
        close(program.module()(x), layer(x), 1e-5)
    assert_same_state(layer.state_dict(), state)


@pytest.mark.parametrize(
    "name", ["momentum", "ghost", "bsr", "renorm", "evalnorm", "population", "switchable", "sparse"]
)
def test_exports_to_onnx(name: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    layer = KINDS[name].make(2, dtype=torch.float32)
    layer(draw(2, dtype=torch.float32))
    layer.eval()
    x = draw(2, 3, dtype=torch.float32)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    (y,) = ReferenceEvaluator(program.model_proto).run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    close(torch.from_numpy(y), layer(x), 1e-4)
