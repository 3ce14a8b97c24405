"""Instance-Batch Normalization: some channels by instance, the others by batch; IBN-Net's layer."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from wellcond.nn.norm.instance_batch import InstanceBatchNorm2d

FLOAT64 = torch.float64
GOLDEN = Path(__file__).parents[2] / "golden"
ORDERS = ("instance_first", "batch_first")


def batch(step: int = 0, samples: int = 6, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    shift = torch.randn(samples, channels, 1, 1, generator=generator, dtype=FLOAT64)
    return 2 * torch.randn(samples, channels, 3, 4, generator=generator, dtype=FLOAT64) + 1 + shift


def made(channels: int = 5, fraction: float = 0.5, **options: Any) -> InstanceBatchNorm2d:
    layer = InstanceBatchNorm2d(channels, fraction, **options).double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(channels, generator=torch.Generator().manual_seed(number)) + 1)
    return layer


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def by_instance(layer: InstanceBatchNorm2d, channels: int, fraction: float) -> list[bool]:
    """Which channels, by the authors' rounding."""
    if layer.order == "instance_first":
        return [channel < int(channels * fraction) for channel in range(channels)]
    return [channel >= int(channels * (1 - fraction)) for channel in range(channels)]


def reference(
    layer: InstanceBatchNorm2d, x: Tensor, fraction: float, sizes: list[int], state: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output for one batch and the buffers after it, one value at a time; groups of samples by their sizes."""
    samples, channels = x.shape[:2]
    starts = [sum(sizes[:group]) for group in range(len(sizes))]
    means, variances = torch.zeros(channels, dtype=FLOAT64), torch.zeros(channels, dtype=FLOAT64)
    rows: list[list[Tensor]] = [[torch.empty(0)] * channels for _ in range(samples)]
    for channel, instance in enumerate(by_instance(layer, channels, fraction)):
        for start, size in zip(starts, sizes, strict=True):
            group = x[start : start + size, channel]
            mean = group.sum() / group.numel()
            var = ((group - mean) ** 2).sum() / group.numel()
            means[channel] += mean.detach() / len(sizes)
            variances[channel] += var.detach() * group.numel() / (group.numel() - 1) / len(sizes)
            for sample in range(start, start + size):
                own = x[sample, channel]
                if instance:
                    mean = own.sum() / own.numel()
                    var = ((own - mean) ** 2).sum() / own.numel()
                if not layer.training and not instance:
                    mean, var = state["running_mean"][channel], state["running_var"][channel]
                rows[sample][channel] = (own - mean) / (var + layer.eps) ** 0.5
                if layer.affine:
                    rows[sample][channel] = rows[sample][channel] * layer.weight[channel] + layer.bias[channel]
    y = torch.stack([torch.stack(row) for row in rows])
    if not layer.training:
        return y, state
    return y, {
        "running_mean": 0.9 * state["running_mean"] + 0.1 * means,
        "running_var": 0.9 * state["running_var"] + 0.1 * variances,
    }


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_buffer(name).clone() for name in ("running_mean", "running_var")}


SPLITS = [(5, 0.5, None), (7, 0.5, None), (8, 0.25, None), (4, 0.75, 2), (5, 0.4, 4), (3, 0.1, 2), (3, 1.0, None)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("channels", "fraction", "group_size"), SPLITS, ids=str)
def test_follows_the_formula(channels: int, fraction: float, group_size: int | None, order: str) -> None:
    sizes = {None: [6], 2: [2, 2, 2], 4: [6]}[group_size]
    layer = made(channels, fraction, order=order, group_size=group_size)
    for step in range(3):
        if step == 2:
            layer.eval()
        x, other = batch(step, channels=channels).requires_grad_(), batch(step, channels=channels).requires_grad_()
        expected, after = reference(layer, other, fraction, sizes, buffers(layer))
        y = layer(x)
        close(y, expected)
        close(buffers(layer), after)
        upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
        ours = torch.autograd.grad(y, [x, layer.weight, layer.bias], upstream)
        close(ours, torch.autograd.grad(expected, [other, layer.weight, layer.bias], upstream), 1e-10)
    assert int(layer.num_batches_tracked) == 2


def test_ghost_groups_of_unequal_size() -> None:
    layer = made(group_size=4)
    x = batch(samples=7)
    close(layer(x), reference(layer, x, 0.5, [4, 3], buffers(made()))[0])


@pytest.mark.parametrize(
    ("channels", "fraction", "first", "last"),
    [
        (7, 0.5, 3, 4),
        (8, 0.25, 2, 2),
        (64, 0.5, 32, 32),
        (64, 0.4, 25, 26),  # the authors' DenseNet: 38 by batch
        (1, 0.5, 0, 1),
        (5, 0.0, 0, 0),
        (5, 1.0, 5, 5),
        (5, 0, 0, 0),
        (5, 1, 5, 5),
    ],
)
def test_number_of_instance_channels(channels: int, fraction: float, first: int, last: int) -> None:
    counts = [InstanceBatchNorm2d(channels, fraction, order=order).instance_channels for order in ORDERS]
    assert counts == [first, last]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_by_instance_is_batch_norm(order: str, training: bool) -> None:
    layer, plain = made(fraction=0, order=order), nn.BatchNorm2d(5).double()
    plain.load_state_dict(layer.state_dict())
    for step in range(3):
        layer.train(training or step < 2)
        plain.train(layer.training)
        close(layer(batch(step)), plain(batch(step)))
    close(dict(layer.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_everything_by_instance_is_instance_norm(order: str, training: bool) -> None:
    layer = made(fraction=1, order=order).train(training)
    x, other = batch().requires_grad_(), batch().requires_grad_()
    expected = F.instance_norm(other, weight=layer.weight, bias=layer.bias, eps=layer.eps)
    close(layer(x), expected)
    close(torch.autograd.grad(layer(x).sin().sum(), x), torch.autograd.grad(expected.sin().sum(), other))
    # The running statistics are batch normalization's all the same: it can be converted back.
    plain = nn.BatchNorm2d(5).double()
    layer, x = made(fraction=1, order=order), batch()
    layer(x), plain(x)
    close(buffers(layer), buffers(plain))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("group_size", [None, 2])
def test_first_and_second_derivatives(training: bool, group_size: int | None) -> None:
    layer = made(3, 0.4, group_size=group_size, momentum=0.0).train(training)
    x = batch(samples=3, channels=3)[:, :, :2, :2].clone().requires_grad_()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, {"weight": weight, "bias": bias}, x)
        return output

    inputs = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


class TestGolden:
    """The authors' numbers (see tests/golden/README.md)."""

    def load(self) -> tuple[InstanceBatchNorm2d, dict[str, Tensor]]:
        arrays = np.load(GOLDEN / "ibn_a_half.npz")
        hyper = json.loads(str(arrays["hyper"]))
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "hyper"}
        layer = InstanceBatchNorm2d(hyper["planes"], hyper["ratio"]).double()
        state = {name.removeprefix("state0_"): value for name, value in golden.items() if name.startswith("state0_")}
        layer.load_state_dict(state)
        return layer, golden

    def check(self, layer: InstanceBatchNorm2d, golden: dict[str, Tensor], x: Tensor, kind: str, y: Tensor) -> None:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        output = layer(x)
        output.backward(golden["up"][: len(x)])
        close(output, y, 1e-12)
        close(x.grad, golden[f"{kind}_dx"], 1e-12)
        for name in ("weight", "bias"):
            expected = torch.cat([golden[f"{kind}_d_{part}.{name}"] for part in ("IN", "BN")])
            close(layer.get_parameter(name).grad, expected, 1e-12)

    def test_replayed(self) -> None:
        layer, golden = self.load()
        for step, x in enumerate(golden["x_train"]):
            if step == 0:
                close(golden["train0_y"], golden["train_y"][0], 0)
                self.check(layer, golden, x, "train0", golden["train_y"][0])
            else:
                close(layer(x), golden["train_y"][step], 1e-12)
            close(layer.running_mean[4:], golden["buf_BN.running_mean"][step], 1e-12)
            close(layer.running_var[4:], golden["buf_BN.running_var"][step], 1e-12)
            assert layer.num_batches_tracked == golden["buf_BN.num_batches_tracked"][step]
        layer.eval()
        self.check(layer, golden, golden["x_eval"], "eval", golden["eval_y"])


def theirs(instances: int, rest: int) -> dict[str, Tensor]:
    """A checkpoint as the authors' two layers save it."""
    parts = {"IN": nn.InstanceNorm2d(instances, affine=True), "BN": nn.BatchNorm2d(rest)}
    state = {f"{part}.{name}": value for part, layer in parts.items() for name, value in layer.state_dict().items()}
    return {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize(("order", "instances"), [("instance_first", 2), ("batch_first", 3)])
def test_loads_the_authors_checkpoint_within_a_network(order: str, instances: int) -> None:
    state = theirs(instances, 5 - instances)
    layer = InstanceBatchNorm2d(5, order=order)
    whole = {f"0.{name}": value for name, value in state.items()}
    given = dict(whole)
    nn.Sequential(layer).load_state_dict(whole)
    assert whole.keys() == given.keys()
    parts = ("IN", "BN") if order == "instance_first" else ("BN", "IN")
    for name in ("weight", "bias"):
        close(layer.get_parameter(name).detach(), torch.cat([state[f"{part}.{name}"] for part in parts]))
    for name, initial in (("running_mean", 0.0), ("running_var", 1.0)):
        values = {"IN": torch.full((instances,), initial), "BN": state[f"BN.{name}"]}
        close(layer.get_buffer(name), torch.cat([values[part] for part in parts]))


def test_loads_the_authors_checkpoint_of_an_old_torch() -> None:
    state = theirs(2, 3)
    del state["BN.num_batches_tracked"]
    layer = InstanceBatchNorm2d(5)
    layer.load_state_dict(state)
    assert int(layer.num_batches_tracked) == 0


def test_a_checkpoint_with_another_split_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"1\.\{IN,BN\}\.weight: .* has 3 instance- and 2 batch.* the layer 2 and 3"):
        nn.Sequential(nn.ReLU(), InstanceBatchNorm2d(5)).load_state_dict(
            {f"1.{name}": value for name, value in theirs(3, 2).items()}
        )
    incomplete = theirs(2, 3)
    del incomplete["IN.weight"]
    with pytest.raises(RuntimeError, match="has 0 instance- and 3 batch"):
        InstanceBatchNorm2d(5).load_state_dict(incomplete)


def test_state_dicts_of_batch_norm() -> None:
    plain, layer = nn.BatchNorm2d(5).double(), InstanceBatchNorm2d(5).double()
    plain(batch())
    layer.load_state_dict(plain.state_dict())
    close(dict(layer.state_dict()), dict(plain.state_dict()))
    layer(batch(1)), plain(batch(1))
    plain.load_state_dict(layer.state_dict())
    close(dict(layer.state_dict()), dict(plain.state_dict()))
    # The part of batch normalization evaluates as it did.
    close(layer.eval()(batch(2))[:, 2:], plain.eval()(batch(2))[:, 2:])


@pytest.mark.parametrize("training", [True, False])
def test_one_position_gives_the_bias_where_normalized_by_instance(training: bool) -> None:
    layer = made().train(training)
    y = layer(torch.randn(3, 5, 1, 1, dtype=FLOAT64))
    count = layer.instance_channels
    close(y[:, :count, 0, 0], layer.bias[:count].expand(3, -1))
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        layer.train()(torch.randn(1, 5, 1, 1, dtype=FLOAT64))


@pytest.mark.parametrize("training", [True, False])
def test_one_sample_and_none(training: bool) -> None:
    layer = made().train(training)
    x = batch(samples=1)
    close(layer(x), reference(layer, x, 0.5, [1], buffers(made()))[0])
    before = copy.deepcopy(layer.state_dict())
    empty = torch.empty(0, 5, 3, 3, dtype=FLOAT64)
    layer(empty).sum().backward()
    assert not layer.weight.grad.any()
    close(dict(layer.state_dict()), dict(before))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.bfloat16], ids=str)
def test_channels_last_is_kept(training: bool, dtype: torch.dtype) -> None:
    layer = made().train(training)
    tolerance = {FLOAT64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
    expected_of = batch().requires_grad_()
    expected = copy.deepcopy(layer)(expected_of)
    x = batch().to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    y = layer.to(dtype)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y.double(), expected, tolerance)
    up = torch.cos(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
    gradient = torch.autograd.grad(y, x, up.to(dtype))[0]
    close(gradient.double(), torch.autograd.grad(expected, expected_of, up)[0], tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [True, False], ids=["cast module", "float32 module"])
def test_half_precision(training: bool, dtype: torch.dtype, cast: bool) -> None:
    """Statistics are of float32: the output is off by its own rounding, and by that of γ and β."""
    layer = made().float()
    layer(batch().float())
    layer = (layer.to(dtype) if cast else layer).train(training)
    exact = copy.deepcopy(layer).double()
    x = batch(1).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=step, atol=step)
    close(layer.running_mean.double(), exact.running_mean, 1e-5)
    close(layer.running_var.double(), exact.running_var, 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    layer = made().float().train(training)
    exact = copy.deepcopy(layer)
    x = batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, low = layer(x), layer(x.bfloat16())
    assert y.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    close(y, exact(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_mean_far_from_zero(dtype: torch.dtype) -> None:
    layer = made(affine=False).to(dtype)
    x = batch() + 1000
    y = layer(x.to(dtype))
    close(y.double(), reference(layer, x.to(dtype).double(), 0.5, [6], buffers(made()))[0], 1e-3)


def test_evaluation_does_not_depend_on_the_batch() -> None:
    layer = made()
    layer(batch())
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    together = layer(batch(1))
    close(together, torch.cat([layer(sample) for sample in batch(1).split(1)]))
    assert torch.equal(together, layer(batch(1)))
    close(dict(layer.state_dict()), dict(before), 0)


def test_without_affine_or_running_statistics() -> None:
    layer = made(affine=False)
    close(layer(batch()), reference(layer, batch(), 0.5, [6], buffers(made()))[0])
    layer = made(track_running_stats=False)
    training = layer(batch())
    assert set(layer.state_dict()) == {"weight", "bias"}
    close(layer.eval()(batch()), training)


def test_momentum_none_averages_all_batches() -> None:
    layer, plain = made(momentum=None), nn.BatchNorm2d(5, momentum=None).double()
    for step in range(3):
        layer(batch(step)), plain(batch(step))
    close(buffers(layer), buffers(plain))


@pytest.mark.parametrize("way", ["deep copy", "pickle", "state dict"])
def test_copies(way: str) -> None:
    layer = made(7, 0.3, order="batch_first", group_size=2)
    layer(batch(channels=7))
    if way == "deep copy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = InstanceBatchNorm2d(7, 0.3, order="batch_first", group_size=2).double()
        other.load_state_dict(torch.load(file))
    x = batch(1, channels=7)
    close(other(x), layer(x), 0)
    close(other.eval()(x), layer.eval()(x), 0)
    assert repr(other) == repr(layer)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    layer = made()
    other = copy.deepcopy(layer)
    x, y = batch().requires_grad_(), batch().requires_grad_()
    layer(x).sin().sum().backward()
    checkpoint(other, y, use_reentrant=use_reentrant).sin().sum().backward()
    close(y.grad, x.grad, 0)
    close(dict(other.state_dict()), dict(layer.state_dict()), 0)


def test_compiles() -> None:
    torch._dynamo.reset()
    layer = made(group_size=4)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for step in range(3):
        if step == 2:
            layer.eval(), other.eval()
        x, y = batch(step).requires_grad_(), batch(step).requires_grad_()
        expected, actual = layer(x), compiled(y)
        close(actual, expected)
        close(torch.autograd.grad(actual.sin().sum(), y), torch.autograd.grad(expected.sin().sum(), x))
    close(dict(other.state_dict()), dict(layer.state_dict()))


def test_is_a_leaf_of_symbolic_traces() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(made(), nn.ReLU()))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


def test_repr() -> None:
    assert repr(InstanceBatchNorm2d(8, 0.25, order="batch_first", group_size=4)) == (
        "InstanceBatchNorm2d(8, instance_fraction=0.25, eps=1e-05, momentum=0.1, affine=True, group_size=4, "
        "order=batch_first)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_fraction": 1.1}, r"instance_fraction must lie in \[0, 1\], got 1\.1"),
        ({"instance_fraction": -0.1}, r"instance_fraction must lie in \[0, 1\], got -0\.1"),
        ({"instance_fraction": float("nan")}, r"instance_fraction must lie in \[0, 1\], got nan"),
        ({"instance_fraction": "half"}, r"instance_fraction must lie in \[0, 1\], got 'half'"),
        ({"instance_fraction": True}, r"instance_fraction must lie in \[0, 1\], got True"),
        ({"order": "bn_first"}, "order must be 'instance_first' or 'batch_first', got 'bn_first'"),
        ({"group_size": 0}, "group_size must be a positive integer, got 0"),
        ({"momentum": 2}, "momentum must lie in"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstanceBatchNorm2d(8, **options)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (5, 3, 3), (2, 4, 3, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected (4D|5 channels)"):
        InstanceBatchNorm2d(5)(torch.randn(shape))
