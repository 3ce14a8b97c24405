"""EvalNorm against (3.5)–(3.7) and the least squares that its mixtures are to find."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from wellcond.nn import EvalNorm1d, EvalNorm2d, convert_norm
from wellcond.nn.norm.evalnorm import mixed_moments

FLOAT64 = torch.float64


def batch(step: int, samples: int, positions: int = 8, channels: int = 4, own_means: float = 1.0) -> Tensor:
    """Independent instances; each has a mean of its own, of standard deviation `own_means`."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, channels, positions, generator=generator, dtype=FLOAT64)
    return x + own_means * torch.randn(samples, channels, 1, generator=generator, dtype=FLOAT64) + 2.0


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize(
    ("samples", "group_size", "m"), [(4, None, 4), (2, None, 2), (8, 2, 2), (6, 4, 6), (1, None, 1)]
)
def test_the_fixed_form(samples: int, group_size: int | None, m: int) -> None:
    """α = β = 1/m in (3.6) and (3.7), with the running statistics for the rest of the batch; m is the group's size.

    The rest has n = hw(m − 1) values: E σ²_rest = (n − 1)/n σ² and E μ²_rest = μ² + σ²/n.
    """
    layer = EvalNorm1d(4, learn=False, group_size=group_size).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    for step in range(3):
        layer(batch(step, samples))
    layer.eval()
    close((layer.mean_mixture, layer.var_mixture), (torch.tensor(1 / m), torch.tensor(1 / m)), 1e-7)
    x = batch(9, 5)
    expected = torch.empty_like(x)
    share = float(layer.mean_mixture)
    for s in range(5):
        for c in range(4):
            own = x[s, c]
            mu, sigma = own.mean(), own.var(correction=0)
            rest_mean, rest_var = layer.running_mean[c], layer.running_var[c]
            mean = share * mu + (1 - share) * rest_mean
            n = len(own) * (m - 1)
            between, inside = (mu - rest_mean) ** 2, rest_var
            if n:
                between, inside = between + rest_var / n, rest_var * (n - 1) / n
            var = share * sigma + (1 - share) * inside + share * (1 - share) * between
            expected[s, c] = (own - mean) / (var + layer.eps).sqrt() * layer.weight[c] + layer.bias[c]
    close(layer(x), expected.detach(), 1e-10)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("m", [2, 3, 8])
@pytest.mark.parametrize("offset", [0.0, 1.0, 2.0])
def test_the_fixed_form_is_what_batches_have_on_average(m: int, positions: int, offset: float) -> None:
    """(3.7) by drawing: one instance is held, the others are independent normal values, μ = 0.3 and σ² = 1.7."""
    generator = torch.Generator().manual_seed(m)
    draws = torch.randn(200_000, m, positions, generator=generator, dtype=FLOAT64) * 1.7**0.5 + 0.3
    held = 0.3 + offset + torch.linspace(-0.5, 0.5, positions, dtype=FLOAT64) * (positions > 1)
    draws[:, 0] = held
    drawn = draws.flatten(1)
    layer = EvalNorm1d(1, learn=False).double()
    layer(torch.zeros(m, 1, positions, dtype=FLOAT64))
    layer.running_mean.fill_(0.3)
    layer.running_var.fill_(1.7)
    own_mean, own_var = held.mean().reshape(1, 1), held.var(correction=0).reshape(1, 1)
    mean, var = layer.predict(own_mean, own_var, positions)
    assert float(mean) == pytest.approx(float(drawn.mean()), abs=0.01)
    assert float(var) == pytest.approx(float(drawn.var(1, correction=0).mean()), rel=0.01)
    # Without the finite rest it is off by (1 − β)²σ²/n.
    plain = float(mixed_moments((own_mean, own_var), (layer.running_mean, layer.running_var), (1 / m, 1 / m), None)[1])
    assert plain - float(var) == pytest.approx((1 - 1 / m) ** 2 * 1.7 / (positions * (m - 1)), rel=1e-6)


def test_mixing_is_exact_for_the_rest_of_the_batch() -> None:
    """(3.5): with the statistics of the other m − 1 instances in place of the running ones it is the batch's own."""
    x = batch(0, 5)
    layer = EvalNorm1d(4, affine=False).double()
    layer(x)
    layer.eval()
    rest = x[1:].transpose(0, 1).flatten(1)
    layer.running_mean.copy_(rest.mean(1))
    layer.running_var.copy_(rest.var(1, correction=0))
    layer.mean_mixture.fill_(0.2)
    layer.var_mixture.fill_(0.2)
    close(layer(x[:1]), F.batch_norm(x, None, None, training=True)[:1], 1e-6)


def least_squares(batches: list[Tensor], mean: Tensor, var: Tensor) -> tuple[float, float]:
    """The α and β of the smallest squared differences to the batches' statistics, in units of σ²."""
    instance_mean = torch.stack([x.mean(2) for x in batches])
    instance_var = torch.stack([x.var(2, correction=0) for x in batches])
    batch_mean = torch.stack([x.mean((0, 2)) for x in batches])[:, None]
    batch_var = torch.stack([x.transpose(0, 1).flatten(1).var(1, correction=0) for x in batches])[:, None]
    off = instance_mean - mean
    alpha = float((off * (batch_mean - mean) / var).sum() / (off**2 / var).sum())

    def loss(beta: float) -> float:
        predicted = beta * instance_var + (1 - beta) * var + beta * (1 - beta) * off**2
        return float((((predicted - batch_var) / var) ** 2).sum())

    return alpha, float(minimize_scalar(loss, bounds=(0, 1), method="bounded").x)


@pytest.mark.parametrize(
    ("m", "own_means", "group_size"),
    [(2, 1.0, False), (4, 1.0, False), (8, 1.0, False), (4, 0.3, False), (2, 1.0, True), (4, 0.3, True)],
)
def test_mixtures_converge_to_least_squares(m: int, own_means: float, group_size: bool) -> None:
    """On stationary data; for independent instances α is 1/m, as E[μ_B | μ_s] = μ + (μ_s − μ)/m."""
    samples = 3 * m if group_size else m
    layer = EvalNorm1d(4, momentum=None, group_size=m if group_size else None).double()
    batches = [batch(step, samples, own_means=own_means) for step in range(800)]
    for x in batches:
        layer(x)
    groups = [group for x in batches for group in x.split(m)]
    alpha, beta = least_squares(groups, layer.running_mean, layer.running_var)
    assert float(layer.mean_mixture) == pytest.approx(alpha, abs=0.01)
    assert float(layer.var_mixture) == pytest.approx(beta, abs=0.02)
    assert alpha == pytest.approx(1 / m, abs=0.05)


@pytest.mark.parametrize("mixture_lr", [0.02, 0.2])
def test_mixtures_at_a_constant_rate(mixture_lr: float) -> None:
    """They reach the neighbourhood of 1/m, and stay there."""
    layer = EvalNorm1d(16, mixture_lr=mixture_lr, momentum=0.05).double()
    tail = []
    for step in range(600):
        layer(batch(step, 4, channels=16))
        if step >= 300:
            tail.append(float(layer.mean_mixture))
    assert sum(tail) / len(tail) == pytest.approx(0.25, abs=0.03)
    assert all(0.05 < value < 0.5 for value in tail)


def test_mixtures_stay_between_running_and_own_statistics() -> None:
    """Also where single batches would push them beyond."""
    layer = EvalNorm1d(1, mixture_lr=1.0).double()
    for step in range(200):
        x = batch(step, 2, channels=1) * (10 if step % 7 == 0 else 1)
        layer(x)
        assert 0 <= float(layer.mean_mixture) <= 1
        assert 0 <= float(layer.var_mixture) <= 1


def test_untrained_mixtures_are_those_of_batch_norm() -> None:
    layer, plain = EvalNorm2d(3).eval(), nn.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4)
    close(layer(x), plain(x), 1e-6)


def test_learning_leaves_the_training_alone() -> None:
    """The auxiliary loss reaches neither the inputs nor γ and β; the mixtures are no parameters."""
    layer, plain = EvalNorm1d(4).double(), nn.BatchNorm1d(4).double()
    for step in range(5):
        x, other = batch(step, 4).requires_grad_(), batch(step, 4).requires_grad_()
        y, expected = layer(x), plain(other)
        close(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        close(x.grad, other.grad)
        close(layer.weight.grad, plain.weight.grad)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert float(layer.mean_mixture) > 0


def test_evaluation_at_two_instances_is_nearer_to_training() -> None:
    """(3.23) at m = 2: less disparity than with the running statistics alone."""
    layer, plain = EvalNorm1d(4, affine=False).double(), nn.BatchNorm1d(4, affine=False).double()
    for step in range(300):
        x = batch(step, 2)
        layer(x)
        plain(x)
    layer.eval()
    plain.eval()
    gaps = [0.0, 0.0]
    for step in range(1000, 1100):
        x = batch(step, 2)
        own = F.batch_norm(x, None, None, training=True)
        for index, model in enumerate((layer, plain)):
            gaps[index] += float((own - model(x)).flatten(2).norm(dim=2).mean())
    assert gaps[0] < 0.9 * gaps[1]


@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_constant_input_leaves_the_mixtures_finite(constant: float) -> None:
    layer = EvalNorm1d(2)
    for _ in range(5):
        layer(torch.full((4, 2, 3), constant))
    assert layer.mean_mixture.isfinite()
    assert layer.var_mixture.isfinite()
    assert layer.eval()(torch.full((4, 2, 3), constant)).isfinite().all()


@pytest.mark.parametrize("mixture_lr", [-0.1, 0.0, 2.0, float("nan")])
def test_rate_is_checked(mixture_lr: float) -> None:
    with pytest.raises(ValueError, match="mixture_lr"):
        EvalNorm1d(3, mixture_lr=mixture_lr)


@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_chosen_shares_are_example_weighing(mixture: float) -> None:
    """Summers and Dinneen weigh first and second moments: μ = αE[x] + (1−α)m, σ² = αE[x²] + (1−α)(v + m²) − μ²."""
    layer, plain = EvalNorm1d(4, mixture=mixture).double(), nn.BatchNorm1d(4).double()
    for step in range(3):
        close(layer(batch(step, 6)), plain(batch(step, 6)))  # training is batch normalization
    layer.eval()
    assert float(layer.mean_mixture) == float(layer.var_mixture) == pytest.approx(mixture)
    x, running = batch(9, 5), (plain.running_mean.view(1, 4, 1), plain.running_var.view(1, 4, 1))
    mean = mixture * x.mean(2, keepdim=True) + (1 - mixture) * running[0]
    square = mixture * x.square().mean(2, keepdim=True) + (1 - mixture) * (running[1] + running[0].square())
    close(layer(x), (x - mean) / (square - mean.square() + layer.eps).sqrt(), 1e-7)


def test_chosen_shares_are_for_trained_networks_too() -> None:
    plain = nn.BatchNorm1d(4)
    plain(batch(0, 6).float())
    (converted,) = convert_norm(nn.Sequential(plain), to="evalnorm", mixture=0.25).eval()
    assert float(converted.mean_mixture) == 0.25
    loaded = EvalNorm1d(4, mixture=0.25)
    loaded.load_state_dict(plain.state_dict())
    x = batch(1, 3).float()
    close(loaded.eval()(x), converted(x))
    converted.reset_running_stats()
    assert float(converted.var_mixture) == 0.25
    with pytest.raises(ValueError, match="mixture must lie between 0 and 1, got 2"):
        EvalNorm2d(3, mixture=2)
