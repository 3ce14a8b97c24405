"""Powers of symmetric positive semi-definite matrices, damped, with fallbacks for failed factorizations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond.numerics.newton_schulz import converged_inverse_root
from wellcond.numerics.symmetry import positive_or_one, symmetric, symmetric_from_lower
from wellcond.runtime.checks import check_choice

DampingMode = Literal["relative", "mean", "absolute"]
Solver = Literal["auto", "eigh", "newton_schulz", "cholesky"]

DAMPING_MODES: tuple[str, ...] = get_args(DampingMode)
SOLVERS: tuple[str, ...] = get_args(Solver)

# From this width on, "auto" prefers matrix products to eigh on a GPU.
_WIDE = 1024
_KRYLOV_SIZE = 48
# So many squares lose less than the rounding of a few of them, in float32.
_ADDED_IN_A_ROW = 1 << 18
# Rows of at least this length are added fast.
_ROW = 256


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
    matrix is at most ``(1 + damping) / damping``), ``damping`` times the mean eigenvalue, trace/d, when ``"mean"``, and
    ``damping`` itself when ``"absolute"`` (thesis 5.7). A zero matrix gives the identity unless damping is absolute: it
    says nothing about the directions.

    Args:
        matrix: Symmetric matrices, shape (..., d, d), float32 or float64. Only the lower triangle is read.
        exponent: The power, for instance -1/2 or -1.
        damping: Non-negative; see above.
        damping_mode: ``"relative"``, ``"mean"`` or ``"absolute"``.
        solver: ``"eigh"`` for any power, ``"newton_schulz"`` for -1/2 and -1, ``"cholesky"`` for -1, or ``"auto"``:
            see `choose_solver`. Newton-Schulz and Cholesky take the λ_max of relative damping from
            `largest_eigenvalue`.

    Returns:
        The powers, shape (..., d, d), of the dtype of ``matrix``.

    Raises:
        ValueError: If the damping is outside its range, or the solver does not apply to the exponent.
        torch.linalg.LinAlgError: If the factorization fails or the iteration does not converge.

    Example:
        >>> symmetric_power(torch.diag(torch.tensor([4.0, 16.0])), -0.5)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    check_damping(damping, damping_mode)
    chosen = choose_solver(exponent, damping_mode, solver, device_type=matrix.device.type, width=matrix.shape[-1])
    if chosen == "cholesky":
        return torch.cholesky_inverse(torch.linalg.cholesky(_damped(matrix, damping, damping_mode)))
    if chosen == "newton_schulz":
        root = converged_inverse_root(symmetric_from_lower(_damped(matrix, damping, damping_mode)))
        # The square is a little closer to M⁻¹ than what the inverse iteration X ← X (2I − MX) reaches in float32.
        return symmetric(root @ root) if exponent == -1 else root
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    # Rounding makes the smallest eigenvalues of a singular matrix slightly negative.
    eigenvalues = damped_eigenvalues(eigenvalues.clamp_min(0), damping, damping_mode)
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
    check_choice("damping_mode", damping_mode, DAMPING_MODES)


def choose_solver(
    exponent: float, damping_mode: DampingMode, solver: Solver, *, device_type: str = "cpu", width: int = 0
) -> Literal["eigh", "newton_schulz", "cholesky"]:
    """Resolve ``"auto"`` and check that the solver applies.

    ``"auto"`` is Cholesky for the exponent -1 with absolute damping, Newton-Schulz for the exponent -1/2 of matrices of
    width 1024 and more on a GPU, where eigh is slow, and eigh otherwise.

    Args:
        exponent: The power that is wanted.
        damping_mode: ``"relative"``, ``"mean"`` or ``"absolute"``.
        solver: One of ``SOLVERS``.
        device_type: Type of the device of the matrix.
        width: Number of its rows.

    Returns:
        The solver that `symmetric_power` will use.

    Raises:
        ValueError: If ``solver`` is unknown or does not apply.

    Example:
        >>> choose_solver(-1.0, "absolute", "auto"), choose_solver(-0.5, "relative", "auto")
        ('cholesky', 'eigh')
        >>> choose_solver(-0.5, "relative", "auto", device_type="cuda", width=4096)
        'newton_schulz'
    """
    check_choice("solver", solver, SOLVERS)
    if solver == "cholesky" and exponent != -1:
        raise ValueError(f"solver='cholesky' needs exponent -1, got exponent {exponent:g}")
    if solver == "newton_schulz" and exponent not in (-0.5, -1):
        raise ValueError(f"solver='newton_schulz' needs exponent -0.5 or -1, got exponent {exponent:g}")
    if solver != "auto":
        return solver
    if exponent == -1 and damping_mode == "absolute":
        return "cholesky"
    if exponent == -0.5 and device_type != "cpu" and width >= _WIDE:
        return "newton_schulz"
    return "eigh"


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Return a close lower bound of the largest eigenvalue of symmetric positive semi-definite matrices.

    It is the largest Rayleigh quotient over span(b, Mb, M²b, …) (Lanczos; Golub and Van Loan, Matrix Computations,
    10.1): the span of all the iterates of a power iteration, hence never further from λ_max than the power iteration
    itself, and much closer where the leading eigenvalues lie close together. b has entries cos(i²): fixed, and
    orthogonal to no leading eigenvector that occurs in practice.

    Args:
        matrix: Symmetric matrices, shape (..., d, d), float32 or float64. Only the lower triangle is read.

    Returns:
        The largest eigenvalues, shape (...), at least 0.

    Raises:
        torch.linalg.LinAlgError: If the matrix is not finite.

    Example:
        >>> largest_eigenvalue(torch.tensor([[5.0, 4.0], [4.0, 5.0]]))
        tensor(9.)
    """
    matrix = symmetric_from_lower(matrix)
    scale = positive_or_one(matrix.abs().sum(-1).amax(-1))
    scaled = matrix / scale[..., None, None]
    size = matrix.shape[-1]
    start = torch.arange(size, dtype=matrix.dtype, device=matrix.device).square().cos()
    vector = (start / start.norm()).expand(matrix.shape[:-1]).unsqueeze(-1)
    vectors, products = [vector], [scaled @ vector]
    for _ in range(min(size, _KRYLOV_SIZE) - 1):
        known = torch.cat(vectors, -1)
        vector = products[-1]
        # Once the space holds no more directions only rounding is left; a zero vector adds nothing.
        negligible = 100 * torch.finfo(matrix.dtype).eps * torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        for _ in range(2):  # "twice is enough" for orthogonality (Parlett, The Symmetric Eigenvalue Problem, 6.9)
            vector = vector - known @ (known.mT @ vector)
        norm = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vector = torch.where(norm > negligible, vector / norm, 0.0)
        vectors.append(vector)
        products.append(scaled @ vector)
    quotients = torch.cat(vectors, -1).mT @ torch.cat(products, -1)
    largest: Tensor = torch.linalg.eigvalsh(quotients)[..., -1].clamp_min(0) * scale
    return largest


def frobenius_norm(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the root of the sum of squares, with many millions of numbers too.

    On CPUs torch adds the squares one after another: of 13 million in float32, what comes last is lost, up to a
    hundredth of the norm. So there the norms of rows are added, of tensors that are large enough for it to matter.

    Args:
        tensor: Of any shape.
        dtype: In which squares are added; None for the tensor's.

    Returns:
        A scalar.

    Example:
        >>> frobenius_norm(torch.full((4, 4), 2.0))
        tensor(8.)
    """
    if tensor.numel() > _ADDED_IN_A_ROW and tensor.device.type == "cpu" and tensor.dim() > 1:
        tensor = torch.linalg.vector_norm(_in_rows(tensor), dim=-1, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def frobenius_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return `frobenius_norm` of each of several tensors on one device, in few calls.

    Args:
        tensors: Of any shapes.
        dtype: In which squares are added.

    Returns:
        A scalar a tensor.

    Example:
        >>> frobenius_norms([torch.ones(4), torch.full((2, 2), 2.0)], torch.float32)
        [tensor(2.), tensor(4.)]
    """
    elsewhere = bool(tensors) and tensors[0].device.type != "cpu"
    in_a_row = [elsewhere or tensor.numel() <= _ADDED_IN_A_ROW for tensor in tensors]
    chosen = [tensor for tensor, fits in zip(tensors, in_a_row, strict=True) if fits]
    together = iter(torch._foreach_norm(chosen, 2, dtype) if chosen else ())
    return [
        next(together) if fits else frobenius_norm(tensor, dtype)
        for tensor, fits in zip(tensors, in_a_row, strict=True)
    ]


def _in_rows(tensor: Tensor) -> Tensor:
    """View a tensor's numbers, in any order, in rows that are long and lie in memory in one piece, where they do."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
    rows = tensor.permute(order)
    axis = rows.dim() - 1
    while axis > 1 and rows.shape[axis:].numel() < _ROW:
        axis -= 1
    return rows.flatten(axis) if rows.is_contiguous() else rows


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


def damped_eigenvalues(
    eigenvalues: Tensor, damping: float, damping_mode: DampingMode, *, reference: Tensor | None = None
) -> Tensor:
    """Add δ to the eigenvalues of a matrix, as `symmetric_power` does; those of a zero matrix become 1 if relative.

    Args:
        eigenvalues: All of a matrix's eigenvalues in any order, shape (..., n).
        damping: Non-negative.
        damping_mode: ``"relative"`` to the largest of them, to their ``"mean"``, or ``"absolute"``.
        reference: What δ is relative to, where ``eigenvalues`` are not all there are of the matrix; of a shape that
            broadcasts to theirs.

    Returns:
        Shape (..., n).

    Raises:
        ValueError: If the damping is outside its range.

    Example:
        >>> damped_eigenvalues(torch.tensor([2.0, 0.0]), 0.5, "relative")
        tensor([3., 1.])
        >>> damped_eigenvalues(torch.tensor([2.0, 0.0]), 0.5, "mean")
        tensor([2.5000, 0.5000])
    """
    check_damping(damping, damping_mode)
    if damping_mode == "absolute":
        return eigenvalues + damping
    if reference is None:
        relative = damping_mode == "relative"
        reference = eigenvalues.amax(-1, keepdim=True) if relative else eigenvalues.mean(-1, keepdim=True)
    return torch.where(reference > 0, eigenvalues + damping * reference, 1.0)


def try_eigh(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the eigenvalues, ascending and at least 0, and eigenvectors of positive semi-definite matrices.

    A failure is retried in float64 and then answered with None.

    Args:
        matrix: Symmetric, shape (..., d, d).

    Returns:
        Eigenvalues (..., d) and eigenvectors (..., d, d), of the dtype of ``matrix``, or None.

    Example:
        >>> try_eigh(torch.eye(2))[0]
        tensor([1., 1.])
    """
    for dtype in (matrix.dtype, torch.float64):
        try:
            eigenvalues, eigenvectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(eigenvalues).all() & torch.isfinite(eigenvectors).all()):
            return eigenvalues.clamp_min(0).to(matrix.dtype), eigenvectors.to(matrix.dtype)
    return None


def _damped(matrix: Tensor, damping: float, damping_mode: DampingMode) -> Tensor:
    """Return M + δ I, for a zero M the identity unless damping is absolute."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    if damping_mode == "absolute":
        return matrix + damping * identity
    if damping_mode == "mean":
        reference = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    else:
        reference = largest_eigenvalue(matrix)[..., None, None]
    return torch.where(reference > 0, matrix + damping * reference * identity, identity)
