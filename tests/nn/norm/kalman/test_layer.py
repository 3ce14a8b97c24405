"""Kalman Normalization: the filter, the layer with a given prediction, and what the authors' code gave."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.nn import GhostBatchNorm2d
from wellcond.nn.norm.kalman.graph import Filtered, Statistics, StatisticsGraph
from wellcond.nn.norm.kalman.layer import KalmanBatchNorm2d, filter_moments, propagate

FLOAT64 = torch.float64
GOLDEN = Path(__file__).parents[3] / "golden"
Numbers = dict[str, Tensor]


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def random(*shape: int, seed: int = 0, low: float | None = None) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)
    return values if low is None else values.abs() + low


def golden(name: str) -> tuple[Numbers, dict[str, object]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        numbers = {key: torch.from_numpy(file[key]) for key in file.files if key != "hyper"}
        return numbers, json.loads(str(file["hyper"]))


class Between:
    """A layer between two others, of which one hands on given statistics and the other reads what the layer says."""

    def __init__(self, layer: KalmanBatchNorm2d, features: int | None = None) -> None:
        channels = layer.num_features
        before, after = KalmanBatchNorm2d(features or channels), KalmanBatchNorm2d(channels, learned=False)
        layers = {"before": before, "layer": layer, "after": after}
        nodes = (Filtered("before"), Filtered("layer"))
        self.graph = StatisticsGraph(layers, nodes, {"layer": 0, "after": 1})
        layer.connect(self.graph, "layer", before.num_features if layer.learned else None)
        self.layer = layer

    def __call__(self, x: Tensor, sizes: tuple[int, ...], mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.graph.enter("before")
        self.graph.publish("before", Statistics(mean, var, sizes, tuple(x.shape[2:])))
        y = self.layer(x)
        statistics, _ = self.graph.predict("after", Statistics(mean, var, sizes, ()))
        return y, statistics.mean, statistics.var


# the filter ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.05, 0.1, 0.9])
def test_filter_by_the_formula(gain: float) -> None:
    z, c = random(3, 4), random(3, 4, seed=1, low=0.2)
    predicted_mean, predicted_var = random(3, 4, seed=2), random(3, 4, seed=3, low=0.2)
    mean, var = filter_moments(z, c, predicted_mean, predicted_var, gain)
    for s in range(3):
        for i in range(4):
            # A mixture of the prediction and of the observation, by its raw moments.
            first = (1 - gain) * predicted_mean[s, i] + gain * z[s, i]
            second = (1 - gain) * (predicted_var[s, i] + predicted_mean[s, i] ** 2) + gain * (c[s, i] + z[s, i] ** 2)
            close(mean[s, i], first)
            close(var[s, i], second - first**2)


def test_filter_is_differentiated_through_everything() -> None:
    arguments = [random(2, 3), random(2, 3, seed=1, low=0.5), random(2, 3, seed=2), random(2, 3, seed=3, low=0.5)]
    leaves = [argument.requires_grad_() for argument in arguments]
    assert torch.autograd.gradcheck(filter_moments, (*leaves, torch.tensor(0.3, dtype=FLOAT64, requires_grad=True)))


@pytest.mark.parametrize(("scale", "used"), [(99.0, True), (101.0, False), (math.inf, False)])
def test_implausible_predictions_are_left_out(scale: float, used: bool) -> None:
    """On average over all channels and micro-batches, as in the authors' code; gradients stay finite."""
    z, c = random(2, 3), torch.ones(2, 3, dtype=FLOAT64)
    c[0, 0] = 1 / 2  # the mean of 1/c is 7/6
    predicted = (torch.zeros(2, 3, dtype=FLOAT64), torch.full((2, 3), scale * 6 / 7, dtype=FLOAT64))
    z, c = z.requires_grad_(), c.requires_grad_()
    mean, var = filter_moments(z, c, *predicted, 0.1)
    if used:
        close(mean, 0.1 * z)
    else:
        close((mean, var), (z, c))
        gradients = torch.autograd.grad(mean.sum() + var.sum(), [z, c])
        close(gradients, (torch.ones_like(z), torch.ones_like(c)))


def test_observations_without_variance_are_left_as_they_are() -> None:
    z, c = torch.ones(2, 3), torch.zeros(2, 3)
    for predicted_var in (torch.zeros(2, 3), torch.ones(2, 3)):
        mean, var = filter_moments(z, c, torch.zeros(2, 3), predicted_var, 0.1)
        assert torch.equal(mean, z)
        assert torch.equal(var, c)


# what the authors' code gave ----------------------------------------------------------------------------------------


def nchw(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x.permute(0, 3, 1, 2)


def golden_layer(numbers: Numbers, hyper: dict[str, object]) -> KalmanBatchNorm2d:
    samples, splits = numbers["x_train"].shape[1], int(str(hyper["split_num"]))
    layer = KalmanBatchNorm2d(
        len(numbers["gamma"]), learned=False, gain=1 - float(str(hyper["p_rate"])), group_size=samples // splits
    )
    with torch.no_grad():
        layer.weight.copy_(numbers["gamma"])
        layer.bias.copy_(numbers["beta"])
    return layer


def check_evaluation(layer: KalmanBatchNorm2d, numbers: Numbers) -> None:
    """Theirs, with their running statistics, which begin at 0 and 1 and take in the first micro-batch's."""
    channels = layer.num_features
    mean, var = torch.zeros(channels), torch.ones(channels)
    for step in range(5):
        mean = 0.9 * mean + 0.1 * numbers["train_mean"][step, :channels]
        var = 0.9 * var + 0.1 * numbers["train_var"][step, :channels]
        close(numbers["buf_moving_mean"][step], mean, 1e-6)
        close(numbers["buf_moving_var"][step], var, 1e-6)
    layer.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
    close(layer.eval()(nchw(numbers["x_eval"])), nchw(numbers["eval_y"]), 2e-6)


def test_first_layer_as_the_authors() -> None:
    numbers, hyper = golden("kn_first_2d")
    layer = golden_layer(numbers, hyper)
    for step in range(5):
        x = nchw(numbers["x_train"][step]).requires_grad_()
        before = layer.running_mean.clone(), layer.running_var.clone()
        y = layer(x)
        close(y, nchw(numbers["train_y"][step]), 2e-6)
        # The returned variance is unbiased here; we average over micro-batches.
        close(layer.running_mean, 0.9 * before[0] + 0.1 * numbers["train_mean"][step].view(2, 3).mean(0), 1e-6)
        close(layer.running_var, 0.9 * before[1] + 0.1 * numbers["train_var"][step].view(2, 3).mean(0), 1e-6)
        if step == 0:
            leaves = [x, layer.weight, layer.bias]
            gradients = torch.autograd.grad(y, leaves, nchw(numbers["up"]))
            close(gradients[0], nchw(numbers["train0_dx"]), 4e-6)
            close(gradients[1:], (numbers["train0_dgamma"], numbers["train0_dbeta"]), 4e-6)
    check_evaluation(layer, numbers)


def test_filter_as_the_authors() -> None:
    numbers, hyper = golden("kn_pre_split2_p09")
    layer = golden_layer(numbers, hyper)
    network = Between(layer)
    sizes = (layer.group_size,) * 2
    for step in range(5):
        x = nchw(numbers["x_train"][step]).requires_grad_()
        prior = [numbers[key].clone().view(2, 3).requires_grad_() for key in ("pre_mean", "pre_var")]
        before = layer.running_mean.clone(), layer.running_var.clone()
        y, mean, var = network(x, sizes, *prior)
        close(y, nchw(numbers["train_y"][step]), 2e-6)
        close((mean.flatten(), var.flatten()), (numbers["train_mean"][step], numbers["train_var"][step]), 2e-6)
        elements = sizes[0] * 20
        close(layer.running_mean, 0.9 * before[0] + 0.1 * mean.mean(0), 1e-6)
        close(layer.running_var, 0.9 * before[1] + 0.1 * var.mean(0) * elements / (elements - 1), 1e-6)
        if step == 0:
            leaves = [x, layer.weight, layer.bias, *prior]
            gradients = torch.autograd.grad(y, leaves, nchw(numbers["up"]), retain_graph=True)
            keys = ("dgamma", "dbeta", "dpre_mean", "dpre_var")
            close(gradients[0], nchw(numbers["train0_dx"]), 4e-6)
            close([each.flatten() for each in gradients[1:]], [numbers[f"train0_{key}"] for key in keys], 1e-5)
            up = [numbers["up_mean"].view(2, 3), numbers["up_var"].view(2, 3)]
            gradients = torch.autograd.grad([mean, var], [x, *prior], up)
            close(gradients[0], nchw(numbers["train0_stats_dx"]), 2e-6)
            keys = ("dpre_mean", "dpre_var")
            close([each.flatten() for each in gradients[1:]], [numbers[f"train0_stats_{key}"] for key in keys], 2e-6)
    check_evaluation(layer, numbers)


@pytest.mark.parametrize("stride", [1, 2])
def test_transition_as_the_authors(stride: int) -> None:
    numbers, _ = golden("kn_transition")
    mean, var = numbers["m"].view(2, 3), numbers["v"].view(2, 3)
    height, width = numbers["noise"].shape[1:3]
    noise = numbers["noise"][0].permute(2, 0, 1).reshape(2, 3, height, width)
    weight = numbers["weight_hwio"].permute(3, 2, 0, 1)

    def transition(sample: Tensor) -> Tensor:
        # TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel of padding at the end.
        padding = [max((math.ceil(size / stride) - 1) * stride + 3 - size, 0) for size in (width, height)]
        sides = [side for total in padding for side in (total // 2, total - total // 2)]
        return F.conv2d(F.pad(sample.relu(), sides), weight, stride=stride)

    predicted_mean, predicted_var, positions = propagate(mean, var, noise, transition)
    close(predicted_mean.flatten(), numbers[f"mean_stride{stride}"], 2e-6)
    close(predicted_var.flatten(), numbers[f"var_stride{stride}"], 2e-6)
    assert positions == (math.ceil(height / stride), math.ceil(width / stride))


# the layer ----------------------------------------------------------------------------------------------------------


def randomized(layer: KalmanBatchNorm2d, seed: int = 5) -> KalmanBatchNorm2d:
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=seed + number) + 0.3)
    return layer.double()


def by_formula(layer: KalmanBatchNorm2d, x: Tensor, sizes: tuple[int, ...], before: tuple[Tensor, Tensor]) -> Tensor:
    """A learned layer's output, by loops over micro-batches and channels."""
    q = 1 / (1 + torch.exp(-layer.gain_logit))
    outputs = []
    for s, group in enumerate(x.split(sizes)):
        channels = []
        for i in range(layer.num_features):
            values = group[:, i]
            z = values.sum() / values.numel()
            c = ((values - z) ** 2).sum() / values.numel()
            mean, var = layer.transition_bias[i], torch.exp(layer.log_noise[i])
            for j in range(before[0].shape[1]):
                mean = mean + layer.transition[i, j] * before[0][s, j]
                var = var + layer.transition[i, j] ** 2 * before[1][s, j]
            off = z - mean
            mean, var = mean + q * off, var + q * (c - var) + (1 - q) * q * off**2
            channels.append(layer.weight[i] * (values - mean) / torch.sqrt(var + layer.eps) + layer.bias[i])
        outputs.append(torch.stack(channels, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 2, 3), (1, 1, 1), (4,)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_learned_layer_by_the_formula(sizes: tuple[int, ...], memory_format: torch.memory_format) -> None:
    layer = randomized(KalmanBatchNorm2d(3, predecessor_features=2, group_size=sizes[0]))
    network = Between(layer, features=2)
    before = random(len(sizes), 2, seed=1).requires_grad_(), random(len(sizes), 2, seed=2, low=0.3).requires_grad_()
    x = (2 * random(sum(sizes), 3, 4, 2, seed=3) + 1).to(memory_format=memory_format).requires_grad_()
    y, _, _ = network(x, sizes, *before)
    expected = by_formula(layer, x, sizes, before)
    close(y, expected)
    assert y.is_contiguous(memory_format=memory_format)
    leaves = [x, *before, *layer.parameters()]
    upstream = random(*y.shape, seed=4)
    ours, theirs = (torch.autograd.grad(output, leaves, upstream) for output in (y, expected))
    close(ours, theirs, 1e-9)
    assert all(gradient.abs().max() > 0 for gradient in ours)


@pytest.mark.parametrize("learned", [True, False])
def test_gradcheck(learned: bool) -> None:
    layer = KalmanBatchNorm2d(2, learned=learned, group_size=2, predecessor_features=2 if learned else None)
    network = Between(randomized(layer))
    before = random(2, 2, seed=1).requires_grad_(), random(2, 2, seed=2, low=0.5).requires_grad_()
    x = random(4, 2, 2, 1, seed=3).requires_grad_()
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, mean: Tensor, var: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return network(x, (2, 2), mean, var)

    assert torch.autograd.gradcheck(call, (x, *before, *parameters.values()))


def test_starts_at_a_small_variance_with_the_gain() -> None:
    layer = KalmanBatchNorm2d(3, predecessor_features=2, gain=0.25, affine=False)
    before = random(1, 2).float(), random(1, 2, low=0.3).float()
    x = random(4, 3, 2, 2, seed=1).float()
    _, mean, var = Between(layer, features=2)(x, (4,), *before)
    z, c = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    close(mean[0], 0.25 * z, 1e-6)
    close(var[0], 0.075 + 0.25 * c + 0.1875 * z**2, 1e-6)


def test_alone_it_is_ghost_batch_normalization() -> None:
    layer, ghost = KalmanBatchNorm2d(3, group_size=2).double(), GhostBatchNorm2d(3, 2).double()
    x, other = (random(6, 3, 2, 2).requires_grad_() for _ in range(2))
    y, expected = layer(x), ghost(other)
    close(y, expected)
    upstream = random(*y.shape, seed=1)
    close(torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, other, upstream), 1e-10)
    close((layer.running_mean, layer.running_var), (ghost.running_mean, ghost.running_var))
    assert set(layer.state_dict()) == set(ghost.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32(dtype: torch.dtype) -> None:
    layer = KalmanBatchNorm2d(3, predecessor_features=2, group_size=2)
    reference = copy.deepcopy(layer).double()
    network, other = Between(layer.to(dtype), 2), Between(reference, 2)
    before = random(2, 2, seed=1), random(2, 2, seed=2, low=0.3)
    x = (3 * random(4, 3, 5, 5)).to(dtype)
    y, mean, var = network(x, (2, 2), *(each.float() for each in before))
    expected = other(x.double(), (2, 2), *before)
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == layer.running_mean.dtype == torch.float32
    close((mean.double(), var.double()), expected[1:], 3e-3)  # the gain's logit is rounded
    close(y.double(), expected[0], 3e-2)
    assert layer.transition.dtype == dtype


def test_autocast_leaves_statistics_alone() -> None:
    layer = randomized(KalmanBatchNorm2d(3, predecessor_features=2, group_size=2)).float()
    network = Between(layer, 2)
    before = random(2, 2, seed=1).float(), random(2, 2, seed=2, low=0.3).float()
    x = random(4, 3, 5, 5).float()
    plain = network(x, (2, 2), *before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = network(x, (2, 2), *before)
    for ours, theirs in zip(under, plain, strict=True):
        assert ours.dtype == torch.float32
        close(ours, theirs, 1e-6)


def test_evaluation_is_batch_normalization() -> None:
    layer = randomized(KalmanBatchNorm2d(3, predecessor_features=2, group_size=2))
    network = Between(layer, 2)
    network(random(4, 3, 2, 2), (2, 2), random(2, 2), random(2, 2, low=0.1))
    x = random(5, 3, 4, 4, seed=9)
    layer.eval()
    y = layer(x)
    close(y, F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps))
    assert torch.equal(y, layer(x))
    close(layer(x[:1]), y[:1])


def test_running_statistics_average_micro_batches() -> None:
    layer = KalmanBatchNorm2d(3, learned=False, gain=0.3, group_size=2, momentum=None).double()
    network = Between(layer)
    means, variances = [], []
    for step in range(3):
        x = random(5, 3, 2, 2, seed=step)
        before = random(2, 3, seed=20 + step), random(2, 3, seed=30 + step, low=0.1)
        _, mean, var = network(x, (2, 3), *before)
        count = torch.tensor([[8.0], [12.0]], dtype=FLOAT64)
        means.append(mean.mean(0))
        variances.append((var * count / (count - 1)).mean(0))
    close((layer.running_mean, layer.running_var), (torch.stack(means).mean(0), torch.stack(variances).mean(0)))


def test_one_sample_needs_positions() -> None:
    layer = KalmanBatchNorm2d(3, group_size=1)
    assert layer(torch.randn(2, 3, 1, 2)).isfinite().all()
    with pytest.raises(ValueError, match=r"more than 1 value per channel .*group of 1 sample"):
        layer(torch.randn(2, 3, 1, 1))
    layer = KalmanBatchNorm2d(3, group_size=2)
    assert layer(torch.randn(4, 3, 1, 1)).isfinite().all()


def test_state_dict_round_trip() -> None:
    layer = randomized(KalmanBatchNorm2d(3, predecessor_features=2))
    names = {"transition", "transition_bias", "log_noise", "gain_logit"}
    assert names < set(layer.state_dict())
    other = KalmanBatchNorm2d(3, predecessor_features=2).double()
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    plain = nn.BatchNorm2d(3).double()
    plain.running_mean.normal_()
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.running_mean, plain.running_mean)
    assert torch.equal(other.transition, layer.transition)
    missing = {name: value for name, value in layer.state_dict().items() if name != "log_noise"}
    with pytest.raises(RuntimeError, match="log_noise"):
        other.load_state_dict(missing)


def test_copies_and_pickles_alone() -> None:
    layer = randomized(KalmanBatchNorm2d(3, predecessor_features=2, group_size=2))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert repr(other) == repr(layer)
        assert torch.equal(other.transition, layer.transition)
    file = io.BytesIO()
    torch.save(layer, file)


def test_reset() -> None:
    layer = randomized(KalmanBatchNorm2d(3, predecessor_features=2, gain=0.25))
    layer.reset_parameters()
    fresh = KalmanBatchNorm2d(3, predecessor_features=2, gain=0.25)
    for ours, theirs in zip(layer.parameters(), fresh.parameters(), strict=True):
        close(ours, theirs, 1e-7)


def test_repr() -> None:
    assert repr(KalmanBatchNorm2d(4, learned=False, group_size=2)) == (
        "KalmanBatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, group_size=2, learned=False, gain=0.1)"
    )
    assert "predecessor_features=3" in repr(KalmanBatchNorm2d(4, predecessor_features=3))


@pytest.mark.parametrize("gain", [0, 1, -0.1, math.nan, True, "0.5"])
def test_gain_is_checked(gain: object) -> None:
    with pytest.raises(ValueError, match="gain must lie between 0 and 1"):
        KalmanBatchNorm2d(3, gain=gain)


def test_predecessor_features_are_checked() -> None:
    with pytest.raises(ValueError, match="predecessor_features must be a positive integer, got 0"):
        KalmanBatchNorm2d(3, predecessor_features=0)
    with pytest.raises(ValueError, match="learned=False has none"):
        KalmanBatchNorm2d(3, learned=False, predecessor_features=2)


def test_training_without_predecessor_is_refused() -> None:
    layer = KalmanBatchNorm2d(3, predecessor_features=2)
    with pytest.raises(RuntimeError, match=r"call connect_kalman\(model\)"):
        layer(torch.randn(2, 3, 2, 2))
    assert layer.eval()(torch.randn(2, 3, 2, 2)).isfinite().all()


def test_other_micro_batches_are_refused() -> None:
    network = Between(KalmanBatchNorm2d(3, group_size=2, predecessor_features=3))
    with pytest.raises(RuntimeError, match=r"'before'.*\[2, 2\] samples, they had \[4\]"):
        network(torch.randn(4, 3, 2, 2), (4,), torch.zeros(1, 3), torch.ones(1, 3))


def test_predecessor_that_did_not_run_is_named() -> None:
    layer = KalmanBatchNorm2d(3, predecessor_features=3)
    network = Between(layer)
    with pytest.raises(
        RuntimeError, match=r"'layer' predicts its statistics from those of 'before', which has not run"
    ):
        layer(torch.randn(2, 3, 2, 2))
    # One that is normalized with its running statistics hands on those.
    network.graph.layers["before"].eval()
    assert layer(torch.randn(2, 3, 2, 2)).isfinite().all()


def test_empty_batch() -> None:
    layer = KalmanBatchNorm2d(3, predecessor_features=3)
    Between(layer)
    assert layer(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)
