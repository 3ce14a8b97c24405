"""Inverse square roots by matrix products alone.

All three functions run the coupled Newton-Schulz iteration. `converged_inverse_root` stops where rounding does; the
other two run a fixed number of steps, differentiably, and differ in the scale and in which product they carry along:
each as the method that it belongs to defines it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellcond.numerics.symmetry import symmetric
from wellcond.runtime.checks import check_positive_integer

_NEWTON_SCHULZ_STEPS = 40


def converged_inverse_root(matrix: Tensor) -> Tensor:
    """Return M^(-1/2) of symmetric positive definite matrices by matrix products alone.

    The coupled Newton-Schulz iteration (Higham, Functions of Matrices, 6.35): Y₀ = A, Z₀ = I, then
    Y ← Y (3I − ZY)/2, Z ← (3I − ZY)/2 Z. It converges to A^(1/2) and A^(-1/2) for eigenvalues in (0, 1], which dividing
    by a norm of M that bounds λ_max makes sure of. Each matrix of a batch stops on its own.

    Raises:
        torch.linalg.LinAlgError: If a matrix of the batch does not converge.
    """
    size = matrix.shape[-1]
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    # Both norms bound λ_max; the Frobenius norm is at most the trace. Dividing first keeps its squares in range.
    bound = matrix.abs().sum(-1).amax(-1)[..., None, None]
    scaled = matrix / bound
    frobenius = torch.linalg.matrix_norm(scaled, keepdim=True).clamp_max(1)
    scaled, bound = scaled / frobenius, bound * frobenius

    root, inverse = scaled, identity.expand_as(scaled)
    best = torch.full_like(bound, math.inf)
    best_inverse = inverse
    running = torch.ones_like(bound, dtype=torch.bool)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        defect = identity - inverse @ root
        residual = torch.linalg.matrix_norm(defect, keepdim=True)
        improved = running & (residual < best)
        # Below 1/2 each step squares the residual, so one that does not even halve it meets rounding alone.
        stalled = (best < 0.5) & (residual > best / 2)
        best_inverse = torch.where(improved, inverse, best_inverse)
        best = torch.where(improved, residual, best)
        running = running & residual.isfinite() & ~stalled & (best > torch.finfo(matrix.dtype).eps ** 0.5)
        if not bool(running.any()):
            break
        step = identity + defect / 2
        root, inverse = root @ step, step @ inverse

    # The coupled residual may be small although Z has drifted from A^(-1/2): I − Z A Z tells, and one more step in it
    # takes the error from √eps to eps.
    defect = identity - best_inverse @ scaled @ best_inverse
    residual = torch.linalg.matrix_norm(defect)
    # 1e-2 in the mean over the directions, and none of them wrong altogether.
    if not bool((residual < min(1e-2 * math.sqrt(size), 0.5)).all()):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"the Newton-Schulz iteration did not converge: residual {float(residual.max()):.1e}"
        )
    result: Tensor = symmetric(best_inverse + best_inverse @ defect / 2) * bound.rsqrt()
    return result


def newton_whitening(covariance: Tensor, eps: float, steps: int) -> Tensor:
    """Return an approximation of (Σ + εI)^(−1/2) by Newton's iteration, which matrix products alone make (IterNorm).

    Σ_N = (Σ + εI)/tr(Σ + εI), P₀ = I, P ← (3P − P³Σ_N)/2, W = P/√tr(Σ + εI). Directions of large variance converge
    first; `steps` bounds how much small ones are magnified (at most 1.5^steps/√tr), as ε does in another way.

    Of as many products the coupled form, in which P²Σ_N is carried along, has the same iterates but does not magnify
    rounding, which makes the plain one diverge after about ten steps in float32: any number of steps converges.

    Args:
        covariance: Σ, symmetric, shape [..., d, d].
        eps: ε.
        steps: T, at least 1.

    Returns:
        Shape [..., d, d].

    Raises:
        ValueError: If steps is no positive integer.

    Source: Huang et al., "Iterative Normalization: Beyond Standardization towards Efficient Whitening", 2019.

    Example:
        >>> covariance = torch.diag(torch.tensor([1.0, 0.1, 0.01, 0.001]))
        >>> whitening = newton_whitening(covariance, 1e-5, steps=5)
        >>> (whitening @ covariance @ whitening).diagonal()  # the variances after it
        tensor([1.0000, 0.9915, 0.4011, 0.0505])
    """
    check_positive_integer("steps", steps)
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    damped = covariance + eps * identity
    trace = damped.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    residual = damped / trace  # P²Σ_N
    power = identity
    for step in range(steps):
        factor = 1.5 * identity - 0.5 * residual
        power = factor if step == 0 else power @ factor
        if step < steps - 1:
            residual = factor @ factor @ residual
    return power * trace.rsqrt()


def newton_schulz_root(matrix: Tensor, steps: int) -> Tensor:
    """Approximate M^(−1/2) by a fixed number of Newton-Schulz steps, differentiably.

    With A = M/‖M‖ (Frobenius): Y₀ = A, Z₀ = I, T = (3I − ZY)/2, Y ← YT, Z ← TZ; then M^(−1/2) ≈ Z/√‖M‖. A small
    eigenvalue a of A is raised to a·2.25^steps at most: stopped early, it whitens large directions and leaves small
    ones small.

    Args:
        matrix: Symmetric positive definite matrices, shape (..., d, d), float32 or wider.
        steps: How many steps, at least 1.

    Returns:
        Shape (..., d, d).

    Example:
        >>> matrix = torch.diag(torch.tensor([4.0, 1.0]))
        >>> torch.allclose(newton_schulz_root(matrix, 10), torch.diag(torch.tensor([0.5, 1.0])))
        True
    """
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    scaled = matrix / norm
    three = 3 * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # The first step multiplies by identities, and the last one needs no Y.
    inverse = (three - scaled) / 2
    root = scaled @ inverse
    for step in range(1, steps):
        factor = (three - inverse @ root) / 2
        inverse = factor @ inverse
        if step < steps - 1:
            root = root @ factor
    result: Tensor = inverse / norm.sqrt()
    return result
