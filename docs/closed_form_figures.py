"""Draws the noise of batch statistics at random, beside its closed forms as derived and as printed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellcond import theory


def closed_forms(folder: Path, draws: int = 2_000_000) -> dict[str, Any]:
    """Return the closed forms of the noise as printed, as derived, and as drawn; there is no picture of them."""
    generator = torch.Generator().manual_seed(0)
    m, x, momentum = 8, 1.0, 0.75

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    batches = normal(draws // m, m)
    mean, var = batches.mean(1), batches.var(1, unbiased=False)
    normalized = (x - mean) / var.sqrt()
    # Exponential averages of independent batches, as far back as they reach.
    powers = (1 - momentum) * momentum ** torch.arange(80, dtype=torch.float64)
    averages = normal(draws // 80, 80).mul_(1 / math.sqrt(m)) @ powers

    def row(drawn: Tensor, derived: float, thesis: float, *, square: bool) -> dict[str, float]:
        values = (drawn - drawn.mean()).square() if square else drawn
        return {
            "drawn": float(values.mean()),
            "error": float(values.std() / len(values) ** 0.5),
            "derived": derived,
            "thesis": thesis,
        }

    wide = normal(draws // 100, 100)
    rows = {
        "Var ξ_μ of BN (2.2), m = 8": row(mean, theory.batch_mean_noise(m).variance, 1 / m, square=True),
        "E ξ_σ of BN (2.2), m = 8": row(var, theory.batch_variance_noise(m).mean, (m - 1) / m, square=False),
        "Var ξ_σ of BN (2.2), m = 8": row(
            var, theory.batch_variance_noise(m).variance, 2 * (m - 1) / m**2, square=True
        ),
        "Var ξ_σ for large m (theorem 1), m = 100": row(
            wide.var(1, unbiased=False),
            theory.large_batch_variance_noise(100).variance,
            theory.large_batch_variance_noise(100, formula="thesis").variance,
            square=True,
        ),
        "E x̂ (2.4), m = 8, x̃ = 1": row(
            normalized,
            theory.normalized_mean(x, m),
            theory.normalized_mean(x, m, formula="thesis"),
            square=False,
        ),
        "Var x̂ (2.4), m = 8, x̃ = 1": row(
            normalized,
            theory.normalized_variance(x, m),
            theory.normalized_variance(x, m, formula="thesis"),
            square=True,
        ),
        "Var ξ_μ of MBN (2.11), m = 8, λ = 0.75": row(
            averages,
            theory.batch_mean_noise(m, momentum).variance,
            theory.batch_mean_noise(m, momentum, formula="thesis").variance,
            square=True,
        ),
        "Var σ_B/σ (slides), m = 100": row(
            wide.std(1, unbiased=False), theory.large_batch_deviation_noise(100).variance, 2 / 400, square=True
        ),
    }
    return rows | penalties(normal, draws // 20)


def penalties(normal: Callable[..., Tensor], draws: int, m: int = 32) -> dict[str, Any]:
    """Return the explicit regularizers of a small network, and what drawn noise adds to the loss where it is 0."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.tensor([[0.5, -1.0, 1.5, 0.8]], dtype=torch.float64)
    # Each element has the noise of a batch of its own.
    shift = normal(draws, 4) / math.sqrt(m)
    scale = normal(draws * 4, m).var(1, unbiased=False).view(draws, 4)
    log_mean, log_variance = theory.log_batch_variance_noise(m)
    with torch.no_grad():
        target = network(x)
        added = 0.5 * (network(x + shift) - target).square().sum(1)
        multiplied = 0.5 * (network(x / scale.sqrt()) - target).square().sum(1)
    formulas = {
        "R_add": theory.additive_noise_penalty(network, x, theory.batch_mean_noise(m).variance),
        "R_mul": theory.multiplicative_noise_penalty(network, x, log_variance + log_mean**2),
    }
    found = {}
    for (name, formula), drawn in zip(formulas.items(), (added, multiplied), strict=True):
        found[f"{name} of a network of 4-8-2 units, m = {m}"] = {
            "drawn": float(drawn.mean()),
            "error": float(drawn.std() / len(drawn) ** 0.5),
            "derived": float(formula.detach()),
            "thesis": None,
        }
    return found
