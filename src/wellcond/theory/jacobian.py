"""The Jacobian of batch normalization: how a batch's gradient passes through a normalized channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellcond.theory.checks import check_within


def batch_norm_jacobian(features: Tensor, gamma: float = 1.0, eps: float = 0.0) -> Tensor:
    """Return J = γ/s (I − (h̃h̃ᵀ + 11ᵀ)/M), the Jacobian ∂ĥ/∂h of batch normalization over a batch of M values (slides).

    ĥ = γ h̃ + β with h̃ = (h − μ_B)/s and s = √(σ²_B + ε). J is symmetric. At ε = 0 it is γ/σ times the projection that
    takes the mean and the component along h̃ out of the gradient, so tr J = γ/σ (M − 2): all but two of M directions
    pass with one and the same factor. It is the slides' argument that batch normalization keeps the flow of information
    backward, as ĥᵀĥ = M(γ² + β²) says forward.

    Args:
        features: h, the values of one channel, shape (M,), or of several, shape (M, channels).
        gamma: γ, the layer's scale.
        eps: ε, added to the variance; the features must vary if it is 0.

    Returns:
        J, shape (M, M) or (channels, M, M), in the features' dtype.

    Raises:
        ValueError: If the features have another shape, fewer than two values or no variance.

    Example:
        >>> jacobian = batch_norm_jacobian(torch.tensor([1.0, 2.0, 4.0, 5.0]), gamma=0.5)
        >>> sigma = torch.tensor([1.0, 2.0, 4.0, 5.0]).std(correction=0)
        >>> torch.allclose(jacobian.trace(), 0.5 / sigma * (4 - 2))
        True
    """
    if features.dim() not in (1, 2) or len(features) < 2 or not features.is_floating_point():
        raise ValueError(
            "features must have shape (M,) or (M, channels) with at least two values, and a floating-point dtype, "
            f"got {tuple(features.shape)} of {features.dtype}"
        )
    check_within("gamma", gamma, -math.inf, math.inf)
    check_within("eps", eps, 0.0, math.inf)
    columns = features.unsqueeze(0) if features.dim() == 1 else features.mT
    centred = columns - columns.mean(1, keepdim=True)
    spread = (centred.square().mean(1, keepdim=True) + eps).sqrt()
    if not bool((spread > 0).all()):
        raise ValueError("features must vary within each channel, or eps must be positive")
    normalized = centred / spread
    count = columns.shape[1]
    eye = torch.eye(count, dtype=features.dtype, device=features.device)
    jacobian = gamma / spread.unsqueeze(2) * (eye - (normalized.unsqueeze(2) * normalized.unsqueeze(1) + 1) / count)
    return jacobian[0] if features.dim() == 1 else jacobian
