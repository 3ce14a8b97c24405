"""The noise of batch statistics against loops and scipy in float64, and the laws on features whose noise is known."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, ResNet

from wellcond.diagnostics.noise import BatchNoise, Histogram, batch_noise
from wellcond.nn import BSRBatchNorm2d, MomentumBatchNorm1d, MomentumBatchNorm2d
from wellcond.runtime.checks import WellcondWarning
from wellcond.theory import batch_mean_noise, batch_variance_noise


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def data(samples: int = 24, seed: int = 0) -> Tensor:
    return normal(samples, 2, 6, 6, seed=seed) + 2 * normal(samples, 2, 1, 1, seed=seed + 100) + 0.5


def plain(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Return a model whose only batch normalization sees the input itself."""
    return nn.Sequential(nn.Identity(), norm(2), nn.Flatten()).double()


def deep(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
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


# The figures ----------------------------------------------------------------------------------------------------------


def series(x: Tensor, m: int, momentum: float) -> tuple[np.ndarray, ...]:
    """Return, per channel, the noises of single batches, those of averages, and Var μ_B / σ²; written out."""
    per_channel = []
    for c in range(x.shape[1]):
        means = [float(batch[:, c].mean()) for batch in x.split(m)]
        variances = [float(batch[:, c].var(correction=0)) for batch in x.split(m)]
        count, mu = len(means), float(x[:, c].mean())
        between = sum((mean - mu) ** 2 for mean in means) / (count - 1)
        sigma2 = sum(variances) / count + between
        mean_average, var_average = mu, sum(variances) / count
        xi_mean, xi_var = [], []
        for mean, variance in zip(means, variances, strict=True):
            mean_average = momentum * mean_average + (1 - momentum) * mean
            var_average = momentum * var_average + (1 - momentum) * variance
            xi_mean.append((mu - mean_average) / math.sqrt(sigma2))
            xi_var.append(var_average / sigma2)
        per_channel.append((xi_mean, xi_var, between / sigma2, [v / sigma2 for v in variances]))
    return tuple(np.array(part) for part in zip(*per_channel, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("m", [2, 4])
def test_every_figure_equals_the_loop(m: int, momentum: float) -> None:
    x = data(40 * m)
    layer = batch_noise(plain(), x.split(5 * m), m, momentum=momentum).layers["1"]
    xi_mean, xi_var, shares, single = series(x, m, momentum)
    count = xi_mean.shape[1]
    kept = 1 if momentum == 0 else math.ceil(math.log(0.01) / math.log(momentum))
    xi_mean, xi_var = xi_mean[:, kept - 1 :], xi_var[:, kept - 1 :]
    big = 1 / shares.mean()
    assert (layer.batches, layer.channels, layer.elements, layer.momentum) == (40, 2, 36.0 * m, momentum)
    assert layer.effective == pytest.approx(big, rel=1e-9)
    assert layer.mean.found.mean == pytest.approx(xi_mean.mean(), abs=1e-12)
    # Deviations from the batches' own mean are too small by the variance of that.
    mean_variance = (np.square(xi_mean) + shares[:, None] / count).mean()
    var_variance = (
        np.square(xi_var - single.mean(1, keepdims=True)) + single.var(1, ddof=1, keepdims=True) / count
    ).mean()
    assert layer.mean.found.variance == pytest.approx(mean_variance, rel=1e-9)
    assert layer.variance.found == pytest.approx((xi_var.mean(), var_variance), rel=1e-9)
    averaging = (1 - momentum) / (1 + momentum)
    assert layer.mean.law == pytest.approx((0.0, averaging / big), rel=1e-9)
    assert layer.variance.law == pytest.approx(((big - 1) / big, averaging * 2 * (big - 1) / big**2), rel=1e-9)
    assert layer.freedom == pytest.approx(2 * xi_var.mean() ** 2 / var_variance, rel=1e-9)

    freedom = (big - 1) / averaging
    chi2 = stats.chi2(freedom, scale=(big - 1) / big / freedom)
    own = stats.chi2(layer.freedom, scale=layer.variance.found.mean / layer.freedom)
    law = stats.norm(0.0, math.sqrt(averaging / big))
    assert layer.mean.distance == pytest.approx(stats.kstest(xi_mean.ravel(), law.cdf).statistic, rel=1e-8)
    assert layer.variance.distance == pytest.approx(stats.kstest(xi_var.ravel(), chi2.cdf).statistic, rel=1e-8)
    assert layer.freedom_distance == pytest.approx(stats.kstest(xi_var.ravel(), own.cdf).statistic, rel=1e-8)
    for noise, values in ((layer.mean, xi_mean), (layer.variance, xi_var)):
        counts, _ = np.histogram(values, noise.histogram.edges)
        assert list(noise.histogram.counts) == counts.tolist()
        assert sum(noise.histogram.counts) + noise.histogram.outside == values.size
        assert noise.histogram.outside <= values.size // 10
    torch.testing.assert_close(layer.population_mean, x.mean((0, 2, 3)))
    if momentum == 0:
        # Then by construction the law has the mean variance and the variance mean that were found.
        assert layer.mean.found.variance == pytest.approx(layer.mean.law.variance, rel=1e-9)
        assert layer.variance.found.mean == pytest.approx(layer.variance.law.mean, rel=1e-9)


def test_the_predictions_are_the_theory() -> None:
    layer = batch_noise(plain(), [data(160)], 4, momentum=0.6).layers["1"]
    for formula in ("derived", "thesis"):
        assert layer.predicted_variance(formula, 4) == pytest.approx(batch_mean_noise(4, 0.6, formula=formula).variance)
        at_effective = batch_mean_noise(4, 0.6, formula=formula).variance * 4 / layer.effective
        assert layer.predicted_variance(formula) == pytest.approx(at_effective)
    assert layer.predicted_variance() == layer.mean.law.variance


def test_independent_normal_values_follow_the_laws_of_2_2() -> None:
    m = 8
    layer = batch_noise(nn.BatchNorm1d(16).double(), [normal(m * 2000, 16, seed=1)], m).layers[""]
    assert layer.elements == m
    # 32 000 batches of one channel: a standard error of M is M √(2/32000).
    assert layer.effective == pytest.approx(m, abs=4 * m * math.sqrt(2 / 32_000))
    assert layer.mean.distance < 1.63 / math.sqrt(32_000)
    assert layer.variance.distance < 1.63 / math.sqrt(32_000)
    assert layer.freedom_distance < 1.63 / math.sqrt(32_000)
    assert layer.freedom == pytest.approx(m - 1, rel=0.05)
    assert layer.variance.found == pytest.approx(tuple(batch_variance_noise(m)), rel=0.05)
    assert layer.population_var.mean() == pytest.approx(1.0, abs=0.01)


def test_heavy_tails_are_found_to_have_less_freedom() -> None:
    m = 8
    x = torch.empty(m * 2000, 16, dtype=torch.float64).exponential_(generator=seeded(2))
    layer = batch_noise(nn.BatchNorm1d(16).double(), [x], m).layers[""]
    assert layer.effective == pytest.approx(m, rel=0.04)
    exact = batch_variance_noise(m, kurtosis=9.0)
    assert layer.variance.found == pytest.approx(tuple(exact), rel=0.1)
    assert layer.freedom == pytest.approx(2 * exact.mean**2 / exact.variance, rel=0.1)
    assert layer.variance.distance > 10 * 1.63 / math.sqrt(32_000)
    assert layer.freedom_distance < 0.7 * layer.variance.distance


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_positions_that_are_alike_count_for_less(shared: float) -> None:
    """√s (the image's own) + √(1−s) (the position's): the variance of a batch mean is s/m + (1−s)/(m·H·W)."""
    m, positions, images = 4, 9, 8000
    own, rest = normal(images, 4, 1, seed=3), normal(images, 4, positions, seed=4)
    x = math.sqrt(shared) * own + math.sqrt(1 - shared) * rest
    expected = 1 / (shared / m + (1 - shared) / (m * positions))
    layer = batch_noise(nn.BatchNorm1d(4).double(), [x], m).layers[""]
    assert layer.elements == 36
    assert layer.effective == pytest.approx(expected, rel=4 * math.sqrt(2 / 8000))


def test_an_epoch_without_replacement_has_the_same_effective_size() -> None:
    """Few samples, all of them in a few large batches, again and again: the average of 1/M is 1/m."""
    x, m = normal(24, 1, seed=5), 8
    shares = []
    for epoch in range(600):
        order = torch.randperm(24, generator=seeded(epoch))
        shares.append(1 / batch_noise(nn.BatchNorm1d(1).double(), [x[order]], m).layers[""].effective)
    assert np.mean(shares) == pytest.approx(1 / m, abs=4 * np.std(shares) / math.sqrt(600))


def test_samples_that_are_alike_make_the_effective_size_less_than_m() -> None:
    x = (normal(2000, 1, seed=6)[:, None] + 0.5 * normal(2000, 8, 1, seed=7)).flatten(0, 1)
    in_order = batch_noise(nn.BatchNorm1d(1).double(), [x], 8).layers[""]
    shuffled = batch_noise(nn.BatchNorm1d(1).double(), [x[torch.randperm(len(x), generator=seeded(8))]], 8).layers[""]
    assert in_order.effective == pytest.approx(1.25 / (1 + 0.25 / 8), rel=0.1)
    assert shuffled.effective == pytest.approx(8, rel=0.15)


def test_behind_another_batch_normalization_the_mean_is_hardly_noisy_but_the_variance_is() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    found = batch_noise(model, [normal(16 * 500, 6, seed=9)], 16, where=lambda name, layer: name == "0")
    assert list(found.layers) == ["0"]
    assert found.layers["0"].effective == pytest.approx(16, rel=0.1)
    # A linear map of features whose batch mean is 0 has a batch mean without noise; the variance has some.
    with pytest.warns(WellcondWarning, match="'2' has no noise"):
        assert list(batch_noise(model, [normal(160, 6, seed=9)], 16).layers) == ["0"]
    model.insert(1, nn.Tanh())
    layer = batch_noise(model, [normal(16 * 500, 6, seed=9)], 16).layers["3"]
    assert layer.effective > 5 * 16
    assert layer.freedom < 2 * 16


# Momentum -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.5, 0.75, 0.9])
def test_averages_have_the_derived_noise_not_that_of_2_11(momentum: float) -> None:
    m, batches, channels = 4, 2000, 40
    x = normal(m * batches, channels, seed=10)
    layer = batch_noise(nn.BatchNorm1d(channels).double(), [x], m, momentum=momentum).layers[""]
    # Averages are correlated over about (1+λ²)/(1−λ²) batches (the variance of a variance of an AR(1) series).
    standard_error = math.sqrt(2 / (batches * channels) * (1 + momentum**2) / (1 - momentum**2))
    assert layer.mean.found.variance == pytest.approx(layer.predicted_variance("derived"), rel=4 * standard_error)
    assert layer.mean.found.variance < layer.predicted_variance("thesis") * (1 - 20 * standard_error)
    expected = batch_variance_noise(m, momentum).variance
    # The kurtosis of ξ_σ is 3 + 12/(m−1), which the averages share in part.
    assert layer.variance.found.variance == pytest.approx(expected, rel=4 * standard_error * math.sqrt(3))
    assert layer.mean.distance < 0.02
    assert layer.variance.distance < 0.05


def test_layers_with_momentum_are_measured_with_their_own() -> None:
    model = nn.Sequential(MomentumBatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4), nn.BatchNorm1d(4)).double()
    model[0].stat_momentum = 0.75
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = batch_noise(model, [normal(4 * 1000, 8, seed=11)], 4)
    assert [layer.momentum for layer in found.layers.values()] == [0.75, 0.0]
    layer = found.layers["0"]
    assert layer.mean.found.variance == pytest.approx(batch_mean_noise(4, 0.75).variance, rel=0.1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert "thesis" in str(found)
    explicit = batch_noise(model, [normal(4 * 1000, 8, seed=11)], 4, momentum=0.0)
    assert [layer.momentum for layer in explicit.layers.values()] == [0.0, 0.0]
    model[0].stat_momentum = 1.0
    with pytest.raises(ValueError, match="'0' has stat_momentum 1, .*: give a momentum"):
        batch_noise(model, [normal(400, 8, seed=11)], 4)


# The model and the loader ---------------------------------------------------------------------------------------------


class LoaderError(Exception):
    pass


def failing() -> Iterator[Tensor]:
    yield data()
    raise LoaderError


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BSRBatchNorm2d, MomentumBatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_the_model_is_left_as_it_is_found(norm: Callable[[int], nn.Module], training: bool, raises: bool) -> None:
    model = deep(norm).train(training)
    model(data()).square().sum().backward()
    model[3].train(not training)
    model[0].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda module, args, output: calls.append(output.requires_grad))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    attributes = [
        ({k: v for k, v in vars(module).items() if not isinstance(v, dict)}, list(module._forward_hooks))
        for module in model.modules()
    ]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    if raises:
        with pytest.raises(LoaderError):
            batch_noise(model, failing(), 2)
    else:
        batch_noise(model, torch.utils.data.DataLoader(data(), batch_size=8, shuffle=True), 2)
    assert calls
    assert torch.equal(torch.get_rng_state(), random)
    assert [
        ({k: v for k, v in vars(module).items() if not isinstance(v, dict)}, list(module._forward_hooks))
        for module in model.modules()
    ] == attributes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all("forward" not in vars(module) for module in model.modules())
    for name, value in [*model.state_dict().items(), *model.named_buffers()]:
        assert torch.equal(value, state[name] if name in state else buffers[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_sizes_calls_and_wrappers() -> None:
    model = deep()
    expected = batch_noise(model, data(48).split(8), 4).to_dict()
    assert batch_noise(model, [*data(48).split(8), data(3, seed=3)], 4).to_dict() == expected
    assert batch_noise(nn.DataParallel(model), [(x, 0) for x in data(48).split(8)], 4).to_dict() == expected

    def call(model: nn.Module, batch: Any) -> None:
        model(batch["image"])

    assert batch_noise(model, [{"image": x} for x in data(48).split(8)], 4, call=call).to_dict() == expected
    first = batch_noise(model, data(48).split(8), 4, max_batches=2)
    assert first.layers["1"].batches == 4
    assert first.to_dict() == batch_noise(model, [data(48)[:16]], 4).to_dict()


def test_constant_channels_are_left_out_and_so_are_layers_without_noise() -> None:
    x = data(48)
    x[:, 1] = 1e4 + 0.1
    layer = batch_noise(plain(), [x], 4).layers["1"]
    alone = batch_noise(nn.BatchNorm2d(1).double(), [x[:, :1]], 4).layers[""]
    assert layer.channels == 1
    assert layer.effective == pytest.approx(alone.effective, rel=1e-12)
    assert layer.population_mean.shape == (2,)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.still, self.unused = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.still(torch.zeros_like(x))

    with pytest.warns(WellcondWarning, match="no batch of 4 samples reached 'unused'; 'still' has no noise: features"):
        found = batch_noise(Two().double(), [data(48)], 4)
    assert list(found.layers) == ["used"]


def test_layers_without_running_statistics_are_measured() -> None:
    with_statistics = batch_noise(plain(), [data(48)], 4)
    without = batch_noise(plain(lambda c: nn.BatchNorm2d(c, track_running_stats=False)), [data(48)], 4)
    assert without.to_dict() == with_statistics.to_dict()


def test_shared_layers_and_half_precision() -> None:
    shared = nn.BatchNorm2d(2)
    found = batch_noise(nn.Sequential(shared, nn.ReLU(), nn.AvgPool2d(2), shared).double(), [data(48)], 4)
    assert list(found.layers) == ["0"]
    assert found.layers["0"].batches == 24
    assert found.layers["0"].elements == (4 * 36 + 4 * 9) / 2
    exact = batch_noise(plain(), [data(400)], 4).layers["1"]
    half = batch_noise(plain().bfloat16(), [data(400).bfloat16()], 4).layers["1"]
    assert half.population_var.dtype == torch.float64
    assert half.effective == pytest.approx(exact.effective, rel=0.02)


def test_a_residual_network() -> None:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    x = torch.randn(40, 3, 16, 16) + torch.randn(40, 3, 1, 1)
    found = batch_noise(model, x.split(20), 4)
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    assert list(found.layers) == names
    assert found.layers["bn1"].elements == 4 * 8 * 8
    assert found.layers["bn1"].effective < 4 * 8 * 8 / 4
    json.dumps(found.to_dict(), allow_nan=False)


def test_models_without_batch_normalization_are_told_what_they_have() -> None:
    timm = pytest.importorskip("timm")
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2
    )
    with pytest.raises(ValueError, match=r"VisionTransformer has no batch normalization.*: 3 LayerNorm$"):
        batch_noise(vit, [torch.randn(4, 3, 16, 16)], 2)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"TransformerEncoder has no batch normalization.*: 4 LayerNorm$"):
        batch_noise(encoder, [torch.randn(4, 3, 8)], 2)
    with pytest.raises(ValueError, match="its normalizations: 1 GroupNorm, 2 InstanceNorm1d$"):
        batch_noise(nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm1d(2), nn.InstanceNorm1d(2)), [], 2)
    with pytest.raises(ValueError, match="Linear has no batch normalization.*: none$"):
        batch_noise(nn.Linear(2, 1), [], 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"max_batches": -1}, "max_batches must be a positive integer, got -1"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\) or be None, got 1.0"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\) or be None, got -0.1"),
        ({"momentum": 0.9}, "'1' needs at least 44 batches of 2 samples, as it takes momentum 0.9 .*, got 12"),
        ({"loader": []}, "the loader gave no batch"),
        ({"batch_size": 25}, "no batch has batch_size=25 samples: the largest has 24"),
        ({"batch_size": 24}, "'1' needs at least 2 batches of 24 samples, got 1"),
        ({"batch_size": 1}, "'8' has 1 value per channel"),
        ({"call": lambda model, batch: None}, "no batch reached any of .* '1', '5', '8'"),
        ({"where": lambda name, layer: False}, "Sequential has no batch normalization that `where` selects"),
        ({"loader": [data() * torch.nan]}, "features that are not finite reached '1'"),
        ({"model": plain(), "loader": [data(2), data(2)]}, "there is no noise to measure in '1': features do not"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batch_noise(**({"model": deep(), "loader": [data()], "batch_size": 2} | arguments))


# The result -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def found() -> BatchNoise:
    return batch_noise(deep(), [data(120)], 2)


def test_the_table(found: BatchNoise) -> None:
    lines = str(found).splitlines()
    assert repr(found) == str(found)
    assert lines[0] == "Noise of the statistics of batches of 2, and its law at the effective size"
    assert "λ" not in lines[1]
    assert "thesis" not in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["1", "5", "8"]
    assert lines[2].split()[1:4] == ["72", f"{found.layers['1'].effective:.4g}", "60"]
    assert lines[2].split()[-1] == f"{found.layers['1'].freedom:.4g}"
    with pytest.raises(AttributeError):
        found.batch_size = 3  # type: ignore[misc]


def test_the_dictionary_is_for_json(found: BatchNoise) -> None:
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read == found.to_dict()
    assert read["batch_size"] == 2
    entry, layer = read["layers"]["1"], found.layers["1"]
    assert entry["mean"]["found"] == {"mean": layer.mean.found.mean, "variance": layer.mean.found.variance}
    assert sum(entry["variance"]["histogram"]["counts"]) + entry["variance"]["histogram"]["outside"] == 60 * 3
    assert entry["predicted_variance"]["batch_size"] == {"derived": 0.5, "thesis": 0.5}
    assert entry["predicted_variance"]["elements"]["thesis"] == 1 / 72


def test_a_histogram_is_a_density() -> None:
    histogram = Histogram((0.0, 2.0, 4.0), (1, 2), 1)
    assert histogram.density == (1 / 8, 2 / 8)


def test_the_plot(found: BatchNoise, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = found.plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any(label.startswith("mean: ") for label in labels)
    assert any(label.startswith("chi-square law") for label in labels)
    assert ax.get_title().startswith("1: ")
    assert found.plot(ax, layer="5", noise="mean") is ax
    plt.close(ax.figure)
    # The laws are densities: those of scipy.
    layer = found.layers["5"]
    ax = found.plot(layer="5", noise="variance")
    x, y = (np.asarray(values) for values in ax.lines[0].get_data())
    scale = layer.variance.law.mean / (layer.effective - 1)
    np.testing.assert_allclose(y, stats.chi2(layer.effective - 1, scale=scale).pdf(x), rtol=1e-8)
    plt.close(ax.figure)
    ax = found.plot(layer="5", noise="mean")
    x, y = (np.asarray(values) for values in ax.lines[0].get_data())
    np.testing.assert_allclose(y, stats.norm(0, layer.effective**-0.5).pdf(x), rtol=1e-8)
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="layer must be one of '1', '5', '8', got '2'"):
        found.plot(layer="2")
    with pytest.raises(ValueError, match="noise must be one of 'both', 'mean', 'variance', got 'none'"):
        found.plot(noise="none")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"BatchNoise\.plot needs matplotlib: pip install"):
        found.plot()
