"""Moving averages of covariances: they wait to be summed over ranks, and stay in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from wellcond.nn.norm.buffers import KeptStatistics
from wellcond.numerics.row_moments import Covariance
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.ranks import Ranks

if TYPE_CHECKING:
    from typing_extensions import Self


class RunningCovariance(KeptStatistics):
    """A moving average of the covariance of rows, in which a row of `age` updates ago weighs `decay` to that power.

    What was observed since the last update waits in `pending`: it is summed over ranks when it is taken in, so that
    all ranks have equal buffers at any time.

    Args:
        groups: How many covariances.
        width: d.
        centered: Of the rows about their mean; or about zero.
        decay: α of the moving average; 0 keeps the last update alone.
        scale_free: Divide each update by its mean variance, so that all count alike whatever their scale.
        device: Of the statistics.
        dtype: Of the statistics.
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor
    skipped: Tensor

    def __init__(
        self,
        groups: int,
        width: int,
        centered: bool,
        decay: float,
        scale_free: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.centered = centered
        self.decay = decay
        self.scale_free = scale_free
        self.pending: Covariance | None = None
        self.register_buffer("count", torch.zeros((), device=device, dtype=dtype))
        self.register_buffer("mean", torch.zeros(groups, width, device=device, dtype=dtype))
        self.register_buffer("covariance", torch.zeros(groups, width, width, device=device, dtype=dtype))
        self.register_buffer("skipped", torch.zeros((), device=device, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Add rows [groups, n, d] to what waits; rows that are not all finite are left out and counted as skipped."""
        if rows.shape[1] == 0:
            return
        with without_autocast(rows.device):
            rows = rows.detach().to(self.covariance.dtype)
            mean = rows.mean(dim=1) if self.centered else torch.zeros_like(self.mean)
            rows = rows - mean.unsqueeze(1) if self.centered else rows
            covariance = rows.mT @ rows / rows.shape[1]
            # The device decides; nobody waits for it.
            finite = torch.isfinite(covariance).all() & torch.isfinite(mean).all()
            seen = Covariance(
                finite * self.count.new_full((), rows.shape[1]),
                mean.masked_fill(~finite, 0.0),
                covariance.masked_fill(~finite, 0.0),
            )
            self.skipped.add_(~finite)
            self.pending = seen if self.pending is None else self.pending.merged(seen)

    @torch.no_grad()
    def update(self, synchronize: bool | dist.ProcessGroup) -> None:
        """Take in what waits, of all ranks together."""
        zeros = Covariance(*(torch.zeros_like(part) for part in (self.count, self.mean, self.covariance)))
        new, self.pending = self.pending or zeros, None
        ranks = Ranks(synchronize)
        if ranks.size > 1:
            new = new.over_ranks(ranks)
        if self.scale_free:
            scale = new.covariance.diagonal(dim1=-2, dim2=-1).mean()
            new = Covariance(new.number * (scale > 0), new.mean, new.covariance / torch.where(scale > 0, scale, 1.0))
        # Without new rows, nothing ages: what is known stays as well founded as it was.
        decay = 1 - (new.number > 0).to(self.count.dtype) * (1 - self.decay)
        total = Covariance(self.count * decay, self.mean, self.covariance).merged(new)
        self.count.copy_(total.number)
        self.mean.copy_(total.mean)
        self.covariance.copy_(total.covariance)

    def get_extra_state(self) -> Tensor:
        """Return what waits as one tensor, zeros if nothing does; it is no buffer because it differs between ranks."""
        parts = (self.count, self.mean, self.covariance)
        waiting = [torch.zeros_like(part) for part in parts] if self.pending is None else self.pending
        return torch.cat([part.flatten() for part in waiting])

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """Restore what waited, also from checkpoints that held a dict."""
        like = (self.count, self.mean, self.covariance)
        if isinstance(state, dict):
            found = state["pending"]
        else:
            sizes = [part.numel() for part in like]
            found = state.split(sizes) if state.is_meta or bool(state[0] > 0) else None
        if found is None:
            self.pending = None
            return
        parts = zip(found, like, strict=True)
        self.pending = Covariance(*(part.to(own.device, own.dtype, copy=True).view_as(own) for part, own in parts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.pending is not None:
            like = self.covariance
            self.pending = Covariance(*(part.to(like.device, like.dtype) for part in self.pending))
        return self
