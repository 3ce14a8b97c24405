"""The polar factor of a matrix: its singular vectors, with all singular values set to 1, by matrix products alone."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Coefficients: TypeAlias = "tuple[float, float, float]"

# Muon's (Jordan et al., 2024): steep at zero, so that five steps bring every singular value to about 0.7 … 1.2.
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7


def newton_schulz_polar(matrix: Tensor, steps: int = 5, coefficients: Coefficients = QUINTIC) -> Tensor:
    """Return about U Vᵀ of matrices U Σ Vᵀ: with X₀ = M/‖M‖, X ← aX + b(XXᵀ)X + c(XXᵀ)²X.

    Each step takes the singular values by σ ← aσ + bσ³ + cσ⁵. The default does not converge: it leaves them near 1, in
    few steps. (15/8, −5/4, 3/8) converges to 1, slowly where σ is small.

    Args:
        matrix: Shape (..., m, n), of any precision: the products are in it. A norm below 1e-7 counts as that.
        steps: How many.
        coefficients: a, b, c.

    Returns:
        Of the shape and dtype of ``matrix``; zero for a zero matrix.

    Example:
        >>> matrix = torch.tensor([[0.0, 2.0], [-3.0, 0.0]])
        >>> newton_schulz_polar(matrix, 12, (1.875, -1.25, 0.375)).round(decimals=3)
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    root = matrix.mT if tall else matrix
    root = root / torch.linalg.vector_norm(root, dim=(-2, -1), keepdim=True).clamp_min(_SMALLEST_NORM)
    batch = root.shape[:-2]
    root = root.reshape(-1, *root.shape[-2:])
    if len(root) == 1:
        # Not as a batch of one, whose kernel rounds otherwise: torch.optim.Muon's numbers, bit for bit.
        root = root[0]
    for _ in range(steps):
        gram = root @ root.mT
        if root.dim() == 2:
            root = torch.addmm(root, torch.addmm(gram, gram, gram, beta=b, alpha=c), root, beta=a)
        else:
            root = torch.baddbmm(root, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), root, beta=a)
    root = root.reshape(*batch, *root.shape[-2:])
    return root.mT if tall else root
