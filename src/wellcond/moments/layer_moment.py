"""The second moment of one layer's input, in one of several forms, and the matrix that the form stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from wellcond.numerics.low_rank import nystrom
from wellcond.numerics.tap_blocks import cosine_basis

MomentKind = Literal["dense", "kronecker", "blocks", "sketch", "diagonal"]
KINDS: tuple[str, ...] = get_args(MomentKind)

# The tensor that each form has, of which the first may be sketched.
_PARTS: dict[str, tuple[str, ...]] = {
    "dense": ("matrix",),
    "sketch": ("matrix",),
    "kronecker": ("channels", "taps"),
    "blocks": ("blocks",),
    "diagonal": ("diagonal",),
}


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors, as ``torch.linalg.eigh`` returns them.

    Attributes:
        eigenvalues: Ascending and at least 0, shape [d], or [groups, d]; of a sketch the largest alone.
        eigenvectors: Their columns, shape [d, d], or [groups, d, d]; of a sketch fewer columns.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor


@dataclass(frozen=True)
class LayerMoment:
    """E[x xᵀ] of the rows x that one layer's weight multiplies.

    Attributes:
        kind: The form: ``"dense"``, ``"sketch"``, ``"kronecker"``, ``"blocks"`` or ``"diagonal"``.
        groups: How many matrices.
        channels: Of a row.
        kernel: Taps per axis; empty for what is no convolution. d is ``channels`` times the number of taps.
        tensors: What is kept, by name: ``matrix`` [groups, d, d]; ``channels`` [groups, c, c] and ``taps``
            [groups, k, k]; ``blocks`` [groups, k, c, c], one for each frequency of the taps; ``diagonal``
            [groups, d]. Of the first one its product with fixed directions, these, and its trace, where it is sketched:
            ``…_product``, ``…_basis``, ``…_trace``.
        mean: E[x], shape [groups, d]; None where it is not known.
        rows: How many rows are behind each matrix; None of a moving average.
    """

    kind: MomentKind
    groups: int
    channels: int
    kernel: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    mean: Tensor | None = None
    rows: tuple[float, ...] | None = None

    @property
    def taps(self) -> int:
        """Of the kernel; 1 for what is no convolution."""
        return math.prod(self.kernel)

    @property
    def width(self) -> int:
        """The order d of each matrix."""
        return self.channels * self.taps

    @property
    def sketched(self) -> bool:
        """Whether matrices are known from their products with a few directions alone."""
        return f"{_PARTS[self.kind][0]}_product" in self.tensors

    @property
    def bytes(self) -> int:
        """Of memory that the tensors take."""
        kept = [*self.tensors.values(), *([] if self.mean is None else [self.mean])]
        return sum(tensor.numel() * tensor.itemsize for tensor in kept)

    def trace(self, *, centred: bool = False) -> Tensor:
        """Return the traces, shape [groups]; of Kronecker factors and tap blocks exactly those of the dense form."""
        part, tensors = _PARTS[self.kind][0], self._centred() if centred else self.tensors
        if f"{part}_trace" in tensors:
            found = tensors[f"{part}_trace"]
        else:
            value = tensors[part]
            found = value.sum(-1) if self.kind == "diagonal" and not centred else _traces(value)
        found = found.view(self.groups, -1).sum(1)
        return found * self.taps if self.kind == "kronecker" else found

    def matrices(self, *, centred: bool = False) -> Tensor:
        """Return E[x xᵀ], or E[(x − μ)(x − μ)ᵀ], as far as the form knows it.

        Args:
            centred: Whether to take out the mean.

        Returns:
            Shape [groups, d, d], in the order of the weight's rows (channel, *tap).

        Raises:
            ValueError: If the mean is not known.
        """
        tensors = self._centred() if centred else self.tensors
        part = _whole(tensors, _PARTS[self.kind][0])
        if self.kind == "diagonal":
            return part if centred else torch.diag_embed(part)
        if self.kind == "kronecker":
            taps = tensors["taps"]
            # Both margins have this mean on their diagonals: the energy of one input.
            energy = _traces(taps).view(-1, 1, 1) / self.taps
            scaled = taps / torch.where(energy > 0, energy, 1.0)
            return torch.stack([torch.kron(one, other) for one, other in zip(part, scaled, strict=True)])
        if self.kind == "blocks":
            basis = cosine_basis(self.kernel).to(part)
            found = torch.einsum("gfcd,fk,fl->gckdl", part, basis, basis)
            return found.reshape(self.groups, self.width, self.width)
        return part

    def eigenpairs(self, *, centred: bool = False) -> tuple[Tensor, Tensor]:
        """Return eigenvalues, ascending, shape [groups, r], and eigenvectors, shape [groups, d, r].

        r is d, or of a sketch the number of its directions.
        """
        if self.kind == "diagonal" and not centred:
            values, order = self.tensors["diagonal"].sort(dim=-1)
            return values, torch.nn.functional.one_hot(order, self.width).to(values).mT
        if self.kind == "sketch":
            tensors = self._centred() if centred else self.tensors
            vectors, values, _ = nystrom(*(tensors[f"matrix_{name}"] for name in ("product", "basis", "trace")))
            return values.flip(-1), vectors.flip(-1)
        moment = self.matrices(centred=centred)
        values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
        return values.clamp_min(0), vectors

    def condition(self, *, centred: bool = False) -> float:
        """Return λ₁/λ_d of the worst group, infinite where λ_d is rounding; of a sketch, a lower bound."""
        values, _ = self.eigenpairs(centred=centred)
        largest, smallest = values[:, -1], values[:, 0]
        if self.kind == "sketch":
            # All others together are at most what is missing of the trace.
            missing = (self.trace(centred=centred) - values.sum(-1)).clamp_min(0)
            smallest = missing / max(self.width - values.shape[-1], 1)
        none = smallest <= self.width * torch.finfo(values.dtype).eps * largest
        ratios = torch.where(none, math.inf, largest / torch.where(none, 1.0, smallest))
        return float(ratios.max())

    def merged(self, other: LayerMoment) -> LayerMoment:
        """Return the moment of both sets of rows together.

        Raises:
            ValueError: If the two are of different forms or sizes, or one is a moving average, of an unknown number of
                rows.
        """
        if self.rows is None or other.rows is None:
            raise ValueError("moving averages cannot be added up: it is not known how many rows are behind them")
        alike = {key: value.shape for key, value in self.tensors.items()}
        if self.kind != other.kind or alike != {key: value.shape for key, value in other.tensors.items()}:
            raise ValueError(
                f"second moments of one form can be added up, got {self.describe()} and {other.describe()}"
            )
        count = torch.tensor([self.rows, other.rows], dtype=torch.float64)
        own, theirs = (count / count.sum(0).clamp_min(1)).unbind()

        def mixed(one: Tensor, two: Tensor) -> Tensor:
            sizes = (self.groups, *[1] * (one.dim() - 1))
            return own.to(one).view(sizes) * one + theirs.to(one).view(sizes) * two

        tensors = {
            key: value if key.endswith("_basis") else mixed(value, other.tensors[key])
            for key, value in self.tensors.items()
        }
        mean = None if self.mean is None or other.mean is None else mixed(self.mean, other.mean)
        return replace(self, tensors=tensors, mean=mean, rows=tuple(count.sum(0).tolist()))

    def describe(self) -> str:
        """Say what is kept, in a few words."""
        times = f"{self.groups} × " if self.groups > 1 else ""
        if self.kind == "diagonal":
            return f"diagonal of {times}{self.width}"
        about = f" sketched at rank {self.tensors[f'{_PARTS[self.kind][0]}_basis'].shape[-1]}" if self.sketched else ""
        if self.kind == "kronecker":
            return f"channels {times}{self.channels}{about} ⊗ taps {self.taps}"
        if self.kind == "blocks":
            return f"{self.taps} tap blocks {times}{self.channels} × {self.channels}{about}"
        return f"{'' if self.sketched else 'dense '}{times}{self.width} × {self.width}{about}"

    def to_dict(self, *, centred: bool = False) -> dict[str, Any]:
        """Return what is known as dictionaries, lists and numbers, for JSON; an infinite condition number is None."""
        values, _ = self.eigenpairs(centred=centred)
        condition = self.condition(centred=centred)
        return {
            "kind": self.kind,
            "groups": self.groups,
            "width": self.width,
            "sketched": self.sketched,
            "rows": None if self.rows is None else list(self.rows),
            "bytes": self.bytes,
            "traces": self.trace(centred=centred).tolist(),
            "condition": condition if math.isfinite(condition) else None,
            "eigenvalues": values.flip(-1).tolist(),
        }

    def _centred(self) -> dict[str, Tensor]:
        """Return the tensors of E[(x − μ)(x − μ)ᵀ] in the same form; of a diagonal one the whole matrix."""
        if self.mean is None:
            raise ValueError("the mean of this layer's input is not known: take the raw moment, centred=False")
        mean, part = self.mean, _PARTS[self.kind][0]
        found = dict(self.tensors)
        if self.kind == "diagonal":
            return {part: torch.diag_embed(found[part]) - _outer(mean)}
        if self.kind in ("dense", "sketch"):
            vectors = mean.unsqueeze(1)  # [groups, 1, d]
        else:
            by_tap = mean.view(self.groups, self.channels, self.taps)
            vectors = by_tap.mT / math.sqrt(self.taps)
            if self.kind == "kronecker":
                found["taps"] = found["taps"] - by_tap.mT @ by_tap / self.channels
            else:  # a mean for each frequency, as a batch of its own
                vectors = cosine_basis(self.kernel).to(mean) @ by_tap.mT
                vectors = vectors.unsqueeze(2)
        if self.sketched:
            basis = found[f"{part}_basis"]
            found[f"{part}_product"] = found[f"{part}_product"] - vectors.mT @ (vectors @ basis)
            found[f"{part}_trace"] = found[f"{part}_trace"] - vectors.square().sum((-2, -1))
        else:
            found[part] = found[part] - vectors.mT @ vectors
        return found


def _whole(tensors: Mapping[str, Tensor], part: str) -> Tensor:
    """Return a tensor, or the Nyström approximation that stands for it."""
    if f"{part}_product" not in tensors:
        return tensors[part]
    vectors, values, _ = nystrom(*(tensors[f"{part}_{name}"] for name in ("product", "basis", "trace")))
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _outer(vectors: Tensor) -> Tensor:
    return vectors.unsqueeze(-1) * vectors.unsqueeze(-2)
