"""Switchable Normalization: the authors' numbers and checkpoints, its corners, its batch average."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond import calibrate
from wellcond.nn import (
    SparseSwitchableNorm2d,
    SwitchableNorm1d,
    SwitchableNorm2d,
    SwitchableNorm3d,
    convert_norm,
    switch_logits,
)

FLOAT64 = torch.float64
GOLDEN = Path(__file__).parents[2] / "golden"
ALL = ("in", "ln", "bn")


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def batch(step: int = 0, samples: int = 5, channels: int = 3, positions: tuple[int, ...] = (4, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    shift = torch.randn(samples, channels, *(1 for _ in positions), generator=generator, dtype=FLOAT64)
    return 1.5 * torch.randn(samples, channels, *positions, generator=generator, dtype=FLOAT64) + shift + 1


def made(kind: type[nn.Module] = SwitchableNorm2d, channels: int = 3, **options: Any) -> Any:
    layer = kind(channels, **options).double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) + 1)
    return layer


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def training_formula(layer: Any, x: Tensor, groups: list[list[int]] | None = None) -> Tensor:
    """The output, one channel of one instance at a time; `groups` lists the samples of each."""
    shares = softmax(layer.mean_logits)
    var_shares = shares if layer.var_logits is None else softmax(layer.var_logits)
    groups = [list(range(len(x)))] if groups is None else groups
    rows = []
    for n in range(len(x)):
        own = next(group for group in groups if n in group)
        row = []
        for c in range(x.shape[1]):
            sets = {"in": x[n, c], "ln": x[n], "bn": x[own, c]}
            mean, var = 0.0, 0.0
            for z, name in enumerate(layer.normalizers):
                values = sets[name]
                centre = values.sum() / values.numel()
                mean = mean + shares[z] * centre
                var = var + var_shares[z] * ((values - centre) ** 2).sum() / values.numel()
            row.append((x[n, c] - mean) / (var + layer.eps) ** 0.5 * layer.weight[c] + layer.bias[c])
        rows.append(torch.stack(row))
    return torch.stack(rows)


# the authors' numbers -----------------------------------------------------------------------------------------------


class Golden:
    """A file of the authors' numbers as tensors."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(GOLDEN / f"{name}.npz")
        self.hyper: dict[str, Any] = json.loads(str(self._arrays["hyper"]))
        self.keys = set(self._arrays.files)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self._arrays[key])

    def state(self) -> dict[str, Tensor]:
        return {key.removeprefix("state0_"): self[key] for key in sorted(self.keys) if key.startswith("state0_")}


OURS = {"mean_weight": "mean_logits", "var_weight": "var_logits", "weight": "weight", "bias": "bias"}


def test_the_authors_numbers() -> None:
    golden = Golden("sn2d_ma")
    hyper, unused = golden.hyper, set(golden.keys) - {"hyper"}

    def take(key: str) -> Tensor:
        unused.discard(key)
        return golden[key]

    layer = SwitchableNorm2d(hyper["num_features"], hyper["eps"], 1 - hyper["momentum"], unbiased=True).double()
    layer.load_state_dict({key: take(f"state0_{key}") for key in golden.state()})
    up = take("up")
    for step, data in enumerate(take("x_train")):
        x = data.clone().requires_grad_(step == 0)
        y = layer(x)
        close(y.detach(), take("train_y")[step])
        for name in ("running_mean", "running_var"):
            close(layer.get_buffer(name), take(f"buf_{name}")[step].flatten())
        if step == 0:
            close(y.detach(), take("train0_y"))
            y.backward(up)
            close(x.grad, take("train0_dx"))
            for theirs, ours in OURS.items():
                close(layer.get_parameter(ours).grad, take(f"train0_d_{theirs}").flatten())
            layer.zero_grad()
    layer.eval()
    x = take("x_eval").clone().requires_grad_()
    y = layer(x)
    close(y.detach(), take("eval_y"))
    y.backward(up[: len(x)])
    close(x.grad, take("eval_dx"))
    for theirs, ours in OURS.items():
        close(layer.get_parameter(ours).grad, take(f"eval_d_{theirs}").flatten())
    assert unused == set()


# checkpoints --------------------------------------------------------------------------------------------------------


def authors_state(channels: int, normalizers: int = 3, ones: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A layer's state as the authors' code saves it: γ, β of [1, C, 1, …], statistics of [1, C, 1]."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "weight": torch.randn(1, channels, *(1,) * ones, generator=generator),
        "bias": torch.randn(1, channels, *(1,) * ones, generator=generator),
        "mean_weight": torch.randn(normalizers, generator=generator),
        "var_weight": torch.randn(normalizers, generator=generator),
    }
    if normalizers == 3:
        state["running_mean"] = torch.randn(1, channels, 1, generator=generator)
        state["running_var"] = torch.rand(1, channels, 1, generator=generator)
    return state


def check_taken(layer: Any, theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        ours = {"mean_weight": "mean_logits", "var_weight": "var_logits"}.get(name, name)
        assert torch.equal(layer.state_dict()[ours], value.flatten()), name


@pytest.mark.parametrize(
    ("kind", "ones"), [(SwitchableNorm1d, 0), (SwitchableNorm1d, 1), (SwitchableNorm2d, 2), (SwitchableNorm3d, 3)]
)
def test_takes_the_authors_checkpoints(kind: type[nn.Module], ones: int) -> None:
    theirs = authors_state(5, ones=ones)
    before = {name: value.clone() for name, value in theirs.items()}
    layer = kind(5)
    layer.load_state_dict(theirs)
    check_taken(layer, theirs)
    assert theirs.keys() == before.keys()  # A caller's dictionary stays as it is.
    assert all(torch.equal(theirs[name], before[name]) for name in before)


def test_takes_the_authors_checkpoint_of_one_channel() -> None:
    theirs = authors_state(1)
    layer = SwitchableNorm2d(1)
    layer.load_state_dict(theirs)
    check_taken(layer, theirs)


def test_takes_the_authors_checkpoint_without_batch_normalization() -> None:
    theirs = authors_state(5, normalizers=2)
    layer = SwitchableNorm2d(5, normalizers=("in", "ln"))
    layer.load_state_dict(theirs)
    check_taken(layer, theirs)
    with pytest.raises(RuntimeError, match="mean_logits"):
        SwitchableNorm2d(5).load_state_dict(theirs, strict=False)


class Residual(nn.Module):
    """Layers inside of layers, whose names are prefixes of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = SwitchableNorm2d(4)
        self.norm1 = nn.Sequential(SwitchableNorm2d(4, normalizers=("in", "ln")), SparseSwitchableNorm2d(4))
        self.plain = nn.BatchNorm2d(4)


def test_takes_the_authors_checkpoint_of_a_whole_model() -> None:
    model = nn.ModuleDict({"body": Residual(), "other": SwitchableNorm1d(2)})
    theirs = {
        "body.norm": authors_state(4),
        "body.norm1.0": authors_state(4, normalizers=2, seed=1),
        "body.norm1.1": authors_state(4, seed=2),
        "other": authors_state(2, ones=0, seed=3),
    }
    whole = {name: value for name, value in model.state_dict().items() if name.startswith(("body.conv", "body.plain"))}
    whole |= {f"{prefix}.{name}": value for prefix, state in theirs.items() for name, value in state.items()}
    # Those of SSN have its own state, too.
    whole |= {
        "body.norm1.1.mean_fixed": torch.zeros(1, dtype=torch.int32),
        "body.norm1.1.var_fixed": torch.zeros(1, dtype=torch.int32),
        "body.norm1.1.radius": torch.tensor([0.25]),
    }
    missing, unexpected = model.load_state_dict(whole)
    assert (missing, unexpected) == ([], [])
    for prefix, state in theirs.items():
        check_taken(model.get_submodule(prefix), state)
    assert model.body.norm1[1].radius == 0.25
    # And goes on as a checkpoint of this library.
    again = nn.ModuleDict({"body": Residual(), "other": SwitchableNorm1d(2)})
    again.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_authors_running_statistics_are_taken_for_trained(momentum: float | None) -> None:
    layer = SwitchableNorm2d(4, momentum=momentum)
    layer.load_state_dict(authors_state(4))
    assert int(layer.num_batches_tracked) > 0


def test_a_missing_part_of_a_checkpoint_is_told() -> None:
    state = made().state_dict()
    del state["bias"]
    with pytest.raises(RuntimeError, match="bias"):
        SwitchableNorm2d(3).load_state_dict(state)
    theirs = authors_state(4)
    del theirs["running_var"]
    with pytest.raises(RuntimeError, match="running_var"):
        SwitchableNorm2d(4).load_state_dict(theirs)


@pytest.mark.parametrize("affine", [True, False])
def test_takes_a_plain_checkpoint(affine: bool) -> None:
    """The shares stay what they are."""
    plain = nn.BatchNorm2d(3, affine=affine).double()
    plain(batch())
    layer = made(affine=affine)
    logits = layer.mean_logits.detach().clone()
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.mean_logits, logits)
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name


def test_converted_from_plain_layers_and_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
    model(batch())
    parameters, running = list(model[1].parameters()), model[1].running_mean.clone()
    convert_norm(model, "sn")
    assert type(model[1]) is SwitchableNorm2d
    assert list(model[1].parameters())[:2] == parameters
    assert torch.equal(model[1].running_mean, running)
    close(torch.stack(model[1].ratios()), torch.full((2, 3), 1 / 3, dtype=FLOAT64))


# at the ends of the switch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_with_one_share_of_all_equals_the_plain_layer(name: str, dims: int, training: bool) -> None:
    kind = (SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d)[dims - 1]
    positions = (5, 2, 3)[:dims]
    layer = made(kind)
    with torch.no_grad():
        for logits in (layer.mean_logits, layer.var_logits):
            logits.fill_(-50.0)
            logits[ALL.index(name)] = 50.0
    batch_norm, instance_norm = getattr(nn, f"BatchNorm{dims}d"), getattr(nn, f"InstanceNorm{dims}d")
    plain = {"in": instance_norm(3, affine=True), "ln": nn.GroupNorm(1, 3), "bn": batch_norm(3)}[name].double()
    running = batch_norm(3).double()
    plain.weight, plain.bias = (nn.Parameter(part.detach().clone()) for part in (layer.weight, layer.bias))
    for step in range(2):
        x = batch(step, positions=positions)
        layer(x)
        running(x)
        if name == "bn":
            plain(x)
    close(dict(layer.named_buffers()), dict(running.named_buffers()))
    x, other = (batch(3, positions=positions).requires_grad_() for _ in range(2))
    layer.train(training)
    plain.train(training)
    y, expected = layer(x), plain(other)
    close(y, expected)
    upstream = batch(9, positions=positions)
    ours = torch.autograd.grad(y, [x, layer.weight, layer.bias], upstream)
    close(ours, torch.autograd.grad(expected, [other, plain.weight, plain.bias], upstream), 1e-10)


# fewer normalizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizers", [("in", "ln"), ("in", "bn"), ("ln", "bn"), ("bn", "in", "ln")])
@pytest.mark.parametrize("shared_logits", [False, True])
def test_some_normalizers(normalizers: tuple[str, ...], shared_logits: bool) -> None:
    layer = made(normalizers=normalizers, shared_logits=shared_logits)
    assert layer.normalizers == tuple(name for name in ALL if name in normalizers)
    assert len(layer.mean_logits) == len(normalizers)
    x, other = batch().requires_grad_(), batch().requires_grad_()
    y, expected = layer(x), training_formula(layer, other)
    close(y, expected)
    parameters, upstream = list(layer.parameters()), batch(9)
    ours = torch.autograd.grad(y, [x, *parameters], upstream)
    close(ours, torch.autograd.grad(expected, [other, *parameters], upstream), 1e-10)


def test_without_batch_normalization_nothing_depends_on_the_batch() -> None:
    layer = made(normalizers=("in", "ln"))
    assert layer.running_mean is None
    assert layer.running_var is None
    assert set(layer.state_dict()) == {"weight", "bias", "mean_logits", "var_logits"}
    x = batch()
    y = layer(x)
    close(layer(x[2:3]), y[2:3])
    close(layer(x.flip(0)), y.flip(0))
    assert torch.equal(layer.eval()(x), y)
    close(layer(x[:1]), y[:1])


def test_with_batch_normalization_it_does() -> None:
    layer = made()
    x = batch()
    assert not torch.allclose(layer(x)[:2], layer(x[:2]))
    layer.eval()
    close(layer(x)[:2], layer(x[:2]))


def test_shared_logits() -> None:
    layer = made(shared_logits=True)
    assert layer.var_logits is None
    assert "var_logits" not in layer.state_dict()
    assert layer.var_ratios == layer.mean_ratios
    theirs = authors_state(3)
    with pytest.raises(RuntimeError, match="var_logits"):
        SwitchableNorm2d(3, shared_logits=True).load_state_dict(theirs)


def test_ratios_are_those_of_softmax() -> None:
    layer = made()
    mean, var = layer.ratios()
    close(mean, softmax(layer.mean_logits))
    close(var, softmax(layer.var_logits))
    assert list(layer.mean_ratios) == list(ALL)
    close(torch.tensor(list(layer.var_ratios.values()), dtype=FLOAT64), var.detach())
    layer.reset_parameters()
    assert layer.mean_ratios == pytest.approx(dict.fromkeys(ALL, 1 / 3))
    assert torch.equal(layer.var_logits, torch.ones(3, dtype=FLOAT64))


@pytest.mark.parametrize("normalizers", ["in", ("in",), (), ("in", "gn"), ("bn", "bn"), "bn,in", ("IN", "LN")])
def test_normalizers_are_checked(normalizers: Any) -> None:
    with pytest.raises(ValueError, match="normalizers must be (at least two of in, ln, bn|a sequence), got"):
        SwitchableNorm2d(3, normalizers=normalizers)


@pytest.mark.parametrize("options", [{"group_size": 2}, {"synchronize": True}])
def test_without_batch_normalization_there_is_no_batch_to_choose(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'bn' is not in normalizers"):
        SwitchableNorm2d(3, normalizers=("in", "ln"), **options)


# shapes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(6, [2, 2, 2]), (7, [2, 2, 3]), (2, [2]), (3, [3])],
    ids=str,
)
def test_ghost_groups(samples: int, sizes: list[int]) -> None:
    layer = made(group_size=2)
    x, other = batch(samples=samples).requires_grad_(), batch(samples=samples).requires_grad_()
    groups = [part.tolist() for part in torch.arange(samples).split(sizes)]
    y, expected = layer(x), training_formula(layer, other, groups)
    close(y, expected)
    upstream, parameters = batch(9, samples), list(layer.parameters())
    ours = torch.autograd.grad(y, [x, *parameters], upstream)
    close(ours, torch.autograd.grad(expected, [other, *parameters], upstream), 1e-10)
    values = [other.detach()[group].transpose(0, 1).flatten(1) for group in groups]
    close(layer.running_mean, 0.1 * torch.stack([part.mean(1) for part in values]).mean(0))
    close(layer.running_var, 0.9 + 0.1 * torch.stack([part.var(1, correction=1) for part in values]).mean(0))


@pytest.mark.parametrize("positions", [(1, 1), ()])
def test_maps_of_one_position(positions: tuple[int, ...]) -> None:
    """The instance has its value as mean, no variance; the authors' code gives NaN."""
    layer = made(SwitchableNorm2d if positions else SwitchableNorm1d)
    x, other = batch(positions=positions).requires_grad_(), batch(positions=positions).requires_grad_()
    y, expected = layer(x), training_formula(layer, other)
    close(y, expected)
    parameters, upstream = list(layer.parameters()), batch(9, positions=positions)
    ours = torch.autograd.grad(y, [x, *parameters], upstream)
    close(ours, torch.autograd.grad(expected, [other, *parameters], upstream), 1e-10)
    assert torch.isfinite(layer.eval()(x)).all()


def test_a_single_sample() -> None:
    layer = made()
    x = batch(samples=1)
    close(layer(x), training_formula(layer, x))
    with pytest.raises(ValueError, match=r"more than 1 value per channel .*\[1, 3\]"):
        made(SwitchableNorm1d)(batch(samples=1, positions=()))
    without = made(SwitchableNorm1d, normalizers=("in", "ln"))
    x = batch(samples=1, positions=())
    close(without(x), training_formula(without, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("positions", [(1, 1), ()])
def test_one_position_has_no_unbiased_variance(positions: tuple[int, ...], training: bool) -> None:
    layer = made(SwitchableNorm2d if positions else SwitchableNorm1d, unbiased=True).train(training)
    with pytest.raises(ValueError, match="unbiased=True needs more than 1 position"):
        layer(batch(positions=positions))
    assert int(layer.num_batches_tracked) == 0
    assert torch.equal(layer.running_mean, torch.zeros(3, dtype=FLOAT64))


def test_unbiased_instances() -> None:
    """v_in over n − 1, and with it v_ln and v_bn, as the authors have them."""
    layer = made(unbiased=True)
    x = batch()
    mu, v = x.mean((2, 3)), x.var((2, 3), correction=1)
    second = v + mu**2
    mu_ln, mu_bn = mu.mean(1, keepdim=True), mu.mean(0, keepdim=True)
    v_ln, v_bn = second.mean(1, keepdim=True) - mu_ln**2, second.mean(0, keepdim=True) - mu_bn**2
    w, u = softmax(layer.mean_logits), softmax(layer.var_logits)
    mean, var = w[0] * mu + w[1] * mu_ln + w[2] * mu_bn, u[0] * v + u[1] * v_ln + u[2] * v_bn
    y = (x - mean[..., None, None]) / (var[..., None, None] + layer.eps) ** 0.5
    close(layer(x), y * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))
    close(layer.running_mean, 0.1 * mu_bn[0])
    close(layer.running_var, 0.9 + 0.1 * v_bn[0])


class AuthorsFormula:
    """What the authors' layer for [N, C] computes, with the unbiased variances of the layer and of the batch."""

    def __init__(self, layer: SwitchableNorm1d, keep: float) -> None:
        self.layer, self.keep = layer, keep
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()

    def __call__(self, x: Tensor, training: bool = True) -> Tensor:
        layer, (samples, channels) = self.layer, x.shape
        of_mean, of_var = softmax(layer.mean_logits), softmax(layer.var_logits)
        mu_l = x.sum(1, keepdim=True) / channels
        v_l = ((x - mu_l) ** 2).sum(1, keepdim=True) / (channels - 1)
        mu_b, v_b = self.mean, self.var
        if training:
            mu_b = x.sum(0) / samples
            v_b = ((x - mu_b) ** 2).sum(0) / (samples - 1)
            self.mean = self.keep * self.mean + (1 - self.keep) * mu_b.detach()
            self.var = self.keep * self.var + (1 - self.keep) * v_b.detach()
        mean, var = of_mean[0] * mu_l + of_mean[1] * mu_b, of_var[0] * v_l + of_var[1] * v_b
        return (x - mean) / (var + layer.eps) ** 0.5 * layer.weight + layer.bias


@pytest.mark.parametrize("positions", [(), (1,)])
def test_the_authors_layer_for_vectors(positions: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = {
        "weight": torch.randn(1, 5, generator=generator),
        "bias": torch.randn(1, 5, generator=generator),
        "mean_weight": torch.randn(2, generator=generator),
        "var_weight": torch.randn(2, generator=generator),
        "running_mean": torch.randn(1, 5, generator=generator),
        "running_var": torch.rand(1, 5, generator=generator),
    }
    layer = SwitchableNorm1d(5, momentum=1 - 0.997, normalizers=("ln", "bn"), unbiased=True)
    layer.load_state_dict(theirs)
    check_taken(layer, theirs)
    formula = AuthorsFormula(layer.double(), 0.997)
    for step in range(3):
        x, other = (batch(step, 6, 5, positions).requires_grad_() for _ in range(2))
        y, expected = layer(x), formula(other.flatten(1)).reshape(x.shape)
        close(y, expected)
        upstream, parameters = batch(9, 6, 5, positions), list(layer.parameters())
        ours = torch.autograd.grad(y, [x, *parameters], upstream)
        close(ours, torch.autograd.grad(expected, [other, *parameters], upstream), 1e-10)
        close(layer.running_mean, formula.mean)
        close(layer.running_var, formula.var)
    layer.eval()
    x = batch(4, 6, 5, positions)
    close(layer(x), formula(x.flatten(1), training=False).reshape(x.shape))
    close(layer(x[:1]), layer(x)[:1])


def test_the_authors_layer_for_vectors_in_groups_and_compiled() -> None:
    layer = made(SwitchableNorm1d, channels=5, normalizers=("ln", "bn"), unbiased=True, group_size=3)
    whole = made(SwitchableNorm1d, channels=5, normalizers=("ln", "bn"), unbiased=True)
    x = batch(0, 6, 5, ())
    close(layer(x), torch.cat([whole(part) for part in x.split(3)]))
    whole = made(SwitchableNorm1d, channels=5, normalizers=("ln", "bn"), unbiased=True)
    close(torch.compile(copy.deepcopy(whole), backend="eager")(x), whole(x))
    with pytest.raises(ValueError, match="unbiased=True needs more than 1 value per sample"):
        made(SwitchableNorm1d, channels=1, normalizers=("ln", "bn"), unbiased=True)(batch(0, 6, 1, ()))


def test_a_checkpoint_of_other_normalizers_is_told_apart() -> None:
    theirs = {"mean_weight": torch.ones(2), "var_weight": torch.ones(2)}
    with pytest.raises(RuntimeError, match=r'of 2 normalizers, those of this layer .* and for \[N, C\] \("ln", "bn"\)'):
        SwitchableNorm1d(3, unbiased=True).load_state_dict(theirs, strict=False)


# precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_large_mean_does_not_cancel(training: bool, memory_format: torch.memory_format) -> None:
    """Mean 3000, deviation 1, in float32: the authors' output is .63 off."""
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
    x = (x + 3000).float().contiguous(memory_format=memory_format)
    layer = made(channels=4, momentum=None).float()
    other = copy.deepcopy(layer).double()
    layer(x)
    other(x.double())
    layer.train(training)
    other.train(training)
    close(layer(x).double(), other(x.double()), 1e-2)
    close(layer.running_var.double(), other.running_var, 1e-2)
    again, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    layer(again).backward(upstream)
    other(wide).backward(upstream.double())
    close(again.grad.double(), wide.grad, 1e-2)


# the batch average --------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """The second sees what the first has normalized."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = made(**options)
        self.conv = nn.Conv2d(3, 4, 2)
        self.second = made(channels=4, **options)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(x)))


@pytest.mark.parametrize("loaded", [4, 12, 6])
def test_calibrated_to_the_batch_average(loaded: int) -> None:
    """Over batches of m as in training, whatever the loader's batches; against a loop over them."""
    check_calibrated(loaded, unbiased=False)


def test_calibrated_to_the_batch_average_of_unbiased_instances() -> None:
    """The variances whose average the running one is in training: evaluation mixes them with those of instances."""
    check_calibrated(4, unbiased=True)


def check_calibrated(loaded: int, unbiased: bool) -> None:
    m = 4
    model = TwoLayers(unbiased=unbiased)
    data = [batch(step, samples=loaded) for step in range(3)]
    reference = copy.deepcopy(model).train()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"first": [], "second": []}
    with torch.no_grad():
        for x in data:
            for part in x[: loaded // m * m].split(m):
                for name in ("first", "second"):
                    layer = reference.get_submodule(name)
                    if name == "second":
                        part = reference.conv(part)
                    mean = part.mean((0, 2, 3))
                    if unbiased:  # as the authors' running variance
                        own, v = part.mean((2, 3)), part.var((2, 3), correction=1)
                        var = (v + own**2).mean(0) - mean**2
                    else:
                        var = part.var((0, 2, 3), correction=1)
                    found[name].append((mean, var))
                    part = layer(part)
    model.eval()
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    calibrate(model, data, batch_size=m, what="bn")
    for name, values in found.items():
        layer = model.get_submodule(name)
        close(layer.running_mean, torch.stack([mean for mean, _ in values]).mean(0))
        close(layer.running_var, torch.stack([var for _, var in values]).mean(0))
        assert int(layer.num_batches_tracked) == len(values)
    close(dict(model.named_parameters()), parameters, 0)
    assert not model.training


def test_without_batch_normalization_there_is_nothing_to_calibrate() -> None:
    with pytest.raises(ValueError, match="no batch normalization"):
        calibrate(made(normalizers=("in", "ln")), [batch()], batch_size=2, what="bn")


def test_the_authors_sums_are_of_use_after_calibration() -> None:
    """With `using_moving_average=False` their buffers hold sums over an unknown number of batches."""
    state = authors_state(3)
    state["running_mean"] *= 1000
    state["running_var"] *= 1000
    layer = SwitchableNorm2d(3).double()
    layer.load_state_dict(state)
    data = [batch(step, samples=4) for step in range(2)]
    calibrate(layer, data, batch_size=4, what="bn")
    close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0))


# the optimizer's groups ---------------------------------------------------------------------------------------------


def test_switch_logits() -> None:
    shared = SwitchableNorm2d(3, shared_logits=True)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        SwitchableNorm2d(3),
        nn.BatchNorm2d(3),
        nn.Sequential(shared, SparseSwitchableNorm2d(3)),
        shared,
    )
    found = switch_logits(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in found] == [
        "1.mean_logits",
        "1.var_logits",
        "3.0.mean_logits",
        "3.1.mean_logits",
        "3.1.var_logits",
    ]
    assert switch_logits(nn.Conv2d(3, 3, 1)) == []
    assert switch_logits(shared) == [shared.mean_logits]
    # Layers may share their logits; an optimizer refuses a parameter that it gets twice.
    tied = nn.Sequential(SwitchableNorm2d(3), SwitchableNorm2d(3))
    tied[1].mean_logits = tied[0].mean_logits
    assert [id(each) for each in switch_logits(tied)] == [
        id(each) for each in (tied[0].mean_logits, tied[0].var_logits, tied[1].var_logits)
    ]


def test_logits_in_a_group_without_weight_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), SwitchableNorm2d(3)).double()
    with torch.no_grad():
        model[1].mean_logits.copy_(torch.tensor([1.0, 2.0, 0.5]))
    logits = switch_logits(model)
    others = [each for each in model.parameters() if all(each is not logit for logit in logits)]
    assert len(others) + len(logits) == len(list(model.parameters()))
    optimizer = torch.optim.SGD([{"params": others}, {"params": logits, "weight_decay": 0.0}], 0.1, weight_decay=0.5)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        expected = before[name] if "logits" in name else 0.95 * before[name]
        close(value.detach(), expected)


def test_the_shares_learn() -> None:
    """Features with a shift of each sample, which the target has not: the instance's mean takes over."""
    layer = SwitchableNorm2d(2, affine=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        target = torch.randn(8, 2, 4, 4, generator=generator, dtype=FLOAT64)
        target = F.instance_norm(target)
        shift = 3 * torch.randn(8, 2, 1, 1, generator=generator, dtype=FLOAT64)
        optimizer.zero_grad()
        (layer(target + shift) - target).square().mean().backward()
        optimizer.step()
    assert layer.mean_ratios["in"] > 0.5
    assert layer.var_ratios["in"] > 0.5
