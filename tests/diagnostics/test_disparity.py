"""The disparity against 3.23, written out over instances and channels; and that the model stays as it is."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.calibration.models import calibrate
from wellcond.diagnostics import Disparity, disparity
from wellcond.nn import BSRBatchNorm1d, BSRBatchNorm2d, EvalNorm2d, MomentumBatchNorm2d
from wellcond.runtime.checks import WellcondWarning


def trained(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        norm(3),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(3, 4, 3, stride=2),
        norm(4),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5),
    ).double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0.0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.eval()


def data(samples: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 6, 6, generator=generator, dtype=torch.float64)
    offsets = torch.randn(samples, 2, 1, 1, generator=generator, dtype=torch.float64)
    return x * (1 + offsets.abs()) + 2 * offsets


def seen_in_training(model: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
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


Statistics = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def written_out(seen: list[Tensor], eps: float, statistics: Statistics) -> tuple[float, float]:
    """Return 3.23 with the 2-norm and with the RMS; `statistics` gives f_μ, f_σ of an instance's channel."""
    norms, rms = [], []
    for x in seen:
        for c in range(x.shape[1]):
            mean_b, var_b = x[:, c].mean(), x[:, c].var(correction=0)
            for x_s in x[:, c].reshape(len(x), -1):
                f_mean, f_var = statistics(x_s, c)
                difference = (x_s - mean_b) / (var_b + eps).sqrt() - (x_s - f_mean) / (f_var + eps).sqrt()
                norms.append(float(difference.norm()))
                rms.append(float(difference.square().mean().sqrt()))
    return sum(norms) / len(norms), sum(rms) / len(rms)


def constant(layer: Any) -> Statistics:
    return lambda x_s, c: (layer.running_mean[c], layer.running_var[c])


def mixed(layer: Any, alpha: Tensor, beta: Tensor, m: int | None = None) -> Statistics:
    """Return 3.6, with 3.7 if the rest of the batch has m − 1 instances; None: as many as the population."""

    def statistics(x_s: Tensor, c: int) -> tuple[Tensor, Tensor]:
        mean, var = layer.running_mean[c], layer.running_var[c]
        mean_s, var_s = x_s.mean(), x_s.var(correction=0)
        between = beta * (1 - beta) * (mean_s - mean) ** 2
        if m is not None:
            between = between - (1 - beta) ** 2 * var / (len(x_s) * (m - 1))
        return alpha * mean_s + (1 - alpha) * mean, beta * var_s + (1 - beta) * var + between

    return statistics


def regressed(layer: Any) -> Statistics:
    """Return 3.9."""

    def statistics(x_s: Tensor, c: int) -> tuple[Tensor, Tensor]:
        mean_s, var_s = x_s.mean(), x_s.var(correction=0)
        alpha, beta = layer.mean_weights[c], layer.var_weights[c]
        distance = (mean_s - layer.running_mean[c]) ** 2
        return alpha[0] * mean_s + alpha[1], beta[0] * var_s + beta[1] * distance + beta[2]

    return statistics


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, EvalNorm2d, BSRBatchNorm2d, MomentumBatchNorm2d])
def test_each_kind_equals_the_loop(m: int, norm: Callable[[int], nn.Module]) -> None:
    model, batches = trained(norm), list(data().split(m))
    if norm in (EvalNorm2d, BSRBatchNorm2d):
        what = "evalnorm" if norm is EvalNorm2d else "bsr"
        calibrate(model, [data(seed=4)], m, what, where=lambda name, module: isinstance(module, norm))
    inputs = seen_in_training(model, batches)
    found = disparity(model, [data(), data(m - 1, seed=7)], batch_size=m)
    assert found.batch_size == m
    assert list(found.layers) == ["1", "5", "8"]
    assert found.kinds[:2] == ("ema", "evalnorm_fixed")
    for name, seen in inputs.items():
        layer = model.get_submodule(name)
        share = torch.tensor(1 / m, dtype=torch.float64)
        expected: dict[str, Statistics] = {"ema": constant(layer), "evalnorm_fixed": mixed(layer, share, share, m)}
        if isinstance(layer, EvalNorm2d):
            expected["evalnorm"] = mixed(layer, layer.mean_mixture, layer.var_mixture)
        if isinstance(layer, BSRBatchNorm2d):
            expected["bsr"] = regressed(layer)
        own = found.layers[name]
        assert own.batches == len(seen)
        assert own.positions == seen[0][0, 0].numel()
        assert own.norm.keys() == own.rms.keys() == expected.keys()
        for kind, statistics in expected.items():
            norm_expected, rms_expected = written_out(seen, layer.eps, statistics)
            assert own.norm[kind] == close(norm_expected)
            assert own.rms[kind] == close(rms_expected)
    for kind in found.kinds:
        layers = [layer for layer in found.layers.values() if kind in layer.rms]
        assert found.mean[kind] == close(sum(layer.rms[kind] for layer in layers) / len(layers))
        assert found.mean_norm[kind] == close(sum(layer.norm[kind] for layer in layers) / len(layers))


def test_the_regression_fits_its_data_and_its_disparity_is_below_the_moving_averages() -> None:
    model, m = trained(), 2
    batches = list(data(200).split(m))
    calibrate(calibrate(model, batches, m, "bn"), batches, m, nonneg="nnls")
    found = disparity(model, batches)
    assert found.batch_size == m
    for layer in (found.layers["1"], found.layers["5"]):
        assert layer.rms["bsr"] < layer.rms["ema"]
    assert found.mean["bsr"] < found.mean["ema"]
    inputs = seen_in_training(model, batches)
    for name in ("1", "5", "8"):
        layer = model.get_submodule(name)
        assert isinstance(layer, (BSRBatchNorm1d, BSRBatchNorm2d))
        for c in range(layer.num_features):
            own = [x[:, c].reshape(len(x), -1) for x in inputs[name]]
            features = torch.cat([x.mean(1) for x in own]), torch.cat([x.var(1, correction=0) for x in own])
            targets = torch.stack([x.mean() for x in own]), torch.stack([x.var(correction=0) for x in own])
            predicted = layer.predict(*(feature[:, None].expand(-1, layer.num_features) for feature in features))
            for target, prediction in zip(targets, predicted, strict=True):
                target = target.repeat_interleave(m)
                residual = (prediction[:, c] - target).square().sum()
                # The best constant is one of the regression's choices; the weights are kept in float32 at least.
                assert residual <= (target - target.mean()).square().sum() * (1 + 1e-6)
            phi = torch.stack([features[0], torch.ones_like(features[0])], 1)
            exact = torch.linalg.lstsq(phi, targets[0].repeat_interleave(m)[:, None]).solution[:, 0]
            torch.testing.assert_close(layer.mean_weights[c].double(), exact, rtol=1e-5, atol=1e-6)


def test_batches_of_one_have_no_disparity_with_their_own_statistics() -> None:
    model = nn.Sequential(BSRBatchNorm2d(2)).double()
    calibrate(model, [data()], 1)
    found = disparity(model, [data()], batch_size=1)
    assert found.mean["evalnorm_fixed"] == pytest.approx(0.0, abs=1e-12)
    assert found.mean["bsr"] == pytest.approx(0.0, abs=1e-5)
    assert found.mean["ema"] > 0.1


class LoaderError(Exception):
    pass


def failing() -> Iterator[Tensor]:
    yield data()
    raise LoaderError


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BSRBatchNorm2d, EvalNorm2d, MomentumBatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_the_model_is_left_as_it_is_found(norm: Callable[[int], nn.Module], training: bool, raises: bool) -> None:
    model = trained(norm).train(training)
    model(data()).square().sum().backward()
    model[3].train(not training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    attributes = [{k: v for k, v in vars(module).items() if not isinstance(v, dict)} for module in model.modules()]
    random = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(data(), batch_size=8, shuffle=True)
    if raises:
        with pytest.raises(LoaderError):
            disparity(model, failing(), batch_size=2)
    else:
        disparity(model, loader, batch_size=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert [
        {k: v for k, v in vars(module).items() if not isinstance(v, dict)} for module in model.modules()
    ] == attributes
    assert all("forward" not in vars(module) for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_sizes_calls_and_wrappers() -> None:
    model = trained()
    expected = disparity(model, data().split(8), batch_size=8).to_dict()
    assert disparity(model, data().split(8)).to_dict() == expected
    assert disparity(model, [*data().split(8), data(5, seed=3)]).to_dict() == expected
    assert disparity(nn.DataParallel(model), [(x, 0) for x in data().split(8)]).to_dict() == expected

    def call(model: nn.Module, batch: Any) -> None:
        model(batch["image"])

    loader = [{"image": x} for x in data().split(8)]
    assert disparity(model, loader, batch_size=8, call=call).to_dict() == expected
    first = disparity(model, data().split(8), max_batches=1)
    assert first.layers["1"].batches == 1
    assert first.to_dict() == disparity(model, [data()[:8]]).to_dict()
    with pytest.raises(ValueError, match="batch_size must be given"):
        disparity(model, loader, call=call)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"max_batches": -1}, "max_batches must be a positive integer, got -1"),
        ({"loader": []}, "the loader gave no batch"),
        ({"batch_size": 25}, "no batch has batch_size=25 samples: the largest has 24"),
        ({"batch_size": 1}, "'8' has 1 value per channel"),
        ({"batch_size": 2, "call": lambda model, batch: None}, "no batch reached any of .* '1', '5', '8'"),
        ({"model": nn.Sequential(nn.GroupNorm(1, 2))}, "Sequential has no batch normalization to measure"),
        ({"model": nn.BatchNorm2d(2, track_running_stats=False)}, "BatchNorm2d has no .* with running statistics"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        disparity(**({"model": trained(), "loader": [data()]} | arguments))


def test_layers_that_were_not_reached_are_named_and_left_out() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.used(x))

    with pytest.warns(WellcondWarning, match="no batch of 4 samples reached 'unused'"):
        found = disparity(Part().double(), [data()], batch_size=4)
    assert list(found.layers) == ["used"]


@pytest.fixture
def found() -> Disparity:
    model = trained(BSRBatchNorm2d)
    calibrate(model, [data()], 2, where=lambda name, module: name != "8")
    return disparity(model, [data()], batch_size=2)


def test_the_table(found: Disparity) -> None:
    lines = str(found).splitlines()
    assert repr(found) == str(found)
    assert lines[0] == "Disparity of training and evaluation at batches of 2 (RMS over positions)"
    assert lines[1].split() == ["layer", "positions", "ema", "evalnorm_fixed", "bsr"]
    assert [line.split()[0] for line in lines[2:]] == ["1", "5", "8", "mean"]
    assert lines[2].split()[1] == "36"
    assert lines[4].split()[-1] == "-"
    assert lines[5].split()[1:] == [f"{found.mean[kind]:.4f}" for kind in found.kinds]
    with pytest.raises(AttributeError):
        found.batch_size = 3  # type: ignore[misc]


def test_the_dictionary_is_for_json(found: Disparity) -> None:
    read = json.loads(json.dumps(found.to_dict()))
    assert read == found.to_dict()
    assert read["layers"]["1"]["rms"]["bsr"] == found.layers["1"].rms["bsr"]
    assert read["mean"].keys() == read["mean_norm"].keys() == set(found.kinds)


def test_the_plot(found: Disparity, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = found.plot()
    assert [line.get_label().split()[0] for line in ax.lines] == list(found.kinds)
    assert ax.lines[0].get_ydata().tolist() == [layer.rms["ema"] for layer in found.layers.values()]
    assert len(ax.lines[2].get_ydata()) == 2
    assert found.plot(ax) is ax
    plt.close(ax.figure)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"Disparity\.plot needs matplotlib: pip install"):
        found.plot()
