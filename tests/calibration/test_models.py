"""Calibration against the formulas, written out over single batches; and that nothing else changes."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import wellcond
from wellcond.calibration.models import calibrate
from wellcond.nn import (
    BatchRenorm2d,
    BSRBatchNorm1d,
    BSRBatchNorm2d,
    EvalNorm1d,
    EvalNorm2d,
    GhostBatchNorm2d,
    MomentumBatchNorm2d,
    PopulationNorm2d,
)
from wellcond.runtime.checks import WellcondWarning

WHATS = ("bsr", "evalnorm", "bn")


class Net(nn.Module):
    """Batch normalizations after a convolution, after another with dropout between, and after a linear layer."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.first = norm(3)
        self.drop = nn.Dropout(0.5)
        self.stage = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), norm(4), nn.ReLU())
        self.linear = nn.Linear(16, 5)
        self.last = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(self.drop(self.first(self.conv(x)).relu()))
        return self.last(self.linear(x.flatten(1)))


def trained(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Net:
    """Make a model with statistics, scales and shifts that are not those of a new one."""
    torch.manual_seed(1)
    model = Net(norm).double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model.eval()


def data(samples: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 6, 6, generator=generator, dtype=torch.float64)
    offsets = torch.randn(samples, 2, 1, 1, generator=generator, dtype=torch.float64)
    return x * (1 + offsets.abs()) + 2 * offsets


def seen_in_training(model: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """Run single batches through torch's own layers in training mode, dropout off; return what each layer is given."""
    model = copy.deepcopy(model).eval()
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            inputs[name] = []
            module.train()
            module.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return inputs


def channel(x: Tensor, c: int) -> Tensor:
    """Return one channel of a batch, [instances, positions]."""
    return x[:, c].reshape(x.shape[0], -1)


def regression_terms(x: Tensor, c: int, center: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Σ φφᵀ, Σ φμ_B, Σ ϕϕᵀ, Σ ϕσ²_B of one batch and channel (3.9, 3.12)."""
    values = channel(x, c)
    mean_b, var_b = values.mean(), ((values - values.mean()) ** 2).mean()
    terms = [torch.zeros(2, 2), torch.zeros(2), torch.zeros(3, 3), torch.zeros(3)]
    terms = [term.double() for term in terms]
    for s in range(len(values)):
        mean_s = values[s].mean()
        var_s = ((values[s] - mean_s) ** 2).mean()
        phi = torch.stack([mean_s, torch.ones((), dtype=torch.float64)])
        varphi = torch.stack([var_s, (mean_s - center) ** 2, torch.ones((), dtype=torch.float64)])
        for term, new in zip(
            terms, (torch.outer(phi, phi), phi * mean_b, torch.outer(varphi, varphi), varphi * var_b), strict=True
        ):
            term += new
    return terms[0], terms[1], terms[2], terms[3]


SUMS = ("mean_gram", "mean_target", "var_gram", "var_target")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that calibration must leave alone, beside the state dict."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "ids": {name: id(value) for name, value in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "requires_grad": {name: value.requires_grad for name, value in model.named_parameters()},
        "gradients": {
            name: None if value.grad is None else value.grad.clone() for name, value in model.named_parameters()
        },
        "attributes": {
            name: {
                key: value
                for key, value in vars(module).items()
                if not isinstance(value, (dict, set)) and key not in ("_past", "_solved")
            }
            for name, module in model.named_modules()
        },
        "random": torch.get_rng_state(),
    }


def assert_same(before: Any, after: Any) -> None:
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


# the formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
def test_sums_of_the_regression_are_the_closed_sum_with_equal_weights(m: int) -> None:
    model, batches = trained(), list(data().split(m))
    inputs = seen_in_training(model, batches)
    assert calibrate(model, batches, batch_size=m) is model
    for name, seen in inputs.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, (BSRBatchNorm1d, BSRBatchNorm2d))
        for c in range(layer.num_features):
            terms = [regression_terms(x, c, float(layer.running_mean[c])) for x in seen]
            for index, buffer in enumerate(SUMS):
                expected = sum(term[index] for term in terms) / len(terms)
                assert_close(getattr(layer, buffer)[c], expected)


def test_evaluation_uses_the_new_regression_at_once_and_after_a_change_of_mode() -> None:
    layer = BSRBatchNorm2d(2).double().eval()
    x = data()
    before = layer(x)
    calibrate(nn.Sequential(layer), [x], batch_size=2)
    after = layer(x)
    assert not torch.allclose(before, after)
    training = BSRBatchNorm2d(2).double()
    calibrate(nn.Sequential(training), [x], batch_size=2)
    assert training.training
    assert torch.equal(training.eval()(x), after)


def test_batches_of_one_sample_give_instance_normalization() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, affine=False)).double().eval()
    calibrate(model, data().split(8), batch_size=1, nonneg="nnls")
    layer = model[0]
    assert isinstance(layer, BSRBatchNorm2d)
    assert_close(layer.mean_weights.double(), torch.tensor([[1.0, 0.0]] * 2).double(), 1e-6)
    assert_close(layer.var_weights.double(), torch.tensor([[1.0, 0.0, 0.0]] * 2).double(), 1e-6)
    x = data(seed=3)
    assert_close(model(x), F.instance_norm(x, eps=layer.eps), 1e-6)


@pytest.mark.parametrize("m", [2, 3])
def test_running_statistics_are_the_average_of_batch_means_and_unbiased_variances(m: int) -> None:
    model, batches = trained(), list(data().split(m))
    inputs = seen_in_training(model, batches)
    calibrate(model, batches, m, "bn")
    for name, seen in inputs.items():
        layer = model.get_submodule(name)
        flat = [x.transpose(0, 1).flatten(1) for x in seen]
        assert_close(layer.running_mean, torch.stack([x.mean(1) for x in flat]).mean(0))
        assert_close(layer.running_var, torch.stack([x.var(1, correction=1) for x in flat]).mean(0))
        assert int(layer.num_batches_tracked) == len(batches)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
def test_a_momentum_continues_the_moving_average_of_training(momentum: float) -> None:
    model, batches = trained(), list(data().split(2))
    trained_on = copy.deepcopy(model)
    for module in trained_on.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
            module.train()
    with torch.no_grad():
        for batch in batches:
            trained_on(batch)
    calibrate(model, [data()], 2, "bn", momentum=momentum)
    for name, value in trained_on.state_dict().items():
        assert_close(model.state_dict()[name], value)


def test_a_momentum_weighs_the_regressions_batches_as_the_recursion_does() -> None:
    model, batches = trained(), list(data().split(4))
    inputs = seen_in_training(model, batches)
    calibrate(model, data().split(12), 4, momentum=0.3)
    layer, seen = model.first, inputs["first"]
    for c in range(3):
        sums = [torch.zeros_like(getattr(layer, name)[c]) for name in SUMS]
        for x in seen:  # 3.13
            new = regression_terms(x, c, float(layer.running_mean[c]))
            sums = [0.7 * old + 0.3 * term for old, term in zip(sums, new, strict=True)]
        for name, expected in zip(SUMS, sums, strict=True):
            assert_close(getattr(layer, name)[c], expected)


def evalnorm_objectives(layer: EvalNorm2d, seen: list[Tensor], mixture: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ (f_μ − μ_B)²/σ² and Σ ((f_σ − σ²_B)/σ²)² (3.6, 3.7), σ² with ε, for each of the mixtures."""
    of_mean, of_var = torch.zeros_like(mixture), torch.zeros_like(mixture)
    for x in seen:
        for c in range(x.shape[1]):
            values, long_mean, long_var = channel(x, c), layer.running_mean[c], layer.running_var[c]
            scale = long_var + layer.eps
            for instance in values:
                mean_s, var_s = instance.mean(), instance.var(correction=0)
                f_mean = mixture * mean_s + (1 - mixture) * long_mean
                between = mixture * (1 - mixture) * (mean_s - long_mean) ** 2
                f_var = mixture * var_s + (1 - mixture) * long_var + between
                of_mean += (f_mean - values.mean()) ** 2 / scale
                of_var += ((f_var - values.var(correction=0)) / scale) ** 2
    return of_mean, of_var


def test_the_mixture_is_at_the_minimum_of_evalnorms_objective() -> None:
    model, batches = trained(), list(data(40).split(2))
    calibrate(model, batches, 2, "bn")
    inputs = seen_in_training(model, batches)
    calibrate(model, data(40).split(20), 2, "evalnorm")
    inner = 0
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for name in ("first", "stage.1"):
        layer = model.get_submodule(name)
        assert isinstance(layer, EvalNorm2d)
        for which, mixture in enumerate((layer.mean_mixture, layer.var_mixture)):
            values = evalnorm_objectives(layer, inputs[name], torch.cat([mixture[None], grid]))[which]
            assert values[0] <= values[1:].min() * (1 + 1e-12)
            assert abs(grid[values[1:].argmin()] - mixture) <= 0.001
            inner += int(0 < mixture < 1)
    assert inner >= 2


def test_the_mixture_that_is_not_learned_is_one_over_m() -> None:
    model = trained()
    calibrate(model, [data()], 4, "evalnorm", learn=False)
    assert isinstance(model.last, EvalNorm1d)
    for layer in (model.first, model.stage[1], model.last):
        assert float(layer.mean_mixture) == float(layer.var_mixture) == 0.25


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("momentum", [None, 0.2])
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), rest=st.lists(st.integers(0, 2), min_size=4))
@settings(max_examples=8, deadline=None)
def test_the_loaders_batches_may_be_larger_and_what_is_left_over_does_not_count(
    what: str, momentum: float | None, sizes: list[int], rest: list[int]
) -> None:
    m = 3
    whole = list(data(m * sum(sizes)).split(m))
    divided, larger = iter(whole), []
    for size, extra in zip(sizes, rest, strict=False):
        larger.append(torch.cat([*(next(divided) for _ in range(size)), data(2, seed=9)[:extra] * 5]))
    one, other = (calibrate(trained(), loader, m, what, momentum=momentum) for loader in (whole, larger))
    for name, value in one.state_dict().items():
        assert_close(other.state_dict()[name], value, 1e-7 if "mixture" in name else 1e-10)


# nothing else changes -----------------------------------------------------------------------------------------------

CHANGED = {
    "bsr": set(SUMS),
    "evalnorm": {"mean_mixture", "var_mixture"},
    "bn": {"running_mean", "running_var", "num_batches_tracked"},
}


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("converted", [True, False])
def test_nothing_but_the_statistics_changes(what: str, training: bool, converted: bool) -> None:
    norms: dict[str, type[nn.Module]] = {"bsr": BSRBatchNorm2d, "evalnorm": EvalNorm2d, "bn": MomentumBatchNorm2d}
    model = trained(norms[what]) if converted else trained()
    model.train(training)
    model.drop.train(not training)
    model.conv.weight.requires_grad_(False)
    model.stage[1].bias.requires_grad_(False)
    model(data(4)).sum().backward()
    calls = []
    model.first.register_forward_hook(lambda module, args, output: calls.append(module.training))
    dataset = torch.utils.data.TensorDataset(data(), torch.zeros(24))
    where = (lambda name, module: name != "last") if converted else None
    before = snapshot(model)
    calibrate(model, torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True), 2, what, where=where)
    after = snapshot(model)
    assert calls == [True] * 3
    assert all("forward" not in vars(module) for module in model.modules())
    changed = {name for name, value in before["state"].items() if not torch.equal(value, after["state"][name])}
    assert bool(changed) == (converted or what == "bn")
    assert {name.rpartition(".")[2] for name in changed} <= CHANGED[what]
    if converted or what == "bn":
        del before["state"], after["state"]
        assert_same(before, after)
    else:
        for part in ("ids", "modes", "requires_grad", "gradients", "random"):
            assert_same(before[part], after[part])
        kept = {name: value for name, value in after["state"].items() if name in before["state"]}
        assert_same(before["state"], kept)


class LoaderError(Exception):
    pass


def failing() -> Iterator[Tensor]:
    yield data()
    raise LoaderError


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BSRBatchNorm2d, MomentumBatchNorm2d])
def test_a_pass_that_raises_changes_nothing_at_all(what: str, norm: Callable[[int], nn.Module]) -> None:
    model = trained(norm)
    model.stage.train()
    handle = model.first.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    with pytest.raises(LoaderError):
        calibrate(model, failing(), 2, what)
    assert_same(before, snapshot(model))
    handle.remove()
    assert not model.first._forward_hooks
    model.eval()(data())
    with pytest.raises(ValueError, match=r"not finite reached 'first', 'stage\.1', 'last'"):
        calibrate(model, [data(), data() * float("nan")], 2, what)
    assert_same(before["state"], snapshot(model)["state"])
    assert_same(before["types"], snapshot(model)["types"])


def test_other_normalizations_are_in_evaluation_mode() -> None:
    model, batches = trained(), list(data().split(2))
    before = snapshot(model)["state"]
    calibrate(model, batches, 2, "bn", where=lambda name, module: name == "stage.1")
    seen = []
    reference = trained()
    reference.stage[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        reference(data())
    x = seen[0]
    assert_close(model.stage[1].running_mean, x.mean((0, 2, 3)))
    assert torch.equal(model.first.running_mean, before["first.running_mean"])
    assert int(model.last.num_batches_tracked) == 7


def test_reestimated_regressions_fall_back_to_the_new_running_statistics() -> None:
    model = trained(BSRBatchNorm2d)
    calibrate(model, [data()], 24, "bn")
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    layer = model.first
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
    assert_close(layer(x), expected, 1e-6)


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    """Also with dropout, which draws from the random state, and with an attachment, which watches forward passes."""

    def run(pause: bool) -> list[Tensor]:
        model = trained().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=1, solve_every=1))
        torch.manual_seed(0)
        for step in range(4):
            if pause and step == 2:
                loader = torch.utils.data.DataLoader(data(seed=9), batch_size=6, shuffle=True)
                calibrate(model, loader, 2, "bsr")
            optimizer.zero_grad()
            model(data(seed=step)).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)


# layers of other kinds ----------------------------------------------------------------------------------------------


def training_reference(model: Net, m: int, momentum: float | None = None) -> dict[str, Tensor]:
    """Train-mode passes over single batches, the layers' own way; return the average moments of what each was given."""
    inputs = seen_in_training(model, list(data().split(m)))
    found = {}
    for name, seen in inputs.items():
        flat = [x.transpose(0, 1).flatten(1) for x in seen]
        found[f"{name}.running_mean"] = torch.stack([x.mean(1) for x in flat]).mean(0)
        found[f"{name}.running_var"] = torch.stack([x.var(1, correction=1) for x in flat]).mean(0)
    return found


class Scaled(nn.BatchNorm2d):
    """A subclass that does something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input).tanh()


@pytest.mark.parametrize(
    "norm", [MomentumBatchNorm2d, BatchRenorm2d, PopulationNorm2d, Scaled, lambda c: GhostBatchNorm2d(c, 2)]
)
def test_every_kind_normalizes_as_it_does_in_training(norm: Callable[[int], nn.Module]) -> None:
    model = trained(norm)
    for module in model.modules():
        if isinstance(module, MomentumBatchNorm2d):
            module.stat_momentum = 0.6
            module.train_mean.fill_(0.2)
    before = snapshot(model)
    expected = training_reference(model, 2)
    calibrate(model, data().split(2), 2, "bn")
    for name, value in expected.items():
        assert_close(model.state_dict()[name], value)
    after = snapshot(model)
    for name, value in before["state"].items():
        if name.rpartition(".")[2] not in CHANGED["bn"]:
            assert torch.equal(after["state"][name], value), name
    assert_same(before["attributes"], after["attributes"])


def test_a_subclass_of_its_own_is_run_in_groups_and_on_what_is_left_over() -> None:
    expected = training_reference(trained(Scaled), 4)
    model = trained(Scaled)
    calibrate(model, [torch.cat([data(), data(3, seed=5)])], 4, "bn")
    for name, value in expected.items():
        assert_close(model.state_dict()[name], value)


def test_synchronized_layers_use_this_process() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(2), nn.Conv2d(2, 2, 1)).double().eval()
    calibrate(model, [data()], 24, "bn")
    assert_close(model[0].running_mean, data().mean((0, 2, 3)))


def test_timms_fused_activation_still_acts() -> None:
    timm = pytest.importorskip("timm")

    def make() -> Net:
        return trained(timm.layers.BatchNormAct2d)

    expected = training_reference(make(), 2)
    assert_close(calibrate(make(), [data()], 2, "bn").state_dict()["last.running_mean"], expected["last.running_mean"])
    model = make()
    inputs = seen_in_training(model, list(data().split(2)))
    calibrate(model, [data()], 2, "bsr")
    assert isinstance(model.first, BSRBatchNorm2d)
    terms = [regression_terms(x, 0, float(model.last.running_mean[0])) for x in inputs["last"]]
    assert_close(model.last.var_gram[0], sum(term[2] for term in terms) / len(terms))


def test_layers_without_running_statistics_normalize_groups_too() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).double()
    expected = seen_in_training(model, list(data().split(2)))["2"]
    calibrate(model, [data()], 2, "bn")
    assert_close(model[2].running_var, torch.stack([x.var((0, 2, 3)) for x in expected]).mean(0))


def test_a_layer_that_is_called_several_times_counts_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x)

    model = Twice().double()
    calibrate(model, [data()], 24, "bn")
    assert_close(model.norm.running_mean, 2 * data().mean((0, 2, 3)))
    assert int(model.norm.num_batches_tracked) == 2


def test_a_layer_with_two_names_is_selected_by_either() -> None:
    norm = nn.BatchNorm2d(2)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.BatchNorm2d(2)}).double()
    calibrate(
        model,
        [data()],
        2,
        "bsr",
        call=lambda model, x: model["c"](model["b"](x)),
        where=lambda name, module: name == "b",
    )
    assert isinstance(norm, BSRBatchNorm2d)
    assert model["a"] is model["b"] is norm
    assert float(norm.mean_gram[0, 1, 1]) == 2
    assert type(model["c"]) is nn.BatchNorm2d


def test_frames_folded_into_the_samples_stay_with_their_sample() -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.flatten(0, 2)).sum()

    model = Folding().double()
    calibrate(model, [data(10)], 4, "bn")
    expected = [x.flatten(0, 2) for x in data(10)[:8].split(4)]
    assert_close(model.norm.running_mean, torch.stack([x.mean(0) for x in expected]).mean(0))
    assert_close(model.norm.running_var, torch.stack([x.var(0) for x in expected]).mean(0))
    assert int(model.norm.num_batches_tracked) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", WHATS)
def test_other_precisions_and_memory_formats(dtype: torch.dtype, what: str) -> None:
    expected = calibrate(trained(), [data()], 4, what).state_dict()
    model = trained().to(dtype=dtype, memory_format=torch.channels_last)
    x = data().to(dtype=dtype, memory_format=torch.channels_last)
    found = calibrate(model, [x], 4, what).state_dict()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for name in ("first.running_mean", "stage.1.running_var", *(n for n in found if "var_target" in n)):
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=tolerance, atol=tolerance)
    assert model(x).dtype == dtype


# what a loader may give ---------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["image", "target"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x],
        lambda x: Pair(x, None),
        lambda x: {"x": x},
        lambda x: ({"x": x}, "label"),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "mapping", "mapping and target"],
)
def test_batches_of_every_kind(wrap: Callable[[Tensor], Any]) -> None:
    expected = calibrate(trained(), data().split(8), 2, "bn").state_dict()
    found = calibrate(trained(), (wrap(x) for x in data().split(8)), 2, "bn").state_dict()
    assert_same(dict(expected), dict(found))


def test_a_call_of_ones_own() -> None:
    expected = calibrate(trained(), data().split(8), 2, "bn").state_dict()
    models = []

    def call(model: nn.Module, batch: Any) -> None:
        models.append(model)
        model(torch.stack(batch["images"]))

    inner = trained()
    model = calibrate(nn.DataParallel(inner), [{"images": list(x)} for x in data().split(8)], 2, "bn", call=call)
    assert isinstance(model, nn.DataParallel)
    assert models == [inner] * 3
    assert_same(dict(expected), dict(inner.state_dict()))


def test_only_the_first_batches() -> None:
    expected = calibrate(trained(), data()[:16].split(8), 2, "bn").state_dict()
    given = iter(data().split(8))
    assert_same(dict(expected), dict(calibrate(trained(), given, 2, "bn", max_batches=2).state_dict()))
    assert len(list(given)) == 1


def test_a_compiled_model() -> None:
    model = trained()
    compiled = torch.compile(model, backend="eager")
    compiled(data())
    assert calibrate(compiled, [data()], 2, "bn") is compiled
    assert_same(dict(calibrate(trained(), [data()], 2, "bn").state_dict()), dict(model.state_dict()))
    inside = nn.Sequential(torch.compile(trained(), backend="eager"))
    inside(data())
    calibrate(inside, [data()], 2, "bn")
    assert torch.equal(inside[0].last.running_mean, model.last.running_mean)


# errors and warnings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be a positive integer or None, got 2.0"),
        ({"batch_size": True}, ValueError, "batch_size"),
        ({"what": "ema"}, ValueError, "what must be one of 'bsr', 'evalnorm', 'bn', got 'ema'"),
        ({"momentum": 0.0}, ValueError, r"momentum must lie in \(0, 1\] or be None, got 0.0"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"max_batches": 0}, ValueError, "max_batches must be a positive integer, got 0"),
        ({"what": "bn", "nonneg": "nnls"}, TypeError, "what='bn' converts nothing and takes no options, got 'nonneg'"),
        ({"nonneg": "relu"}, ValueError, "nonneg must be 'clamp' or 'nnls'"),
        ({"rate": 1}, TypeError, "rate"),
        ({"where": lambda name, module: False}, ValueError, "Net has no batch normalization .* that `where` selects"),
        ({"batch_size": 30}, ValueError, "no batch has batch_size=30 samples: the largest has 24"),
        ({"loader": []}, ValueError, "the loader gave no batch"),
        ({"loader": [torch.zeros(0, 2, 6, 6).double()]}, ValueError, "no batch reached any of the batch normal"),
        ({"model": nn.Sequential(nn.Linear(2, 2))}, ValueError, "Sequential has no batch normalization to calibrate"),
        (
            {"model": nn.BatchNorm2d(2, track_running_stats=False)},
            ValueError,
            "BatchNorm2d has no batch normalization with running statistics",
        ),
        ({"batch_size": 1}, ValueError, "'last' has 1 value per channel in a batch of 1 sample"),
        ({"call": lambda model, batch: None}, ValueError, "no batch reached any of .* 'first', 'stage.1', 'last'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    model = trained()
    before = snapshot(model)
    with pytest.raises(error, match=said):
        calibrate(**({"model": model, "loader": [data()], "batch_size": 2} | arguments))
    assert_same(before, snapshot(model))


def test_a_layer_object_with_its_own_forward_is_refused() -> None:
    model = trained()
    model.first.forward = model.first.forward
    with pytest.raises(TypeError, match="'first'"):
        calibrate(model, [data()], 2, "bn")
    assert "forward" in vars(model.first)
    assert model.last.training is False


def test_layers_that_were_not_reached_are_named_and_keep_their_statistics() -> None:
    model = trained()
    model.auxiliary = nn.BatchNorm2d(3).double()
    model.auxiliary.running_mean.fill_(5.0)
    with pytest.warns(WellcondWarning, match="no batch of 2 samples reached 'auxiliary', which keep"):
        calibrate(model, [data()], 2, "bn")
    assert model.auxiliary.running_mean.tolist() == [5.0] * 3
    assert int(model.auxiliary.num_batches_tracked) == 0
    with pytest.warns(WellcondWarning, match="auxiliary"):
        calibrate(model, [data()], 2)
    x = torch.randn(2, 3, 4, 4).double()
    assert_close(model.auxiliary.eval()(x), (x - 5) / (1 + 1e-5) ** 0.5)


# layers whose running statistics are not a batch's plain moments -----------------------------------------------------


@pytest.mark.parametrize("kind", ["iternorm", "dbn", "kn", "sn"])
def test_running_statistics_are_those_that_training_keeps(kind: str) -> None:
    """The average over batches of what each of them would put into a layer, at equal weights."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    model = wellcond.nn.convert_norm(nn.Sequential(*layers).double(), to=kind)
    if kind == "sn":
        wellcond.nn.convert_norm(model, to="sn", unbiased=True)
    for _ in range(3):
        model(torch.randn(8, 2, 9, 9, dtype=torch.float64))
    expected = copy.deepcopy(model)
    loader = [torch.randn(samples, 2, 9, 9, dtype=torch.float64) + 1 for samples in (8, 4, 9)]
    wellcond.calibrate(model.eval(), loader, batch_size=4, what="bn")

    for layer in (expected[1], expected[4]):
        layer.momentum = None
        layer.num_batches_tracked.zero_()
    with torch.no_grad():
        for batch in loader:
            for group in batch[: len(batch) // 4 * 4].split(4):
                expected.train()(group)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-10, atol=1e-10, msg=name)
    assert int(model[1].num_batches_tracked) == 5
