"""The regressions of BSR, one per channel: from an instance's statistics to those of its batch (thesis 3.9–3.13)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.numerics.moments import Moments, sum_samples

# A feature that varies less than this, relative to its size, is constant: its slope would be noise divided by noise.
_CONSTANT = 1e-10
# So is one that is as small as this beside the variances that are predicted: it is what rounding left of zero.
_NEGLIGIBLE = 1e-6
# Two features whose correlation leaves less than this unexplained are one feature.
_COLLINEAR = 1e-10


class NormalEquations(NamedTuple):
    """Sums over instances s, 18 numbers a channel.

    Attributes:
        mean_gram: A_μ, Σ φφᵀ with φ = (μ_s, 1), shape [C, 2, 2].
        mean_target: B_μ, Σ φ μ_B, shape [C, 2].
        var_gram: A_σ, Σ ϕϕᵀ with ϕ = (σ²_s, (μ_s − μ)², 1), shape [C, 3, 3].
        var_target: B_σ, Σ ϕ σ²_B, shape [C, 3].
    """

    mean_gram: Tensor
    mean_target: Tensor
    var_gram: Tensor
    var_target: Tensor


def normal_equations(
    instances: Moments, batch: Moments, sizes: tuple[int, ...] | None, center: Tensor, dtype: torch.dtype
) -> NormalEquations:
    """Return one batch's sums (3.12).

    Args:
        instances: Shape [N, C].
        batch: Shape [C], or [groups, C] with `sizes`.
        sizes: Samples of each group.
        center: μ, each channel's population mean, shape [C].
        dtype: To sum in; float64 where there is one.

    Returns:
        The sums.
    """
    mean, var = instances.mean.to(dtype), instances.var.to(dtype)
    distance = (mean - center.to(dtype)).square_()
    # Of each group: its instances share the target. A row [1, C] for a single group.
    own_mean, own_var = (torch.atleast_2d(part.to(dtype)) for part in batch[:2])
    means, variances, distances = (torch.atleast_2d(sum_samples(part, sizes)) for part in (mean, var, distance))
    samples: int | Tensor = mean.shape[0] if sizes is None else sizes[0]
    if sizes is not None and sizes[-1] != sizes[0]:
        samples = torch.tensor(sizes, dtype=dtype, device=mean.device).unsqueeze(1)
    total_mean, total_var, total_distance = means.sum(0), variances.sum(0), distances.sum(0)
    count = torch.full_like(total_mean, mean.shape[0])
    crossed = (var * distance).sum(0)
    mean_gram = [(mean * mean).sum(0), total_mean, total_mean, count]
    var_gram = [(var * var).sum(0), crossed, total_var, crossed, (distance * distance).sum(0), total_distance]
    var_gram += [total_var, total_distance, count]
    mean_target = [(means * own_mean).sum(0), (samples * own_mean).sum(0)]
    var_target = [(variances * own_var).sum(0), (distances * own_var).sum(0), (samples * own_var).sum(0)]
    return NormalEquations(
        torch.stack(mean_gram, dim=-1).view(-1, 2, 2),
        torch.stack(mean_target, dim=-1),
        torch.stack(var_gram, dim=-1).view(-1, 3, 3),
        torch.stack(var_target, dim=-1),
    )


def solve_mean(gram: Tensor, target: Tensor, fallback: Tensor) -> Tensor:
    """Solve the regression of the batch mean (3.11): α = A_μ⁻¹B_μ.

    Where all instance means are equal, so that A_μ is singular, the slope is 0 and the intercept the average batch
    mean, which is the moving average of batch normalization (3.22).

    Args:
        gram: A_μ, shape [C, 2, 2], float64.
        target: B_μ, shape [C, 2].
        fallback: The intercept where nothing was summed or the sums are not finite, shape [C].

    Returns:
        (slope, intercept), shape [C, 2].

    Example:
        >>> means = torch.tensor([1.0, 3.0, 2.0]).double()
        >>> batch = 0.5 * means + 1.5
        >>> phi = torch.stack([means, torch.ones(3).double()])
        >>> solve_mean((phi @ phi.T)[None], (phi @ batch)[None], torch.zeros(1).double())
        tensor([[0.5000, 1.5000]], dtype=torch.float64)
    """
    total = gram[:, 1, 1]
    known = _known(gram, target, total)
    total = torch.where(known, total, 1.0)
    feature, batch = gram[:, 0, 1] / total, target[:, 1] / total
    size = gram[:, 0, 0] / total
    spread = size - feature.square()
    together = target[:, 0] / total - feature * batch
    varies = spread > _CONSTANT * size
    slope = torch.where(varies, together / torch.where(varies, spread, 1.0), 0.0)
    intercept = batch - slope * feature
    solved = torch.stack([slope, intercept], dim=-1)
    return torch.where(known[:, None], solved, torch.stack([torch.zeros_like(fallback), fallback], dim=-1))


def solve_var(gram: Tensor, target: Tensor, fallback: Tensor, nonneg: str) -> Tensor:
    """Solve the regression of the batch variance with non-negative weights (3.11).

    A feature that does not vary, as σ²_s does not with one position per instance, gets the weight 0; of two that vary
    alike the first one explains for both. With neither, the intercept is the moving average (3.22).

    Args:
        gram: A_σ, shape [C, 3, 3], float64.
        target: B_σ, shape [C, 3].
        fallback: The intercept where nothing was summed or the sums are not finite, shape [C].
        nonneg: ``"clamp"``: max(A_σ⁻¹B_σ, 0), the thesis's; ``"nnls"``: the least squares over non-negative weights,
            exactly, by comparing the 8 sets of weights that may be positive.

    Returns:
        Weights of σ²_s, of (μ_s − μ)², and the intercept, shape [C, 3].

    Raises:
        ValueError: If nonneg is another word.
    """
    check_nonneg(nonneg)
    known = _known(gram, target, gram[:, 2, 2])
    total = torch.where(known, gram[:, 2, 2], 1.0)
    gram, target = gram / total[:, None, None], target / total[:, None]
    solutions = _subset_solutions(gram, target)
    if nonneg == "clamp":
        # With the intercept, the largest set of usable features.
        solved, usable = solutions[0]
        for weights, possible in solutions[1:4]:
            solved = torch.where(usable[:, None], solved, weights)
            usable = usable | possible
        solved = solved.clamp_min(0.0)
    else:
        solved = torch.zeros_like(target)
        best = torch.zeros_like(total)  # The objective of all weights 0, less the constant Σ(σ²_B)².
        for weights, possible in solutions:
            objective = torch.einsum("ci,cij,cj->c", weights, gram, weights) - 2 * (weights * target).sum(-1)
            better = possible & (weights >= 0).all(-1) & (objective < best)
            solved = torch.where(better[:, None], weights, solved)
            best = torch.where(better, objective, best)
    constant = torch.stack([torch.zeros_like(fallback), torch.zeros_like(fallback), fallback], dim=-1)
    return torch.where(known[:, None], solved, constant)


def check_nonneg(nonneg: str) -> None:
    """Raise a ValueError unless `nonneg` is one of the two ways.

    >>> check_nonneg("relu")
    Traceback (most recent call last):
        ...
    ValueError: nonneg must be 'clamp' or 'nnls', got 'relu'
    """
    if nonneg not in ("clamp", "nnls"):
        raise ValueError(f"nonneg must be 'clamp' or 'nnls', got {nonneg!r}")


def _known(gram: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """Return which channels have finite sums of at least one instance."""
    return gram.isfinite().all(-1).all(-1) & target.isfinite().all(-1) & (total > 0)


def _subset_solutions(gram: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the least squares over each set of features, and where that set is usable.

    Args:
        gram: [C, 3, 3], divided by the number of instances.
        target: [C, 3], likewise.

    Returns:
        Of the sets {1, 2, i}, {1, i}, {2, i}, {i}, {1, 2}, {1}, {2} (i: the intercept): weights [C, 3], usable [C].
    """
    means, batch = gram[:, :2, 2], target[:, 2]
    squares = gram[:, :2, :2]
    centred = squares - means[:, :, None] * means[:, None, :]
    centred_target = target[:, :2] - means * batch[:, None]
    size = squares.diagonal(dim1=-2, dim2=-1)
    present = size > (_NEGLIGIBLE * batch[:, None]).square()
    varies = present & (centred.diagonal(dim1=-2, dim2=-1) > _CONSTANT * size)
    solutions = []
    for matrix, vector, usable, intercept in (
        (centred, centred_target, varies, True),
        (squares, target[:, :2], present, False),
    ):
        for first, second in ((True, True), (True, False), (False, True), (False, False)):
            if not (first or second or intercept):
                continue
            weights, possible = _least_squares(matrix, vector, usable, first, second)
            constant = batch - (weights * means).sum(-1) if intercept else torch.zeros_like(batch)
            solutions.append((torch.cat([weights, constant[:, None]], dim=-1), possible))
    return solutions


def _least_squares(matrix: Tensor, vector: Tensor, usable: Tensor, first: bool, second: bool) -> tuple[Tensor, Tensor]:
    """Solve for the weights of none, one or both of two features, shape [C, 2]; say where that can be done."""
    zero = torch.zeros_like(vector[:, 0])
    if first and second:
        determinant = matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]
        possible = usable.all(-1) & (determinant > _COLLINEAR * matrix[:, 0, 0] * matrix[:, 1, 1])
        divisor = torch.where(possible, determinant, 1.0)
        one = (matrix[:, 1, 1] * vector[:, 0] - matrix[:, 0, 1] * vector[:, 1]) / divisor
        other = (matrix[:, 0, 0] * vector[:, 1] - matrix[:, 1, 0] * vector[:, 0]) / divisor
        weights = torch.stack([one, other], dim=-1)
    elif first or second:
        index = 0 if first else 1
        possible = usable[:, index]
        weight = vector[:, index] / torch.where(possible, matrix[:, index, index], 1.0)
        weights = torch.stack([weight, zero] if first else [zero, weight], dim=-1)
    else:
        possible = torch.ones_like(zero, dtype=torch.bool)
        weights = torch.zeros_like(vector)
    return torch.where(possible[:, None], weights, 0.0), possible
