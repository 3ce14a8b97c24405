"""Second moments of rows that come in pieces.

`Covariance` merges what several parts of the data have as covariance. `SecondMoment` sums rows in float64, whole or
sketched where the matrix is too wide to keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.numerics.low_rank import nystrom
from wellcond.runtime.ranks import Ranks


class Eigenvalues(NamedTuple):
    """The known eigenvalues of one second moment.

    Attributes:
        values: Descending and at least 0; fewer than the matrix has where it was sketched.
        trace: Of the matrix.
    """

    values: tuple[float, ...]
    trace: float


class SecondMoment(ABC):
    """The mean and the scatter Σ (x − mean)(x − mean)ᵀ of rows, one matrix per group, updated piece by piece.

    Each piece is centred before it is multiplied, and pieces are combined by Chan, Golub and LeVeque's formula: means
    that are large beside the deviations cost no digits.

    Args:
        groups: How many matrices.
        width: d, the length of a row.
        dtype: Of products within a piece.
        device: Of the rows.
    """

    def __init__(self, groups: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self._dtype = dtype
        # Sums over pieces are in float64 where there is such a thing.
        self._wide = dtype if device.type == "mps" else torch.float64
        self.counts = [0] * groups
        self._mean = torch.zeros(groups, width, dtype=self._wide, device=device)
        self._trace = torch.zeros(groups, dtype=self._wide, device=device)

    def add(self, rows: Tensor, first: int = 0) -> None:
        """Take in rows.

        Args:
            rows: Shape [g, n, d], of g groups; n may be 0.
            first: Which group the first of them is.
        """
        groups, count = rows.shape[:2]
        if count == 0:
            return
        own = slice(first, first + groups)
        before = self.counts[first]
        rows = rows.to(self._dtype)
        mean = rows.mean(dim=1, keepdim=True)
        rows = rows - mean
        # With what rounding left of the mean: it matters where that is large.
        rest = rows.mean(dim=1, keepdim=True)
        rows = rows - rest
        apart = (mean.to(self._wide) + rest.to(self._wide)).squeeze(1) - self._mean[own]
        weight = before * count / (before + count)
        self._trace[own] += rows.square().sum(dim=(1, 2)).to(self._wide) + weight * apart.square().sum(dim=1)
        self._add_product(own, rows, apart, weight)
        self._mean[own] += apart * (count / (before + count))
        for group in range(first, first + groups):
            self.counts[group] += count

    def eigenvalues(self, group: int, *, centred: bool) -> Eigenvalues:
        """Return the eigenvalues of the covariance, divided by n, or of the raw second moment E[x xᵀ]."""
        count, mean = self.counts[group], self._mean[group]
        trace = self._trace[group] / count
        if not centred:
            trace = trace + mean.square().sum()
        return Eigenvalues(tuple(self._solved(group, count, mean, centred, trace)), float(trace))

    @property
    def finite(self) -> bool:
        """Whether all rows were."""
        return bool(torch.isfinite(self._trace).all())

    @property
    @abstractmethod
    def rank(self) -> int:
        """How many eigenvalues `eigenvalues` returns."""

    @abstractmethod
    def _add_product(self, groups: slice, rows: Tensor, apart: Tensor, weight: float) -> None:
        """Add Σ r rᵀ + weight · a aᵀ over rows r, and their mean's distance a from that before."""

    @abstractmethod
    def _solved(self, group: int, count: int, mean: Tensor, centred: bool, trace: Tensor) -> list[float]:
        """Return the eigenvalues."""


class WholeMoment(SecondMoment):
    """The matrices as they are."""

    def __init__(self, groups: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(groups, width, dtype, device)
        self._scatter = torch.zeros(groups, width, width, dtype=self._wide, device=device)

    @property
    def rank(self) -> int:
        """All of them."""
        return self.width

    def _add_product(self, groups: slice, rows: Tensor, apart: Tensor, weight: float) -> None:
        self._scatter[groups] += (rows.mT @ rows).to(self._wide)
        self._scatter[groups].baddbmm_(apart.unsqueeze(2), weight * apart.unsqueeze(1))

    def _solved(self, group: int, count: int, mean: Tensor, centred: bool, trace: Tensor) -> list[float]:
        moment = self._scatter[group] / count
        if not centred:
            moment = moment + torch.outer(mean, mean)
        # LAPACK's is faster than a GPU's for one matrix, and there for every backend.
        values = torch.linalg.eigvalsh(((moment + moment.mT) / 2).cpu())
        found: list[float] = values.clamp_min(0).flip(0).tolist()
        return found


class SketchedMoment(SecondMoment):
    """Too wide matrices: their products with a few fixed directions, and their traces.

    The eigenvalues are those of the Nyström approximation N of M (`wellcond.numerics.low_rank.nystrom`). As M − N
    has no negative eigenvalue and a trace that is known, λᵢ(N) ≤ λᵢ(M) ≤ λᵢ(N) + tr(M − N); N = M where the rank of M
    is at most that of the sketch.

    Args:
        groups: How many matrices.
        width: d, the length of a row.
        dtype: Of products within a piece.
        device: Of the rows.
        rank: How many directions.
    """

    def __init__(self, groups: int, width: int, dtype: torch.dtype, device: torch.device, rank: int) -> None:
        super().__init__(groups, width, dtype, device)
        # Always the same directions: the result is a function of the data alone.
        generator = torch.Generator().manual_seed(width)
        start = torch.randn(width, rank, dtype=torch.float64, generator=generator)
        self._basis = torch.linalg.qr(start)[0].to(self._wide).to(device)
        self._sketch = torch.zeros(groups, width, rank, dtype=self._wide, device=device)

    @property
    def rank(self) -> int:
        """As many as directions."""
        return int(self._basis.shape[1])

    def _add_product(self, groups: slice, rows: Tensor, apart: Tensor, weight: float) -> None:
        self._sketch[groups] += (rows.mT @ (rows @ self._basis.to(rows.dtype))).to(self._wide)
        self._sketch[groups].baddbmm_(apart.unsqueeze(2), weight * (apart @ self._basis).unsqueeze(1))

    def _solved(self, group: int, count: int, mean: Tensor, centred: bool, trace: Tensor) -> list[float]:
        product = self._sketch[group] / count
        if not centred:
            product = product + torch.outer(mean, mean @ self._basis)
        _, values, _ = nystrom(product.cpu(), self._basis.cpu(), trace.cpu())
        found: list[float] = values.tolist()
        return found


class Covariance(NamedTuple):
    """The mean and covariance of rows, in each of several groups.

    Attributes:
        number: How many rows are behind it, a scalar tensor.
        mean: μ, shape [groups, d]; zero where second moments are meant.
        covariance: E[(o − μ)(o − μ)ᵀ], shape [groups, d, d].
    """

    number: Tensor
    mean: Tensor
    covariance: Tensor

    def merged(self, other: Covariance) -> Covariance:
        """Return the covariance of both sets of rows together, about their common mean."""
        count = self.number + other.number
        share = torch.where(count > 0, other.number / count, 0.0)
        apart = other.mean - self.mean
        between = apart.unsqueeze(-1) * apart.unsqueeze(-2) * (share * (1 - share))
        return Covariance(
            count,
            torch.lerp(self.mean, other.mean, share),
            torch.lerp(self.covariance, other.covariance, share) + between,
        )

    def over_ranks(self, ranks: Ranks) -> Covariance:
        """Return the covariance of all ranks' rows together."""
        count, mean = self.number.clone(), self.mean * self.number
        ranks.add([count, mean])
        mean = mean / count.clamp_min(1)
        apart = self.mean - mean
        covariance = ranks.total((self.covariance + apart.unsqueeze(-1) * apart.unsqueeze(-2)) * self.number)
        return Covariance(count, mean, covariance / count.clamp_min(1))
