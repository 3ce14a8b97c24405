"""Powers of symmetric positive semi-definite matrices, damped, with fallbacks for failed factorizations."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

DampingMode = Literal["relative", "absolute"]
Solver = Literal["auto", "eigh", "cholesky"]

DAMPING_MODES: tuple[str, ...] = get_args(DampingMode)
SOLVERS: tuple[str, ...] = get_args(Solver)


def symmetric_power(
    matrix: Tensor,
    exponent: float,
    damping: float = 0.0,
    *,
    damping_mode: DampingMode = "relative",
    solver: Solver = "auto",
) -> Tensor:
    """Return ``(matrix + δ I) ** exponent`` for symmetric positive semi-definite matrices.

    δ is ``damping * λ_max(matrix)`` when ``damping_mode="relative"`` (thesis 6.5: the condition number of the damped
    matrix is at most ``(1 + damping) / damping``), and ``damping`` itself when ``"absolute"`` (thesis 5.7). A zero
    matrix with relative damping gives the identity: it says nothing about the directions.

    Args:
        matrix: Symmetric matrices, shape (..., d, d), float32 or float64. Only the lower triangle is read.
        exponent: The power, for instance -1/2 or -1.
        damping: Non-negative; see above.
        damping_mode: ``"relative"`` or ``"absolute"``.
        solver: ``"eigh"`` for any power, ``"cholesky"`` for ``exponent=-1`` with absolute damping, ``"auto"``: Cholesky
            where it applies, otherwise eigh.

    Returns:
        The powers, shape (..., d, d), of the dtype of ``matrix``.

    Raises:
        ValueError: If the damping is outside its range, or the solver does not apply to the exponent and damping mode.
        torch.linalg.LinAlgError: If the factorization fails.

    Example:
        >>> symmetric_power(torch.diag(torch.tensor([4.0, 16.0])), -0.5)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    check_damping(damping, damping_mode)
    if choose_solver(exponent, damping_mode, solver) == "cholesky":
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * identity))
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    # Rounding makes the smallest eigenvalues of a singular matrix slightly negative.
    eigenvalues = eigenvalues.clamp_min(0)
    if damping_mode == "relative":
        largest = eigenvalues[..., -1:]
        eigenvalues = torch.where(largest > 0, eigenvalues + damping * largest, 1.0)
    else:
        eigenvalues = eigenvalues + damping
    power: Tensor = (eigenvectors * eigenvalues.pow(exponent).unsqueeze(-2)) @ eigenvectors.mT
    return power


def check_damping(damping: float, damping_mode: str) -> None:
    """Check a damping and its mode.

    Args:
        damping: Must be a finite number of at least 0.
        damping_mode: Must be one of ``DAMPING_MODES``.

    Raises:
        ValueError: Naming the argument and what it was.

    Example:
        >>> check_damping(-1.0, "relative")
        Traceback (most recent call last):
        ValueError: damping must be a finite number of at least 0, got -1.0
    """
    if not (isinstance(damping, (int, float)) and 0 <= damping < math.inf):
        raise ValueError(f"damping must be a finite number of at least 0, got {damping!r}")
    if damping_mode not in DAMPING_MODES:
        raise ValueError(f"damping_mode must be one of {', '.join(map(repr, DAMPING_MODES))}, got {damping_mode!r}")


def choose_solver(exponent: float, damping_mode: DampingMode, solver: Solver) -> Literal["eigh", "cholesky"]:
    """Resolve ``"auto"`` and check that the solver applies.

    Args:
        exponent: The power that is wanted.
        damping_mode: ``"relative"`` or ``"absolute"``.
        solver: One of ``SOLVERS``.

    Returns:
        The solver that `symmetric_power` will use.

    Raises:
        ValueError: If ``solver`` is unknown or does not apply.

    Example:
        >>> choose_solver(-1.0, "absolute", "auto"), choose_solver(-0.5, "relative", "auto")
        ('cholesky', 'eigh')
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
    # λ_max, which relative damping needs, costs an eigendecomposition: Cholesky would save nothing.
    cholesky_applies = exponent == -1 and damping_mode == "absolute"
    if solver == "cholesky" and not cholesky_applies:
        raise ValueError(
            "solver='cholesky' needs exponent -1 and damping_mode='absolute', "
            f"got exponent {exponent:g} and damping_mode={damping_mode!r}"
        )
    return "cholesky" if cholesky_applies and solver != "eigh" else "eigh"


def try_symmetric_power(
    matrix: Tensor,
    exponent: float,
    damping: float = 0.0,
    *,
    damping_mode: DampingMode = "relative",
    solver: Solver = "auto",
) -> Tensor | None:
    """As `symmetric_power`, but a failure is retried in float64 and then answered with None instead of an exception.

    A result that is not finite counts as a failure too.

    Args:
        matrix: As for `symmetric_power`.
        exponent: As for `symmetric_power`.
        damping: As for `symmetric_power`.
        damping_mode: As for `symmetric_power`.
        solver: As for `symmetric_power`.

    Returns:
        The power, or None if neither precision gave a finite one.

    Example:
        >>> try_symmetric_power(torch.full((2, 2), float("nan")), -0.5, 1e-3) is None
        True
    """
    for dtype in (matrix.dtype, torch.float64):
        try:
            power = symmetric_power(matrix.to(dtype), exponent, damping, damping_mode=damping_mode, solver=solver)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        power = power.to(matrix.dtype)
        if bool(torch.isfinite(power).all()):
            return power
    return None
