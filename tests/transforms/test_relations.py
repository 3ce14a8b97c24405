"""What docs/how-it-relates.md calls equal, against the other methods' formulas in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent
from wellcond.numerics.linalg import symmetric_power

N, IN, OUT, DAMPING = 12, 5, 3, 0.3


def changed_gradient(transform: FeatureDescent) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a linear layer's input rows, its outputs' gradient, its weight, and what its gradient became."""
    torch.manual_seed(0)
    model = nn.Linear(IN, OUT, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wellcond.attach(optimizer, model, transform)
    x = torch.randn(N, IN, dtype=torch.float64)
    outputs = model(x)
    outputs.retain_grad()
    outputs.sin().mean().backward()
    optimizer.step()
    assert outputs.grad is not None
    assert model.weight.grad is not None
    return x, outputs.grad, model.weight.detach(), model.weight.grad


def test_foof_is_feature_descent_in_its_own_norm() -> None:
    x, deltas, _, changed = changed_gradient(FeatureDescent(damping=DAMPING, norm="none"))
    expected = deltas.T @ x @ torch.linalg.inv(x.T @ x / N + DAMPING * torch.eye(IN, dtype=torch.float64))
    torch.testing.assert_close(changed, expected)


def test_the_exact_solution_of_locoprops_local_problem_is_feature_descent_of_one_batch() -> None:
    """min_W ‖X Wᵀ − (X W₀ᵀ − γ N Δ)‖²/N + λ ‖W − W₀‖²: a ridge regression, solved here as one least-squares problem."""
    options: dict[str, Any] = {"stats_decay": 0.0, "stats_every": 1, "solve_every": 1}
    x, deltas, weight, changed = changed_gradient(FeatureDescent(damping=DAMPING, norm="none", **options))
    rate = 0.7
    targets = x @ weight.T - rate * N * deltas
    ridge = DAMPING**0.5 * torch.eye(IN, dtype=torch.float64)
    inputs = torch.cat([x / N**0.5, ridge])
    solution = torch.linalg.lstsq(inputs, torch.cat([targets / N**0.5, ridge @ weight.T])).solution.T
    torch.testing.assert_close(solution, weight - rate * changed)


def test_damping_by_the_mean_is_gptqs_percdamp() -> None:
    torch.manual_seed(0)
    x = torch.randn(N, IN, dtype=torch.float64)
    hessian = 2 * x.T @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    ours = symmetric_power(x.T @ x, -1.0, 0.01, damping_mode="mean")
    torch.testing.assert_close(ours / 2, torch.linalg.inv(damped))


def test_the_feature_regularizer_is_coupled_decay_at_another_rate() -> None:
    """Thesis 5.14, 5.15: min_W ‖X Wᵀ − (X W₀ᵀ − η N Δ)‖² + λ ‖X Wᵀ‖², with its factors 1/(1 + λ) and λ/η."""
    eta, strength = 0.7, 0.3
    torch.manual_seed(0)
    model = nn.Linear(IN, OUT, bias=False).double()
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=eta / (1 + strength), weight_decay=strength / eta)
    wellcond.attach(optimizer, model, FeatureDescent(damping=1e-13, norm="none"))
    x = torch.randn(N, IN, dtype=torch.float64)
    outputs = model(x)
    outputs.retain_grad()
    outputs.sin().mean().backward()
    optimizer.step()
    assert outputs.grad is not None
    targets = x @ start.T - eta * N * outputs.grad
    inputs = torch.cat([x, strength**0.5 * x])
    solution = torch.linalg.lstsq(inputs, torch.cat([targets, torch.zeros_like(targets)])).solution.T
    torch.testing.assert_close(model.weight.detach(), solution, rtol=1e-9, atol=1e-9)


def test_a_penalty_in_the_loss_is_decay_inside_the_preconditioner() -> None:
    """(G + λW) (M + εI)^(−p), in the norm of G + λW, and nothing is added behind it."""
    strength = 0.2
    for transform, exponent, damping_mode in (
        (wellcond.FeatureDescent(damping=DAMPING), -1.0, "absolute"),
        (wellcond.FeatureWhitening(damping=DAMPING), -0.5, "relative"),
    ):
        torch.manual_seed(0)
        model = nn.Linear(IN, OUT, bias=False).double()
        start = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wellcond.attach(optimizer, model, transform)
        x = torch.randn(N, IN, dtype=torch.float64)
        outputs = model(x)
        outputs.retain_grad()
        (outputs.sin().mean() + strength / 2 * model.weight.square().sum()).backward()
        optimizer.step()
        assert outputs.grad is not None
        whole = outputs.grad.T @ x + strength * start
        moment = x.T @ x / N
        values, vectors = torch.linalg.eigh(moment)
        added = DAMPING * (values[-1] if damping_mode == "relative" else 1.0)
        product = whole @ (vectors * (values + added) ** exponent) @ vectors.T
        torch.testing.assert_close(start - model.weight.detach(), product * whole.norm() / product.norm())
