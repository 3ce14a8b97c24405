"""Closed forms for the noise in batch statistics: how large it is, how momentum tames it, what penalty it amounts to.

A channel of mean μ and variance σ² is normalized with the statistics of m of its elements, the biased variance
among them: m is the batch size, and N·H·W elements for images, as far as these are independent. Against the population
statistics the batch's own are off by

    ξ_μ = (μ − μ_B) / σ    and    ξ_σ = σ²_B / σ²        (thesis 2.2, which prints σ_B / σ: the square is meant),

so that x = μ + σ x̃ becomes x̂ = (x̃ + ξ_μ) / √ξ_σ (2.3). Where the thesis prints another formula than the one that
follows from these definitions, ``formula="derived"`` is ours and ``formula="thesis"`` is the printed one.
"""

from wellcond.theory.checks import FORMULAS as FORMULAS
from wellcond.theory.checks import Formula as Formula
from wellcond.theory.gamma import GammaDecay, gamma_decay_coefficient, gamma_decay_parts
from wellcond.theory.jacobian import batch_norm_jacobian
from wellcond.theory.momentum import inference_decay, noise_matching_momentum, stat_momentum
from wellcond.theory.noise import (
    Noise,
    batch_mean_noise,
    batch_variance_noise,
    large_batch_deviation_noise,
    large_batch_variance_noise,
    log_batch_variance_noise,
    normalized_mean,
    normalized_variance,
)
from wellcond.theory.penalties import (
    additive_noise_penalty,
    cross_entropy_noise_penalty,
    multiplicative_noise_penalty,
)
from wellcond.theory.residuals import Estimate, NoiseResiduals, noise_residuals

__all__ = [
    "Estimate",
    "GammaDecay",
    "Noise",
    "NoiseResiduals",
    "additive_noise_penalty",
    "batch_mean_noise",
    "batch_norm_jacobian",
    "batch_variance_noise",
    "cross_entropy_noise_penalty",
    "gamma_decay_coefficient",
    "gamma_decay_parts",
    "inference_decay",
    "large_batch_deviation_noise",
    "large_batch_variance_noise",
    "log_batch_variance_noise",
    "multiplicative_noise_penalty",
    "noise_matching_momentum",
    "noise_residuals",
    "normalized_mean",
    "normalized_variance",
    "stat_momentum",
]
