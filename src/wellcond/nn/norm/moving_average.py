"""Moving Average Batch Normalization (Yan et al., 2020): averages over batches, in the backward pass too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.functional.moving_average import normalize_by_square
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.history import PastStatistics
from wellcond.nn.norm.window import empty_where_missing, replace_oldest
from wellcond.runtime.checks import check_positive_integer, checked
from wellcond.runtime.tracing import is_transformed

# Bound of r, as in the authors' code: it lies between a fifth and five.
_LARGEST_SCALE = 5.0
_WINDOWS = ("past_squares", "past_products", "squares_seen", "products_seen")


class _Products:
    """Ψ of recent backward passes, in a layer's buffers.

    Args:
        layer: Whose buffers, those of now: a functional call has others.
        keeps: Whether the newest Ψ goes into them.
    """

    def __init__(self, layer: MovingAverageBatchNorm, keeps: bool) -> None:
        self.window, self.seen, self.keeps = layer.past_products, layer.products_seen, keeps
        self.after = layer.averages_after

    def __call__(self, own: Tensor) -> Tensor:
        """Return the average of the batch's Ψ and those before, and keep the batch's."""
        past = self.window.to(own.dtype)
        average = torch.where(self.seen >= self.after, _averaged(own, past), own)
        if self.keeps and not is_transformed():
            # Of ghost groups the first, as of every other history.
            replace_oldest(self.window, self.seen, own if own.dim() == 1 else own[0])
            self.seen.add_(1)
        return average


class MovingAverageBatchNorm(StatisticsNorm):
    """Moving Average Batch Normalization of any number of dimensions; use `MovingAverageBatchNorm1d`, `2d` or `3d`."""

    tracks_batch_moments = False
    # It averages longer than a moving average that is only evaluated with.
    inherited_arguments = ("eps",)
    past_squares: Tensor
    past_products: Tensor
    squares_seen: Tensor
    products_seen: Tensor

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
        affine: bool = True,
        window: int = 16,
        warmup_steps: int = 100,
        scale_after: int = 1000,
        *,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_integer("window", window)
        for name, steps in (("warmup_steps", warmup_steps), ("scale_after", scale_after)):
            if steps < 0:
                raise ValueError(f"{name} must not be negative, got {steps!r}")
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
        self.window = window
        self.warmup_steps = warmup_steps
        self.scale_after = scale_after
        assert self.running_var is not None
        for name in ("past_squares", "past_products"):  # [C, window − 1]: the newest batch is none of the past.
            self.register_buffer(name, torch.zeros_like(self.running_var).unsqueeze(1).repeat(1, window - 1))
        for name in ("squares_seen", "products_seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self._past = PastStatistics()

    @property
    def averages_after(self) -> int:
        """After how many batches their average takes the batch's place: warmed up, and enough for a whole window."""
        return max(self.warmup_steps, self.window - 1)

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize by the average second moment."""
        if torch.compiler.is_compiling():
            # Its backward changes buffers, which the compiler does not follow.
            output: Tensor = torch.compiler.disable(self._normalize)(input)
            return output
        return self._normalize(input)

    def _normalize(self, input: Tensor) -> Tensor:
        batch = self.observe(input)
        own = batch.moments
        assert self.running_mean is not None
        shift = self.running_mean.detach().to(own.mean.dtype, copy=True)
        # E[(x − c)²], without a difference of squares.
        own_square = own.var + (own.mean - shift).square()
        square, scale = self._past.of(self, own, lambda _: self._averages(own_square))
        self._take(own_square, square, own.elements)
        return normalize_by_square(
            input,
            shift,
            square,
            scale,
            self.weight,
            self.bias,
            self.eps,
            own.elements,
            _Products(self, self.training and self.track_running_stats),
            batch.sizes,
            batch.all_reduce,
        )

    def _averages(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return χ², averaged over the window, and r = clip(χ/χ̂) for the running χ̂ before this batch."""
        assert self.running_var is not None
        past = self.past_squares.to(own.dtype)
        square = torch.where(self.squares_seen >= self.averages_after, _averaged(own, past), own)
        running = self.running_var.to(own.dtype)
        scale = ((square + self.eps) / (running + self.eps)).sqrt().clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)
        return square, torch.where(self.squares_seen >= max(self.scale_after, self.warmup_steps), scale, 1.0)

    def _take(self, own: Tensor, square: Tensor, elements: int | Tensor) -> None:
        """Take a batch into the window, and the window's average into the running one."""
        if not self.updates or (not isinstance(elements, Tensor) and elements == 0):
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            replace_oldest(self.past_squares, self.squares_seen, own if own.dim() == 1 else own[0])
            self.squares_seen.add_(1)
            square = square if square.dim() == 1 else square.mean(0)
            self.running_var.lerp_(square.to(self.running_var.dtype), self.factor())

    def factor(self) -> float | Tensor:
        """Return the weight of the newest average: equal weights until that would be less than `momentum`."""
        assert self.num_batches_tracked is not None
        assert self.running_var is not None
        equal = self.num_batches_tracked.to(self.running_var.dtype).clamp_min(1).reciprocal()
        return equal if self.momentum is None else equal.clamp_min(self.momentum)

    def reset_running_stats(self) -> None:
        """Forget all statistics."""
        super().reset_running_stats()
        for name in _WINDOWS:
            if name in self._buffers:
                getattr(self, name).zero_()

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics."""
        yield from super().statistics()
        for name in ("past_squares", "past_products"):
            yield name, torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        steps = {"warmup_steps": self.warmup_steps, "scale_after": self.scale_after}
        return super().described() | {"window": self.window} | steps

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        empty_where_missing(self, _WINDOWS, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _averaged(own: Tensor, past: Tensor) -> Tensor:
    """Return the mean of a batch's statistic, [C] or [groups, C], and of the past ones, [C, window − 1]."""
    return (own + past.sum(1)) / (past.shape[1] + 1)


class MovingAverageBatchNorm1d(MovingAverageBatchNorm, nn.BatchNorm1d):
    """Moving Average Batch Normalization of [N, C] or [N, C, L], for small batches (Yan et al., ICLR 2020).

    No mean is subtracted: the layer before has centralized weights (`weight_centralize`) in its place, which
    `convert_norm(model, to="mabn")` sees to. What is left are two statistics, one of the forward pass and one of the
    backward, and both are averaged over the last `window` batches:

        forward     z = x/χ,   χ² = average of E[x²],   y = γ·r·z + β,   r = clip(χ/χ̂, 1/5, 5)
        backward    ∂L/∂x = (∂L/∂z − z·Ψ)/χ,   Ψ = average of E[z·∂L/∂z]

    χ̂² is the exponential average of χ², with which evaluation normalizes; where r is not clipped, so does training.
    The first batches are normalized with their own statistics. The backward pass is not the derivative of the forward
    pass, but what the derivative is on average; it cannot be differentiated again.

    `running_var` holds χ̂², and `running_mean`, which training leaves alone, is subtracted: zero at first, or what a
    plain batch normalization's checkpoint has. So evaluation is exactly `nn.BatchNorm1d`, also after
    `convert_norm(model, to="bn")`, which leaves the layer before with the weights that it computed with.

    Args:
        num_features: C.
        eps: ε, added to χ².
        momentum: Weight of the newest average in χ̂², or 1/(number of batches) while that is larger; None for equal
            weights of all batches.
        affine: Learn γ and β.
        window: Batches that are averaged: the batch size to act as, divided by the one there is.
        warmup_steps: Batches at the start that are normalized with their own statistics; so is every batch before the
            window is full.
        scale_after: From which batch on r is other than 1.
        group_size: Normalize ghost groups of so many samples; the first group's statistics are the window's.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = MovingAverageBatchNorm1d(1, eps=1e-12, window=2, warmup_steps=0)
        >>> layer(torch.tensor([[3.0], [3.0]])).flatten().tolist()
        [1.0, 1.0]
        >>> layer(torch.tensor([[1.0], [1.0]])).square().flatten()  # 1/((9 + 1)/2)
        tensor([0.2000, 0.2000], grad_fn=<ViewBackward0>)
    """


class MovingAverageBatchNorm2d(MovingAverageBatchNorm, nn.BatchNorm2d):
    """`MovingAverageBatchNorm1d` of [N, C, H, W]."""


class MovingAverageBatchNorm3d(MovingAverageBatchNorm, nn.BatchNorm3d):
    """`MovingAverageBatchNorm1d` of [N, C, D, H, W]."""
