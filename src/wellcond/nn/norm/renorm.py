"""Batch Renormalization (Ioffe, 2017): training outputs follow evaluation's, within bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.history import PastStatistics, before_update
from wellcond.numerics.moments import Moments
from wellcond.runtime.checks import checked


class BatchRenorm(StatisticsNorm):
    """Batch Renormalization of inputs of any number of dimensions; use `BatchRenorm1d`, `2d` or `3d`."""

    scale_bound: Tensor
    shift_bound: Tensor

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        *,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            group_size=group_size,
            synchronize=synchronize,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        # Tensors, so that compiled code does not depend on their values.
        self.register_buffer("scale_bound", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("shift_bound", torch.zeros((), dtype=torch.float32, device=device))
        self.r_max, self.d_max = self._bounds = r_max, d_max
        self._past = PastStatistics()

    @property
    def r_max(self) -> float:
        """Bound of r: it lies between 1/r_max and r_max; 1 with a d_max of 0 is batch normalization."""
        return float(self.scale_bound)

    @r_max.setter
    def r_max(self, value: float) -> None:
        if not (value >= 1 and math.isfinite(value)):
            raise ValueError(f"r_max must be at least 1 and finite, got {value!r}")
        self.scale_bound.fill_(value)

    @property
    def d_max(self) -> float:
        """Bound of d: it lies between −d_max and d_max."""
        return float(self.shift_bound)

    @d_max.setter
    def d_max(self, value: float) -> None:
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"d_max must not be negative and must be finite, got {value!r}")
        self.shift_bound.fill_(value)

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize with the batch's statistics, then correct by r and d, which are constants to the gradient."""
        batch = self.observe(input)
        own = batch.moments
        scale, shift = self._past.of(self, own, self._corrections)
        self.track(own)
        # γ(x̂·r + d) + β: an affine transformation of x̂.
        weight = scale if self.weight is None else self.weight.to(scale.dtype) * scale
        bias = shift if self.weight is None else self.weight.to(shift.dtype) * shift
        bias = bias if self.bias is None else bias + self.bias.to(bias.dtype)
        return normalize(input, own.mean, own.var, weight, bias, self.eps, own, 1.0, batch.sizes, batch.all_reduce)

    def _corrections(self, own: Moments) -> tuple[Tensor, Tensor]:
        """Return r = clip(σ_B/σ) and d = clip((μ_B − μ)/σ), of the running statistics before this batch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var, _ = own
        with torch.no_grad():
            inverse = torch.rsqrt(before_update(self.running_var, mean.dtype) + self.eps)
            upper = self.scale_bound.to(mean.dtype)
            bound = self.shift_bound.to(mean.dtype)
            scale = ((var + self.eps).sqrt() * inverse).clamp(upper.reciprocal(), upper)
            shift = ((mean - before_update(self.running_mean, mean.dtype)) * inverse).clamp(-bound, bound)
        return scale, shift

    def reset_parameters(self) -> None:
        """Reset γ, β, all statistics, and the bounds to what the layer was made with."""
        super().reset_parameters()
        if "shift_bound" in self._buffers:
            self.r_max, self.d_max = self._bounds

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics."""
        yield from super().statistics()
        for name in ("scale_bound", "shift_bound"):
            yield name, torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        return super().described() | {"r_max": f"{self.r_max:g}", "d_max": f"{self.d_max:g}"}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A plain BatchNorm's checkpoint has no bounds: this layer's stay.
        for name, made_with in zip(("scale_bound", "shift_bound"), self._bounds, strict=True):
            if prefix + name not in state_dict and prefix + "running_mean" in state_dict:
                state_dict[prefix + name] = self.own_or(name, made_with, state_dict[prefix + "running_mean"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class BatchRenorm1d(BatchRenorm, nn.BatchNorm1d):
    """Batch Renormalization of [N, C] or [N, C, L] (Ioffe, 2017).

    Training gives (x − μ_B)/σ_B·r + d with r = clip(σ_B/σ, 1/r_max, r_max) and d = clip((μ_B − μ)/σ, −d_max, d_max), no
    gradient through r and d. Where nothing is clipped that is (x − μ)/σ, what evaluation gives. μ and σ² are the
    running statistics before the batch (σ² is the running *variance*, as in every layer here; the paper averages σ).
    With them still far off, let a `BatchRenormScheduler` open the bounds.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights.
        affine: Learn γ and β.
        r_max: Bound of r; the paper ends at 3.
        d_max: Bound of d; the paper ends at 5.
        group_size: Normalize ghost groups of so many samples.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = BatchRenorm1d(3, r_max=1.0, d_max=0.0)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(layer(x), nn.BatchNorm1d(3)(x), atol=1e-6)
        True
    """


class BatchRenorm2d(BatchRenorm, nn.BatchNorm2d):
    """`BatchRenorm1d` of [N, C, H, W]."""


class BatchRenorm3d(BatchRenorm, nn.BatchNorm3d):
    """`BatchRenorm1d` of [N, C, D, H, W]."""
