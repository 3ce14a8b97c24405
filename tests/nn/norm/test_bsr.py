"""Batch Statistics Regression against the thesis's chapter 3."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor, nn

from pairs import parametrize_pairs
from wellcond.nn import BSRBatchNorm1d, BSRBatchNorm2d
from wellcond.numerics.moments import Moments, merge_unequal

FLOAT64 = torch.float64
ways = pytest.mark.parametrize("nonneg", ["clamp", "nnls"])


def batch(step: int, samples: int = 4, positions: int = 6, channels: int = 3, dtype: torch.dtype = FLOAT64) -> Tensor:
    """Instances that differ in mean and in spread."""
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=FLOAT64)

    spread = (0.5 * normal(samples, channels, 1)).exp()
    return (normal(samples, channels, positions) * spread + 1.5 * normal(samples, channels, 1) + 0.5).to(dtype)


class Reference:
    """Rows of features and targets of every instance, each batch with its weight; then numpy's least squares."""

    def __init__(self, momentum: float | None, group_size: int | None = None) -> None:
        self.momentum, self.group_size = momentum, group_size
        self.rows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.batches = 0
        self.mean: np.ndarray | float = 0.0

    def observe(self, x: Tensor) -> None:
        self.batches += 1
        step = 1 / self.batches if self.momentum is None else self.momentum
        groups = x.split(self.group_size or len(x))
        own = np.stack([group.mean((0, 2)).numpy() for group in groups])
        self.mean = (1 - step) * self.mean + step * own.mean(0)  # the population's, this batch among it
        for group, mean in zip(groups, own, strict=True):
            var = group.transpose(0, 1).flatten(1).var(1, correction=0).numpy()
            for instance in group:
                mu, sigma = instance.mean(1).numpy(), instance.var(1, correction=0).numpy()
                phi = np.stack([mu, np.ones_like(mu)], 1)
                psi = np.stack([sigma, (mu - self.mean) ** 2, np.ones_like(mu)], 1)
                self.rows.append((self.batches, phi, psi, mean, var))

    def solve(self, nonneg: str) -> tuple[np.ndarray, np.ndarray]:
        alphas, betas = [], []
        for c in range(len(self.rows[0][3])):
            if self.momentum is None:
                weights = np.ones(len(self.rows))
            else:
                weights = np.array(
                    [self.momentum * (1 - self.momentum) ** (self.batches - row[0]) for row in self.rows]
                )
            weights = np.sqrt(weights)
            phi = np.stack([row[1][c] for row in self.rows]) * weights[:, None]
            psi = np.stack([row[2][c] for row in self.rows]) * weights[:, None]
            alphas.append(np.linalg.lstsq(phi, [row[3][c] for row in self.rows] * weights, rcond=None)[0])
            targets = [row[4][c] for row in self.rows] * weights
            if nonneg == "nnls":
                betas.append(nnls(psi, targets)[0])
            else:
                betas.append(np.maximum(np.linalg.lstsq(psi, targets, rcond=None)[0], 0))
        return np.stack(alphas), np.stack(betas)


def close(actual: object, expected: object, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


# ------------------------------------------------------------------------------------------------------- the regression


@parametrize_pairs(
    ("momentum", [0.1, 0.5, None]),
    ("nonneg", ["clamp", "nnls"]),
    ("group_size", [None, 2]),
    ("exact", [True, False]),
)
def test_weights_are_those_of_weighted_least_squares(
    nonneg: str, momentum: float | None, group_size: int | None, exact: bool
) -> None:
    """The recursion 3.13 is the closed sum 3.12, its minimiser the weighted least squares (3.16–3.20)."""
    layer = BSRBatchNorm1d(3, momentum=momentum, nonneg=nonneg, group_size=group_size, exact=exact).double()
    reference = Reference(momentum, group_size)
    for step in range(12):
        layer.train()(batch(step))
        reference.observe(batch(step))
        if step in (3, 11):
            alpha, beta = reference.solve(nonneg)
            layer.eval()
            close(layer.mean_weights, torch.from_numpy(alpha))
            close(layer.var_weights, torch.from_numpy(beta))
    x = batch(99, samples=2)
    mu, sigma = x.mean(2), x.var(2, correction=0)
    alpha, beta = torch.from_numpy(alpha), torch.from_numpy(beta)
    f_mean = alpha[:, 0] * mu + alpha[:, 1]
    f_var = beta[:, 0] * sigma + beta[:, 1] * (mu - torch.as_tensor(reference.mean)) ** 2 + beta[:, 2]
    close(layer(x), (x - f_mean[..., None]) / (f_var[..., None] + layer.eps).sqrt())  # (3.21)


def test_sums_are_kept_in_double_precision() -> None:
    """Of float32 and half-precision modules, too; 18 numbers a channel."""
    layer = BSRBatchNorm1d(5).bfloat16()
    sums = [layer.mean_gram, layer.mean_target, layer.var_gram, layer.var_target]
    assert sum(part.numel() for part in sums) == 18 * 5
    assert all(part.dtype == FLOAT64 for part in sums)


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(2, 6), positions=st.integers(1, 5), seed=st.integers(0, 99))
def test_decomposition(samples: int, positions: int, seed: int) -> None:
    """(3.5): a batch's statistics from those of one instance and of the rest, α = β = 1/m."""
    x = batch(seed, samples, positions)
    share = 1 / samples
    mu, sigma = x[0].mean(1), x[0].var(1, correction=0)
    rest = x[1:].transpose(0, 1).flatten(1)
    mu_rest, sigma_rest = rest.mean(1), rest.var(1, correction=0)
    mean = share * mu + (1 - share) * mu_rest
    var = share * sigma + (1 - share) * sigma_rest + share * (1 - share) * (mu - mu_rest) ** 2
    parts = Moments(
        torch.stack([mu, mu_rest]),
        torch.stack([sigma, sigma_rest]),
        torch.tensor([[1.0], [samples - 1.0]], dtype=FLOAT64),
    )
    merged = merge_unequal(parts)
    close((merged.mean, merged.var), (mean, var), 1e-12)
    whole = x.transpose(0, 1).flatten(1)
    close((merged.mean, merged.var), (whole.mean(1), whole.var(1, correction=0)), 1e-12)


@ways
@pytest.mark.parametrize("way", ["batches of one", "groups of one"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_one_sample_is_instance_normalization(nonneg: str, way: str, dtype: torch.dtype) -> None:
    grouped = way == "groups of one"
    layer = BSRBatchNorm1d(3, nonneg=nonneg, group_size=1 if grouped else None).to(dtype)
    for step in range(12):
        layer(batch(step, samples=4 if grouped else 1, dtype=dtype))
    layer.eval()
    tolerance = 1e-8 if dtype == FLOAT64 else 2e-4
    close(layer.mean_weights, torch.tensor([[1.0, 0.0]] * 3), tolerance)
    close(layer.var_weights, torch.tensor([[1.0, 0.0, 0.0]] * 3), tolerance)
    x = batch(50, dtype=dtype)
    close(layer(x), F.instance_norm(x, eps=layer.eps), 10 * tolerance)


def test_constant_statistics_give_the_moving_average() -> None:
    """(3.22): where all instances have one mean and one variance, BSR's evaluation is the average over batches."""
    layer = BSRBatchNorm1d(1, momentum=0.25).double()
    pattern = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=FLOAT64)
    for _ in range(6):
        layer((2 + 3 * pattern).expand(4, 1, 4))
    layer.eval()
    close(layer.predict(torch.full((1, 1), 2.0).double(), torch.full((1, 1), 9.0).double())[0], torch.full((1, 1), 2.0))
    close(layer(torch.full((1, 1, 4), 5.0).double() * pattern), ((5 * pattern - 2) / 9**0.5).view(1, 1, 4), 1e-4)


@ways
def test_disparity_is_less_than_the_moving_average_has(nonneg: str) -> None:
    """(3.23) at m = 2, instances with means of their own: what BSR is for."""
    layer = BSRBatchNorm1d(3, nonneg=nonneg, affine=False, momentum=0.02).double()
    for step in range(300):
        layer(batch(step, samples=2))
    layer.eval()
    plain = nn.BatchNorm1d(3, affine=False).double().eval()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in plain.state_dict()})
    gaps = {"bsr": 0.0, "ema": 0.0}
    for step in range(1000, 1200):
        x = batch(step, samples=2)
        own = F.batch_norm(x, None, None, training=True)
        for name, model in (("bsr", layer), ("ema", plain)):
            gaps[name] += float((own - model(x)).flatten(2).norm(dim=2).mean())
    assert gaps["bsr"] < 0.85 * gaps["ema"]


# ------------------------------------------------------------------------------------------------------------- training


@parametrize_pairs(
    ("momentum", [0.1, 0.5, None]),
    ("dtype", [torch.float32, FLOAT64, torch.bfloat16]),
    ("memory", ["contiguous", "channels last"]),
    ("affine", [True, False]),
)
def test_training_is_batch_norm_bit_for_bit(
    momentum: float | None, memory: str, dtype: torch.dtype, affine: bool
) -> None:
    parameters = torch.float32 if dtype == torch.bfloat16 else dtype
    layer = BSRBatchNorm2d(5, momentum=momentum, affine=affine).to(parameters)
    plain = nn.BatchNorm2d(5, momentum=momentum, affine=affine).to(parameters)
    optimizers = [torch.optim.SGD([*m.parameters(), nn.Parameter(torch.ones(1))], lr=0.1) for m in (layer, plain)]
    for step in range(5):
        x = (torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(step)) * 2 + 1).to(dtype)
        if memory == "channels last":
            x = x.to(memory_format=torch.channels_last)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(first), plain(second)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
        y.sin().sum().backward()
        expected.sin().sum().backward()
        assert torch.equal(first.grad, second.grad)
        for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        for name, buffer in plain.named_buffers():
            assert torch.equal(getattr(layer, name), buffer), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_training_is_batch_norm_bit_for_bit_under_autocast() -> None:
    layer, plain = BSRBatchNorm2d(3), nn.BatchNorm2d(3)
    conv = nn.Conv2d(3, 3, 3)
    for step in range(3):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(conv(x)), plain(conv(x)))
        for name, buffer in plain.named_buffers():
            assert torch.equal(getattr(layer, name), buffer), name


# ----------------------------------------------------------------------------------------------------- degenerate cases


def evaluate_as_moving_average(layer: BSRBatchNorm1d, x: Tensor) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


@ways
def test_no_data(nonneg: str) -> None:
    layer = BSRBatchNorm1d(3, nonneg=nonneg).double().eval()
    close(layer(batch(0)), evaluate_as_moving_average(layer, batch(0)), 1e-12)


@ways
@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("positions", [1, 6])
def test_the_first_batch_alone(nonneg: str, samples: int, positions: int) -> None:
    """One target for all instances: the prediction is it."""
    if samples * positions == 1:
        pytest.skip("one value per channel")
    layer = BSRBatchNorm1d(3, nonneg=nonneg).double()
    x = batch(0, samples, positions)
    trained = layer(x)
    layer.eval()
    mean, var = layer.predict(x.mean(2), x.var(2, correction=0))
    whole = x.transpose(0, 1).flatten(1)
    close(mean, whole.mean(1).expand(samples, 3), 1e-6)
    close(var, whole.var(1, correction=0).expand(samples, 3), 1e-6)
    close(layer(x), trained, 1e-5)


@ways
@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_a_constant_channel_that_comes_alive(nonneg: str, value: float, dtype: torch.dtype) -> None:
    """A channel that was constant says nothing: evaluated by the average over batches, and the others as ever."""
    layer, other = (BSRBatchNorm1d(3, nonneg=nonneg).to(dtype) for _ in range(2))
    for step in range(30):
        x = batch(step, dtype=dtype)
        other(x)
        x[:, 1] = value
        layer(x)
    layer.eval()
    other.eval()
    x = batch(99, dtype=dtype)
    close(layer.mean_weights[1], torch.tensor([0.0, value], dtype=dtype), 1e-6)
    assert layer.var_weights[1, 0] == layer.var_weights[1, 1] == 0
    assert 0 <= layer.var_weights[1, 2] < 1e-6
    close(layer(x)[:, [0, 2]], other(x)[:, [0, 2]], 1e-5)
    rounding = abs(value) * torch.finfo(dtype).eps / layer.eps**0.5  # of the average, in units of √ε
    close(layer(torch.full_like(x, value))[:, 1], torch.zeros(4, 6, dtype=dtype), 1e-6 + 2 * rounding)
    assert layer(x).isfinite().all()


@ways
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("shape", ["two dimensions", "one position"])
def test_one_position_per_instance(nonneg: str, dtype: torch.dtype, shape: str) -> None:
    """σ²_s ≡ 0: the variance is regressed on (μ_s − μ)² alone."""
    layer = BSRBatchNorm1d(3, nonneg=nonneg, momentum=None).to(dtype)
    rows: list[tuple[float, float, float]] = []
    mean = 0.0
    for step in range(60):
        x = batch(step, positions=1, dtype=dtype)
        layer(x[..., 0] if shape == "two dimensions" else x)
        values = x[:, 0, 0].double()
        mean += (float(values.mean()) - mean) / (step + 1)
        rows += [((float(v) - mean) ** 2, float(values.mean()), float(values.var(correction=0))) for v in values]
    layer.eval()
    assert layer.var_weights[:, 0].tolist() == [0, 0, 0]
    table = np.array(rows)
    features = np.stack([table[:, 0], np.ones(len(table))], 1)
    expected = np.linalg.lstsq(features, table[:, 2], rcond=None)[0]
    assert (expected > 0).all()
    close(layer.var_weights[0, 1:].double(), torch.from_numpy(expected), 1e-8 if dtype == FLOAT64 else 1e-4)
    x = batch(99, samples=1, positions=1, dtype=dtype)
    assert layer(x).isfinite().all()


@ways
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_maps_that_are_constant(nonneg: str, dtype: torch.dtype) -> None:
    """Each instance is one number at all positions: evaluated as if it had one position."""
    layer, single = (BSRBatchNorm1d(3, nonneg=nonneg).to(dtype) for _ in range(2))
    for step in range(30):
        x = batch(step, positions=1, dtype=dtype)
        layer(x.expand(4, 3, 6))
        single(x[..., 0])
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(single, name))  # the unbiased variance differs
    x = batch(99, positions=1, dtype=dtype)
    tolerance = 1e-8 if dtype == FLOAT64 else 1e-4
    close(layer.eval()(x.expand(4, 3, 6)), single.eval()(x[..., 0])[..., None].expand(4, 3, 6), tolerance)


@ways
def test_equal_instances(nonneg: str) -> None:
    """All samples of a batch are one; batches differ: then μ_B = μ_s and σ²_B = σ²_s."""
    layer = BSRBatchNorm1d(3, nonneg=nonneg).double()
    for step in range(20):
        layer(batch(step, samples=1).expand(4, 3, 6))
    x = batch(99, samples=2)
    close(layer.eval()(x), F.instance_norm(x, eps=layer.eps), 1e-6)


@ways
def test_one_batch_again_and_again(nonneg: str) -> None:
    """As the thesis's instances, but all batches equal: the targets never change."""
    layer = BSRBatchNorm1d(3, nonneg=nonneg, affine=False).double()
    for _ in range(60):
        expected = layer(batch(0))
    close(layer.eval()(batch(0)), expected, 1e-5)


@ways
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_scale_of_the_features(nonneg: str, scale: float, dtype: torch.dtype) -> None:
    """The prediction scales with the features, whatever their unit."""
    layer, scaled = (BSRBatchNorm1d(3, nonneg=nonneg, eps=1e-30, momentum=None).to(dtype) for _ in range(2))
    for step in range(15):
        layer(batch(step, dtype=dtype))
        scaled(scale * batch(step, dtype=dtype))
    x = batch(99, dtype=dtype)
    close(scaled.eval()(scale * x), layer.eval()(x), 1e-7 if dtype == FLOAT64 else 1e-3)


@ways
@pytest.mark.parametrize("shift", [30.0, -1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_means_far_from_zero(nonneg: str, shift: float, dtype: torch.dtype) -> None:
    """The prediction moves with the features."""
    layer, shifted = (BSRBatchNorm1d(3, nonneg=nonneg, momentum=None).to(dtype) for _ in range(2))
    for step in range(15):
        layer(batch(step, dtype=dtype))
        shifted(batch(step, dtype=dtype) + shift)
    x = batch(99, dtype=dtype)
    rounding = abs(shift) * torch.finfo(dtype).eps
    close(shifted.eval()(x + shift), layer.eval()(x), 1e-6 + 50 * rounding)


@ways
def test_instances_far_apart(nonneg: str) -> None:
    """In float32, instance means of ±3000 with a spread of 1: σ²_s has to come out of x, not out of x²."""
    layer, exact = BSRBatchNorm2d(1, nonneg=nonneg, momentum=None), BSRBatchNorm2d(1, nonneg=nonneg, momentum=None)
    exact.double()
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        sides = torch.tensor([3000.0, -3000.0]).view(2, 1, 1, 1)
        scale = torch.rand(2, 1, 1, 1, generator=generator) + 0.5
        x = torch.randn(2, 1, 5, 5, generator=generator) * scale + sides
        layer(x)
        exact(x.double())
    layer.eval()
    exact.eval()
    mean, var = x.double().mean((2, 3)), x.double().var((2, 3), correction=0)
    close(layer.predict(mean.float(), var.float())[1].double(), exact.predict(mean, var)[1], 1e-3)
    instance = x[:1]
    own = instance.double().var(correction=0)
    exact.var_weights.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    layer.var_weights.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    for weights in (exact.mean_weights, layer.mean_weights):
        weights.copy_(torch.tensor([[1.0, 0.0]]))
    expected = (instance.double() - instance.double().mean()) / (own + exact.eps).sqrt()
    close(exact(instance.double()), expected, 1e-6)
    both = layer(x)[:1].double()  # next to an instance far away
    close(both, expected, 1e-2)


@ways
def test_not_a_number_in_one_batch_falls_back_in_its_channel(nonneg: str) -> None:
    layer = BSRBatchNorm1d(3, nonneg=nonneg).double()
    for step in range(4):
        x = batch(step)
        if step == 2:
            x[0, 1, 0] = torch.nan
        layer(x)
    layer.eval()
    y = layer(batch(9))
    assert y[:, [0, 2]].isfinite().all()
    assert layer.mean_weights[[0, 2]].isfinite().all()


# ---------------------------------------------------------------------------------------------------- when it is solved


def test_solved_on_the_change_to_evaluation_alone() -> None:
    layer = BSRBatchNorm1d(3).double()
    for step in range(6):
        layer(batch(step))
    layer.eval()
    solved = layer.var_weights.clone()
    assert (solved != 0).any()
    layer(batch(9))
    assert torch.equal(layer.var_weights, solved)
    layer.train()
    layer(batch(7))
    layer.eval()
    assert not torch.equal(layer.var_weights, solved)


@pytest.mark.parametrize("evaluating", [True, False])
def test_solved_after_loading(evaluating: bool) -> None:
    layer = BSRBatchNorm1d(3).double()
    for step in range(6):
        layer(batch(step))
    state = copy.deepcopy(layer.state_dict())
    expected = layer.eval()(batch(9))
    other = BSRBatchNorm1d(3).double().train(not evaluating)
    if evaluating:
        other(batch(50))  # solved for what it had
    other.load_state_dict(state)
    assert torch.equal(other.eval()(batch(9)), expected)


def test_evaluation_through_the_attribute() -> None:
    """Some set `training` by hand: what is evaluated is of now all the same."""
    layer = BSRBatchNorm1d(3).double()
    for step in range(6):
        layer(batch(step))
    twin = copy.deepcopy(layer).eval()
    layer.training = False
    assert torch.equal(layer(batch(9)), twin(batch(9)))


def test_bad_word() -> None:
    with pytest.raises(ValueError, match="nonneg must be 'clamp' or 'nnls', got 'relu'"):
        BSRBatchNorm1d(3, nonneg="relu")
