"""Differentiable inverse square roots by eigendecomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def zca(covariance: Tensor, eps: float) -> Tensor:
    """Return the symmetric (Σ + εI)^(−1/2), by eigendecomposition, differentiable any number of times.

    The gradient is exact and finite for repeated eigenvalues too, where that of `torch.linalg.eigh` is not: W is a
    smooth function of Σ although its eigenvectors are not. A matrix that is not finite gives NaN, as the variance of
    batch normalization does, not the error of `torch.linalg.eigh`.

    Args:
        covariance: Σ, symmetric, shape [..., d, d]; negative eigenvalues count as 0.
        eps: ε.

    Returns:
        Shape [..., d, d].

    Example:
        >>> zca(torch.diag(torch.tensor([3.0, 15.0])), eps=1.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    whitening: Tensor = _Zca.apply(covariance, eps)[0]
    return whitening


class _Zca(torch.autograd.Function):
    """`zca`, and what its backward needs."""

    @staticmethod
    def forward(covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return W, the eigenvectors U, and the roots √(λ + ε)."""
        finite, values, vectors = _eigh(covariance)
        roots = (values.clamp_min(0) + eps).sqrt()
        whitening = (vectors / roots.unsqueeze(-2)) @ vectors.mT
        return torch.where(finite, whitening, torch.nan), vectors, roots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep U and the roots; Σ and W for second derivatives."""
        whitening, vectors, roots = output
        ctx.mark_non_differentiable(vectors, roots)
        ctx.save_for_backward(inputs[0], whitening, vectors, roots)
        ctx.eps = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """Return U (K ∘ Uᵀ ∂L/∂W U) Uᵀ (Daleckii and Krein), K the divided differences of λ^(−1/2).

        (a^(−1/2) − b^(−1/2))/(a − b) = −1/(√a √b (√a + √b)), which holds for a = b too.
        """
        covariance, whitening, vectors, roots = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The same without eigenvectors, which have no derivative where eigenvalues are equal: with S = W⁻¹,
            # dW = −W dS W and S dS + dS S = dΣ.
            identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
            root = (covariance + ctx.eps * identity) @ whitening
            inner = whitening @ ((grad + grad.mT) / 2) @ whitening
            return -_Lyapunov.apply((root + root.mT) / 2, inner), None
        a, b = roots.unsqueeze(-1), roots.unsqueeze(-2)
        divided = -1.0 / (a * b * (a + b))
        inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
        return vectors @ (divided * inner) @ vectors.mT, None


class _Lyapunov(torch.autograd.Function):
    """X of S X + X S = Q, for symmetric positive definite S; differentiable any number of times."""

    @staticmethod
    def forward(root: Tensor, right: Tensor) -> Tensor:
        """Return X."""
        finite, values, vectors = _eigh(root)
        inner = (vectors.mT @ right @ vectors) / (values.unsqueeze(-1) + values.unsqueeze(-2))
        return torch.where(finite, vectors @ inner @ vectors.mT, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep S and X."""
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return −(Y Xᵀ + Xᵀ Y) for S and Y for Q, with S Y + Y S = g."""
        root, solution = ctx.saved_tensors
        back: Tensor = _Lyapunov.apply(root, grad)
        return -(back @ solution.mT + solution.mT @ back), back


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where symmetric matrices [..., d, d] are finite, and their eigenvalues and eigenvectors; else those of I.

    `torch.linalg.eigh` raises an error at what is not finite.
    """
    finite = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix, identity))
    return finite, values, vectors
