"""Momentum Batch Normalization against (2.9), (2.13), (2.14) and the noise that follows from them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond import theory
from wellcond.nn import MomentumBatchNorm1d, MomentumBatchNorm2d

FLOAT64 = torch.float64


def batches(count: int, shape: tuple[int, ...] = (6, 3, 4), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator, dtype=FLOAT64) + step for step in range(count)]


def layer(stat_momentum: float, **options: object) -> MomentumBatchNorm1d:
    made = MomentumBatchNorm1d(3, **options).double()
    made.stat_momentum = stat_momentum
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        made.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    return made


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.875])
@pytest.mark.parametrize("group_size", [None, 2, 4])
def test_the_recursion(share: float, group_size: int | None) -> None:
    """Normalized with λ·history + (1 − λ)·batch, which becomes the history: of ghost groups, the first one's."""
    norm = layer(share, group_size=group_size)
    mean, var = torch.zeros(3, dtype=FLOAT64), torch.ones(3, dtype=FLOAT64)
    running_mean, running_var = mean.clone(), var.clone()
    for x in batches(5):
        x.requires_grad_()
        chunks = {None: [x], 2: [x[:2], x[2:4], x[4:]], 4: [x]}[group_size]  # the remainder of 2 joins the group of 4
        outputs, histories, own_means, own_vars = [], [], [], []
        for chunk in chunks:
            count = chunk.numel() // 3
            own_mean = chunk.sum((0, 2)) / count
            own_var = ((chunk - own_mean[:, None]) ** 2).sum((0, 2)) / count
            new_mean, new_var = share * mean + (1 - share) * own_mean, share * var + (1 - share) * own_var
            x_hat = (chunk - new_mean[:, None]) / (new_var[:, None] + norm.eps).sqrt()
            outputs.append(x_hat * norm.weight[:, None] + norm.bias[:, None])
            histories.append((new_mean.detach(), new_var.detach()))
            own_means.append(own_mean.detach())
            own_vars.append(own_var.detach() * count / (count - 1))
        expected, y = torch.cat(outputs), norm(x)
        close(y, expected)
        upstream = torch.cos(torch.arange(72, dtype=FLOAT64)).view(6, 3, 4)
        tensors = [x, norm.weight, norm.bias]
        close(torch.autograd.grad(y, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), 1e-11)
        mean, var = histories[0]
        close((norm.train_mean, norm.train_var), (mean, var))
        decay = 0.85 ** (6 / 32)  # (2.13), of all samples that enter
        running_mean = decay * running_mean + (1 - decay) * sum(own_means) / len(chunks)
        running_var = decay * running_var + (1 - decay) * sum(own_vars) / len(chunks)
        close((norm.running_mean, norm.running_var), (running_mean, running_var))
        x_eval = x.detach()
        evaluated = copy.deepcopy(norm).eval()(x_eval)
        close(evaluated, F.batch_norm(x_eval, running_mean, running_var, norm.weight, norm.bias, eps=norm.eps))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_equation_2_14(share: float) -> None:
    """The printed backward, term by term; m counts all elements of the channel."""
    norm = layer(share)
    for x in batches(2, seed=1):
        norm(x)
    x = batches(1, seed=2)[0].requires_grad_()
    old_mean, old_var = norm.train_mean.clone(), norm.train_var.clone()
    y = norm(x)
    grad = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
    y.backward(grad)
    m = 6 * 4
    expected = torch.empty_like(x)
    with torch.no_grad():
        for c in range(3):
            own = x[:, c]
            mean_b, var_b = own.mean(), own.var(correction=0)
            mean, var = share * old_mean[c] + (1 - share) * mean_b, share * old_var[c] + (1 - share) * var_b + norm.eps
            d_hat = grad[:, c] * norm.weight[c]
            d_var = (d_hat * (own - mean)).sum() * -0.5 * var**-1.5 * (1 - share)
            d_mean = (d_hat * -(1 - share) / var.sqrt()).sum() + d_var * (-2 * (own - mean_b)).sum() / m
            expected[:, c] = d_hat / var.sqrt() + d_var * 2 * (own - mean_b) / m + d_mean / m
    close(x.grad, expected, 1e-11)


def test_frozen() -> None:
    """λ = 1: a BatchNorm in evaluation mode with the history, which stays; only what inference uses goes on."""
    norm = layer(0.0)
    for x in batches(3):
        norm(x)
    norm.stat_momentum = 1.0
    history = norm.train_mean.clone(), norm.train_var.clone()
    moved = norm.running_mean.clone()
    for x in batches(3, seed=5):
        x.requires_grad_()
        y, expected = norm(x), F.batch_norm(x, *history, norm.weight, norm.bias, eps=norm.eps)
        close(y, expected)
        close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x))
    close((norm.train_mean, norm.train_var), history, 0)
    assert not torch.equal(norm.running_mean, moved)


@pytest.mark.parametrize("samples", [2, 8, 32, 64])
def test_inference_decay(samples: int) -> None:
    """τ = τ₀^(m/m₀), m the samples; the mean of a constant is followed exactly."""
    norm = MomentumBatchNorm1d(1, base_batch_size=16, base_inference_decay=0.9).double()
    for step in range(1, 4):
        norm(torch.full((samples, 1, 5), 3.0, dtype=FLOAT64))
        decay = 0.9 ** (samples / 16)
        close(norm.running_mean, torch.tensor([3 * (1 - decay**step)], dtype=FLOAT64))
        close(norm.running_var, torch.tensor([decay**step], dtype=FLOAT64))


def test_thesis_value_of_the_decay() -> None:
    norm = MomentumBatchNorm2d(1).double()
    norm(torch.ones(2, 1, 3, 3, dtype=FLOAT64))
    assert round(1 - float(norm.running_mean), 2) == 0.99


def test_history_does_not_follow_the_dtype_of_the_module() -> None:
    norm = MomentumBatchNorm1d(3)
    norm.stat_momentum = 0.75
    x = (torch.randn(8, 3, 9) + 100).bfloat16()
    norm.bfloat16()(x)
    expected = 0.25 * x.double().mean((0, 2))
    close(norm.train_mean.double(), expected, 1e-6)
    assert norm.train_var.dtype == torch.float32
    assert norm.stat_momentum == 0.75


def test_plain_statistics_become_the_history() -> None:
    """A plain BatchNorm's state dict has no history: its running statistics stand in, not 0 and 1."""
    plain = nn.BatchNorm1d(3).double()
    for x in batches(20):
        plain(x)
    norm = MomentumBatchNorm1d(3).double()
    norm.stat_momentum = 1.0
    norm.load_state_dict(plain.state_dict())
    assert norm.stat_momentum == 1.0
    x = batches(1, seed=3)[0]
    close(norm(x), plain.eval()(x))


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_stat_momentum_is_checked(value: float) -> None:
    norm = MomentumBatchNorm1d(3)
    with pytest.raises(ValueError, match="stat_momentum"):
        norm.stat_momentum = value
    assert norm.stat_momentum == 0.0


@pytest.mark.parametrize(
    "options", [{"base_batch_size": 0}, {"base_batch_size": 2.5}, {"base_inference_decay": 1.0}], ids=str
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MomentumBatchNorm1d(3, **options)


def test_stat_momentum_reads_as_it_was_set() -> None:
    norm = MomentumBatchNorm1d(3)
    norm.stat_momentum = 0.6
    assert norm.stat_momentum == pytest.approx(0.6, abs=1e-7)
    norm.load_state_dict(copy.deepcopy(norm.state_dict()))
    assert norm.stat_momentum == pytest.approx(0.6, abs=1e-7)


def noise_of_the_statistics(samples: int, share: float, channels: int, steps: int) -> tuple[Tensor, Tensor]:
    """The statistics that a layer trains with after a transient; all channels see independent N(0, 1) batches."""
    torch.manual_seed(samples)
    norm = MomentumBatchNorm1d(channels, affine=False).double()
    norm.stat_momentum = share
    with torch.no_grad():
        for _ in range(steps):
            norm(torch.randn(samples, channels, dtype=FLOAT64))
    return norm.train_mean, norm.train_var


@pytest.mark.parametrize(("samples", "share"), [(2, 0.5), (4, 0.875), (8, 0.0), (16, 0.5)])
def test_noise_is_what_theory_says(samples: int, share: float) -> None:
    """Each channel is an independent experiment. λ^steps < 1e-11: nothing is left of the start."""
    channels = 40_000
    mean, var = noise_of_the_statistics(samples, share, channels, 1 if share == 0 else math.ceil(-25 / math.log(share)))
    m = samples
    shrink = (1 - share) / (1 + share)
    for values, center, variance in (
        (mean, 0.0, shrink / m),
        (var, (m - 1) / m, shrink * 2 * (m - 1) / m**2),
    ):
        deviation = (values - center) ** 2
        assert abs(float(values.mean()) - center) < 4 * math.sqrt(variance / channels)
        assert abs(float(deviation.mean()) - variance) < 4 * float(deviation.std()) / math.sqrt(channels)
    # The functions that users ask say the same.
    assert theory.batch_mean_noise(m, share).variance == pytest.approx(shrink / m)
    assert theory.batch_variance_noise(m, share).variance == pytest.approx(shrink * 2 * (m - 1) / m**2)
    # The thesis's variance (2.11) is larger by 1 + λ: this sample tells them apart.
    if share:
        assert abs(float((mean**2).mean()) - (1 - share) / m) > 4 * float((mean**2).std()) / math.sqrt(channels)


@pytest.mark.parametrize("target", ["thesis", "derived"])
def test_noise_at_the_schedules_end(target: str) -> None:
    """The derived end value gives the noise of m₀ samples; the thesis's that of 2m₀ − m."""
    m, base, channels = 4, 16, 40_000
    share = theory.noise_matching_momentum(m, base, target=target)
    mean, _ = noise_of_the_statistics(m, share, channels, math.ceil(-25 / math.log(share)))
    expected = 1 / base if target == "derived" else 1 / (2 * base - m)
    square = mean**2
    assert abs(float(square.mean()) - expected) < 4 * float(square.std()) / math.sqrt(channels)
