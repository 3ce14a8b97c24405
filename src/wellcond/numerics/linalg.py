"""Powers of symmetric positive semi-definite matrices, damped, with fallbacks for failed factorizations.

Either of the whole matrix (`symmetric_power`) or of a low-rank part plus a flat tail (`nystrom`, `low_rank_power`).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

DampingMode = Literal["relative", "mean", "absolute"]
Solver = Literal["auto", "eigh", "newton_schulz", "cholesky"]

DAMPING_MODES: tuple[str, ...] = get_args(DampingMode)
SOLVERS: tuple[str, ...] = get_args(Solver)

# From this width on, "auto" prefers matrix products to eigh on a GPU.
_WIDE = 1024
_KRYLOV_SIZE = 48
_NEWTON_SCHULZ_STEPS = 40


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
        root = _inverse_root(_symmetric_from_lower(_damped(matrix, damping, damping_mode)))
        # The square is a little closer to M⁻¹ than what the inverse iteration X ← X (2I − MX) reaches in float32.
        return _symmetric(root @ root) if exponent == -1 else root
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
    if damping_mode not in DAMPING_MODES:
        raise ValueError(f"damping_mode must be one of {', '.join(map(repr, DAMPING_MODES))}, got {damping_mode!r}")


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
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
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
    matrix = _symmetric_from_lower(matrix)
    scale = _positive_or_one(matrix.abs().sum(-1).amax(-1))
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
    scale = _positive_or_one(product.abs().amax((-2, -1)))
    scaled = product / scale[..., None, None]
    norm = torch.linalg.matrix_norm(scaled)
    # Above the rounding errors of ΩᵀY, so that a singular M leaves the shift itself, not noise.
    shift = (math.sqrt(size) * torch.finfo(product.dtype).eps * _positive_or_one(norm))[..., None, None]
    shifted = scaled + shift * basis
    core = _symmetric(basis.mT @ shifted)
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


def _inverse_root(matrix: Tensor) -> Tensor:
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
    result: Tensor = _symmetric(best_inverse + best_inverse @ defect / 2) * bound.rsqrt()
    return result


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _symmetric_from_lower(matrix: Tensor) -> Tensor:
    return matrix.tril() + matrix.tril(-1).mT


def _positive_or_one(values: Tensor) -> Tensor:
    """Replace zeros by ones, where they would divide."""
    return torch.where(values == 0, 1.0, values)
