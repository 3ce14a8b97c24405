"""Powers of symmetric positive semi-definite matrices that are a low-rank part plus a flat tail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellcond.numerics.linalg import DampingMode, check_damping, damped_eigenvalues, try_eigh
from wellcond.numerics.symmetry import positive_or_one, symmetric


def nystrom(product: Tensor, basis: Tensor, trace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate M by ``U diag(s) Uᵀ + τ (I − U Uᵀ)``, from its product with a few directions.

    U and s are the eigenvectors and eigenvalues of the Nyström approximation Y (ΩᵀY)⁻¹ Yᵀ with Y = MΩ, made stable by
    a small shift (Tropp, Yurtsever, Udell and Cevher 2017, algorithm 3). It never exceeds M, and is M itself where the
    rank of M is at most r. τ spreads what is missing of the trace over the other directions.

    Args:
        product: M @ basis of symmetric positive semi-definite matrices M, shape (..., d, r), float32 or float64.
        basis: The directions Ω, orthonormal columns, shape (..., d, r).
        trace: Trace of M, shape (...).

    Returns:
        The eigenvectors U, shape (..., d, r), with orthonormal columns even where the rank of M is below r (``basis``
        itself if M is zero); the eigenvalues s, shape (..., r), descending and at least 0; the tail τ, shape (...), at
        least 0, and 0 if r = d.

    Raises:
        torch.linalg.LinAlgError: If the product is not finite or an eigendecomposition fails.

    Example:
        >>> matrix = torch.diag(torch.tensor([6.0, 1.0, 1.0]))
        >>> basis = torch.tensor([[1.0], [0.0], [0.0]])
        >>> _, eigenvalues, tail = nystrom(matrix @ basis, basis, matrix.diagonal().sum())
        >>> print(f"{eigenvalues.item():.4f} {tail.item():.4f}")
        6.0000 1.0000
    """
    size, rank = basis.shape[-2:]
    scale = positive_or_one(product.abs().amax((-2, -1)))
    scaled = product / scale[..., None, None]
    norm = torch.linalg.matrix_norm(scaled)
    # Above the rounding errors of ΩᵀY, so that a singular M leaves the shift itself, not noise.
    shift = (math.sqrt(size) * torch.finfo(product.dtype).eps * positive_or_one(norm))[..., None, None]
    shifted = scaled + shift * basis
    core = symmetric(basis.mT @ shifted)
    factor, failed = torch.linalg.cholesky_ex(core)
    half = torch.linalg.solve_triangular(factor.mT, shifted, upper=True, left=False)
    if bool(failed.any()):
        # M was not positive semi-definite. Directions in which it is not count as eigenvalue 0.
        values, vectors = torch.linalg.eigh(core)
        kept = (values > shift[..., 0] / 2).unsqueeze(-2)
        by_eigh = torch.where(
            kept,
            (shifted @ vectors) * values.clamp_min(shift[..., 0] / 2).rsqrt().unsqueeze(-2),
            (basis @ vectors) * shift.sqrt(),
        )
        half = torch.where((failed > 0)[..., None, None], by_eigh, half)
    # M + shift ≈ half halfᵀ. QR keeps the columns orthonormal, also those whose singular value is only the shift.
    orthonormal, triangular = torch.linalg.qr(half)
    values, vectors = torch.linalg.eigh(triangular @ triangular.mT)
    eigenvalues = (values.flip(-1) - shift[..., 0]).clamp_min(0) * scale[..., None]
    zero = (norm == 0)[..., None]
    eigenvectors = torch.where(zero.unsqueeze(-1), basis, orthonormal @ vectors.flip(-1))
    eigenvalues = torch.where(zero, 0.0, eigenvalues)
    missing = (trace - eigenvalues.sum(-1)).clamp_min(0)
    tail = missing / (size - rank) if size > rank else torch.zeros_like(missing)
    return eigenvectors, eigenvalues, tail


def low_rank_power(
    eigenvalues: Tensor,
    tail: Tensor,
    exponent: float,
    damping: float = 0.0,
    *,
    damping_mode: DampingMode = "relative",
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gains c and t of ``(M + δ I) ** exponent = U diag(c) Uᵀ + t (I − U Uᵀ)``.

    M = U diag(s) Uᵀ + τ (I − U Uᵀ), so that c = (s + δ)^exponent and t = (τ + δ)^exponent; δ as in `symmetric_power`,
    with λ_max the largest of s and τ. A zero M gives the identity, c = t = 1, unless damping is absolute.

    Args:
        eigenvalues: The eigenvalues s, shape (..., r).
        tail: The eigenvalue τ of all the other directions, shape (...).
        exponent: The power, for instance -1/2 or -1.
        damping: Non-negative; as for `symmetric_power`.
        damping_mode: ``"relative"``, ``"mean"`` or ``"absolute"``.
        size: The order of M, of which ``"mean"`` needs to know how often τ counts.

    Returns:
        The gains c, shape (..., r), and t, shape (...).

    Raises:
        ValueError: If the damping is outside its range, or ``size`` is missing.

    Example:
        >>> low_rank_power(torch.tensor([15.0, 3.0]), torch.tensor(0.0), -0.5, 1.0, damping_mode="absolute")
        (tensor([0.2500, 0.5000]), tensor(1.))
    """
    values = torch.cat([eigenvalues, tail.unsqueeze(-1)], -1)
    reference = None
    if damping_mode == "mean":
        if size is None:
            raise ValueError("damping_mode='mean' needs the size of the matrix, got None")
        reference = (eigenvalues.sum(-1) + (size - eigenvalues.shape[-1]) * tail).unsqueeze(-1) / size
    gains = damped_eigenvalues(values, damping, damping_mode, reference=reference).pow(exponent)
    return gains[..., :-1], gains[..., -1]


def try_truncated_power(
    matrix: Tensor, rank: int, exponent: float, damping: float = 0.0, *, damping_mode: DampingMode = "relative"
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `try_symmetric_power`, but by the leading eigenvectors: all other eigenvalues are replaced by their mean.

    Args:
        matrix: As for `symmetric_power`, shape (..., d, d).
        rank: How many eigenvectors are kept, below d.
        exponent: As for `symmetric_power`.
        damping: As for `symmetric_power`.
        damping_mode: As for `symmetric_power`.

    Returns:
        Eigenvectors U (..., d, rank) and the gains c (..., rank) and t (...) of U diag(c) Uᵀ + t (I − U Uᵀ); or None.

    Example:
        >>> directions, gains, tail = try_truncated_power(torch.diag(torch.tensor([0.25, 0.25, 4.0])), 1, -0.5)
        >>> gains, tail
        (tensor([0.5000]), tensor(2.))
    """
    found = try_eigh(matrix)
    if found is None:
        return None
    eigenvalues, eigenvectors = found
    tail = eigenvalues[..., :-rank].mean(dim=-1)
    gains, tail_gain = low_rank_power(
        eigenvalues[..., -rank:], tail, exponent, damping, damping_mode=damping_mode, size=matrix.shape[-1]
    )
    if not bool(torch.isfinite(gains).all() & torch.isfinite(tail_gain).all()):
        return None
    return eigenvectors[..., -rank:], gains, tail_gain


def try_low_rank_power(
    product: Tensor,
    basis: Tensor,
    trace: Tensor,
    exponent: float,
    damping: float = 0.0,
    *,
    damping_mode: DampingMode = "relative",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """As `nystrom` and `low_rank_power`, but a failure is retried in float64 and then answered with None.

    A result that is not finite counts as a failure too. If r = d there are no other directions, and the tail gain is
    the gain of the smallest eigenvalue.

    Args:
        product: As for `nystrom`.
        basis: As for `nystrom`.
        trace: As for `nystrom`.
        exponent: As for `low_rank_power`.
        damping: As for `low_rank_power`.
        damping_mode: As for `low_rank_power`.

    Returns:
        The eigenvectors, eigenvalues, tail, gains and tail gain, or None if neither precision gave finite ones.

    Example:
        >>> basis = torch.eye(2)[:, :1]
        >>> try_low_rank_power(torch.full((2, 1), float("nan")), basis, torch.tensor(1.0), -0.5, 1e-3) is None
        True
    """
    check_damping(damping, damping_mode)
    for dtype in (product.dtype, torch.float64):
        try:
            eigenvectors, eigenvalues, tail = nystrom(product.to(dtype), basis.to(dtype), trace.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        gains, tail_gain = low_rank_power(
            eigenvalues, tail, exponent, damping, damping_mode=damping_mode, size=basis.shape[-2]
        )
        if basis.shape[-2] == basis.shape[-1]:
            tail_gain = gains[..., -1]
        eigenvectors, eigenvalues, tail, gains, tail_gain = (
            part.to(product.dtype) for part in (eigenvectors, eigenvalues, tail, gains, tail_gain)
        )
        parts = (eigenvectors, eigenvalues, tail, gains, tail_gain)
        if all(bool(torch.isfinite(part).all()) for part in (trace, *parts)):
            return parts
    return None
