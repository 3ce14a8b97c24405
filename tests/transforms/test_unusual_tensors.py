"""Inputs and weights that are no plain arrays: taken in where their rows are plain, else plain gradients, named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization, WellcondWarning


def attached(model: nn.Module, **options: object) -> tuple[torch.optim.Optimizer, wellcond.transforms.Attachment]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    choice = {"stats_every": 1, "stats_decay": 0.0, "second_moment": "dense", "norm_layers": True} | options
    return optimizer, wellcond.attach(optimizer, model, FeatureWhitening(**choice))


def second_moment(handle: wellcond.transforms.Attachment) -> Tensor:
    return handle._slots["whitening"][0].state["second_moment"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("kind", ["linear", "layer_norm", "own"])
def test_nested_inputs_count_row_by_row(layout: torch.layout, kind: str) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2)

    torch.manual_seed(0)
    make: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(4, 3, bias=False),
        "layer_norm": lambda: nn.LayerNorm(4),
        "own": lambda: Own(4, 3, bias=False),
    }
    layer = make[kind]()
    parts = [torch.randn(3, 4), torch.randn(5, 4)]
    optimizer, handle = attached(layer)
    output = layer(torch.nested.nested_tensor(parts, layout=layout))
    torch.stack([part.square().sum() for part in output.unbind()]).sum().backward()
    optimizer.step()
    x = torch.cat(parts)
    rows = {"linear": x, "layer_norm": F.layer_norm(x, (4,)), "own": 2 * x}[kind]
    expected = rows.T @ rows / 8
    found = second_moment(handle)
    if kind == "layer_norm":
        torch.testing.assert_close(found[:, 0, 0], expected.diagonal(), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def test_nested_tokens_are_counted() -> None:
    table = nn.Embedding(6, 3)
    parts = [torch.tensor([0, 1, 1]), torch.tensor([5])]
    optimizer, handle = attached(table)
    output = table(torch.nested.nested_tensor(parts, layout=torch.jagged))
    output.values().square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(second_moment(handle)[0], torch.tensor([0.25, 0.5, 0, 0, 0, 0.25]))


def test_sparse_inputs_keep_plain_gradients() -> None:
    layer = nn.Linear(4, 3, bias=False)
    optimizer, handle = attached(layer)
    layer(torch.eye(4).to_sparse()).square().sum().backward()
    plain = layer.weight.grad.clone()
    with pytest.warns(WellcondWarning, match="its input is a sparse tensor"):
        optimizer.step()
    assert torch.equal(layer.weight.grad, plain)
    assert "its input is a sparse tensor" in handle.report()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.eye(4)).sum().backward()
        optimizer.step()  # said once; from now on it is left out


@pytest.mark.parametrize("transform", [FeatureWhitening, FeatureDescent])
def test_complex_weights_keep_plain_gradients(transform: Callable[..., wellcond.transforms.GradientTransform]) -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(WellcondWarning, match="its weight is complex"):
        handle = wellcond.attach(optimizer, model, transform())
    assert handle.report().count("plain gradient: its weight is complex (torch.complex64)") == 2
    model(torch.randn(5, 3, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()


def test_complex_gradients_are_centred() -> None:
    layer = nn.Linear(3, 4, dtype=torch.complex64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wellcond.attach(optimizer, layer, GradientCentralization())
    layer(torch.randn(5, 3, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    assert float(layer.weight.grad.mean(1).abs().max()) < 1e-6


def unfit_weights() -> dict[str, tuple[Tensor, str]]:
    return {
        "integers": (torch.zeros(3, 4, dtype=torch.int8), "dtype torch.int8"),
        "float8": (torch.zeros(3, 4).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
        "sparse": (torch.eye(3, 4).to_sparse(), "a sparse tensor"),
        "sparse rows": (torch.eye(3, 4).to_sparse_csr(), "a sparse tensor"),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", list(unfit_weights()))
@pytest.mark.parametrize("transform", [FeatureWhitening, GradientCentralization])
def test_weights_without_plain_numbers_are_named(name: str, transform: Callable[..., object]) -> None:
    weight, reason = unfit_weights()[name]
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, transform())
    rows = handle.coverage()[handle.transforms[0].name]
    assert reason in rows[0].how
    assert rows[0].state_bytes is None


def test_tables_with_sparse_gradients_are_known_when_attaching() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(
        optimizer, model, GradientCentralization(layers=lambda name, module: True), FeatureWhitening()
    )
    for rows in handle.coverage().values():
        assert "sparse gradients (sparse=True)" in rows[0].how
    model(torch.randint(0, 5, (3,))).sum().backward()
    optimizer.step()


def test_a_module_of_another_meaning_of_sparse_is_covered() -> None:
    class Own(nn.Linear):
        sparse = True

    optimizer = torch.optim.SGD((layer := Own(4, 3)).parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, layer, FeatureWhitening())
    assert "preconditioned" in handle.report()


def test_inputs_without_values_say_nothing() -> None:
    model = nn.Linear(4, 3, device="meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, FeatureWhitening())
    model(torch.zeros(5, 4, device="meta"))
    assert "preconditioned" in handle.report()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, and a mesh of it: what is sharded is known by its placement."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_tensor_parallel_weights_and_inputs_are_taken_in_or_named() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wellcond.attach(
        optimizer,
        model,
        GradientCentralization(),
        FeatureWhitening(stats_every=1, stats_decay=0.0, second_moment="dense"),
    )
    centred, whitened = handle.coverage().values()
    assert "gradient centred" in centred[0].how
    assert "sharded across ranks" in centred[1].how
    assert "preconditioned" in whitened[0].how
    assert "sharded otherwise than along its first axis" in whitened[1].how
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(second_moment(handle)[0], x.T @ x / 5)


@pytest.mark.usefixtures("one_rank")
def test_inputs_that_are_sharded_along_their_features_are_named() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (1,))
    for placement, known in ((Replicate(), True), (Shard(0), True), (Shard(1), False)):
        layer = nn.Linear(4, 3, bias=False)
        layer.weight = nn.Parameter(DTensor.from_local(layer.weight.detach(), mesh, [Replicate()]))
        optimizer, _ = attached(layer)
        layer(DTensor.from_local(torch.randn(5, 4), mesh, [placement])).square().sum().backward()
        if known:
            optimizer.step()
            continue
        with pytest.warns(WellcondWarning, match="its input is sharded over ranks otherwise than by whole rows"):
            optimizer.step()
