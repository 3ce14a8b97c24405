"""Momentum Batch Normalization (thesis ch. 2): training normalizes with a moving average of statistics."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond import theory
from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.history import PastStatistics, before_update
from wellcond.numerics.moments import Moments
from wellcond.runtime.checks import check_positive_integer, checked


class MomentumBatchNorm(StatisticsNorm):
    """Momentum Batch Normalization of inputs of any number of dimensions; use `MomentumBatchNorm1d`, `2d` or `3d`."""

    transient = ("_largest_batch",)
    train_mean: Tensor
    train_var: Tensor
    train_momentum: Tensor
    _largest_batch: Tensor

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        base_batch_size: int = 32,
        base_inference_decay: float = 0.85,
        *,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_integer("base_batch_size", base_batch_size)
        if not 0 <= base_inference_decay < 1:
            raise ValueError(f"base_inference_decay must lie in [0, 1), got {base_inference_decay!r}")
        super().__init__(
            num_features,
            eps,
            1.0 - base_inference_decay,
            affine,
            group_size=group_size,
            synchronize=synchronize,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.base_batch_size = base_batch_size
        self.base_inference_decay = base_inference_decay
        assert self.running_mean is not None
        assert self.running_var is not None
        self.register_buffer("train_mean", torch.zeros_like(self.running_mean))
        self.register_buffer("train_var", torch.ones_like(self.running_var))
        # A tensor, so that compiled code does not depend on its value.
        self.register_buffer("train_momentum", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("_largest_batch", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self._past = PastStatistics()

    @property
    def stat_momentum(self) -> float:
        """λ, the share of earlier batches in the statistics that train: 0 is batch normalization, 1 a frozen one."""
        return float(self.train_momentum)

    @stat_momentum.setter
    def stat_momentum(self, value: float) -> None:
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"stat_momentum must lie in [0, 1], got {value!r}")
        self.train_momentum.fill_(value)

    @property
    def seen_batch_size(self) -> int | None:
        """The largest training batch (or ghost group) since this was last set to None."""
        return int(self._largest_batch) or None

    @seen_batch_size.setter
    def seen_batch_size(self, value: int | None) -> None:
        self._largest_batch.fill_(value or 0)

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize with λ·history + (1 − λ)·batch (2.9), which becomes the history."""
        batch = self.observe(input)
        own = batch.moments
        mean, var, share = self._past.of(self, own, self._averaged)
        if self.updates:
            # The history; of ghost groups the first, as data parallelism keeps its buffers.
            self.train_mean.copy_(mean if mean.dim() == 1 else mean[0])
            self.train_var.copy_(var if var.dim() == 1 else var[0])
        if self.training and not self.recomputing:  # No statistic: schedules read it.
            self._largest_batch.copy_(torch.clamp_min(self._largest_batch, batch.samples))
        # Of ghost groups all samples enter the running statistics, whose decay is one for each sample.
        samples = batch.samples if batch.sizes is None else input.shape[0]
        self.track(own, self._inference_factor(samples))
        return normalize(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.eps,
            batch=own,
            batch_weight=share,
            sizes=batch.sizes,
            all_reduce=batch.all_reduce,
        )

    def _averaged(self, own: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Return the history with this batch averaged in, and the batch's weight in that."""
        dtype = own.mean.dtype
        momentum = self.train_momentum.to(dtype)
        mean = torch.lerp(own.mean, before_update(self.train_mean, dtype), momentum)
        return mean, torch.lerp(own.var, before_update(self.train_var, dtype), momentum), 1.0 - momentum

    def _inference_factor(self, samples: int | Tensor) -> float | Tensor | None:
        """Return 1 − τ, with τ = τ₀^(m/m₀) (2.13)."""
        if self.momentum is None:
            return None
        if isinstance(samples, Tensor):
            return 1.0 - torch.pow(self.base_inference_decay, samples / self.base_batch_size)
        return 1.0 - theory.inference_decay(samples, self.base_batch_size, self.base_inference_decay)

    def reset_parameters(self) -> None:
        """Reset γ, β, all statistics, and λ to 0."""
        super().reset_parameters()
        if "_largest_batch" in self._buffers:
            self.train_mean.zero_()
            self.train_var.fill_(1.0)
            self.train_momentum.zero_()
            self._largest_batch.zero_()

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics."""
        yield from super().statistics()
        for name in ("train_mean", "train_var", "train_momentum"):
            yield name, torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        arguments = super().described()
        if self.momentum is not None:
            del arguments["momentum"]
        arguments |= {"base_batch_size": self.base_batch_size, "base_inference_decay": self.base_inference_decay}
        return arguments

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A plain BatchNorm's checkpoint: its running statistics are the history, and training begins as its own would.
        for name, source in (("train_mean", "running_mean"), ("train_var", "running_var")):
            if prefix + name not in state_dict and prefix + source in state_dict:
                # A copy: with `assign=True` the two would be one.
                state_dict[prefix + name] = state_dict[prefix + source].clone()
        if prefix + "train_momentum" not in state_dict and prefix + "running_mean" in state_dict:
            like = state_dict[prefix + "running_mean"]
            state_dict[prefix + "train_momentum"] = self.own_or("train_momentum", 0.0, like)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class MomentumBatchNorm1d(MomentumBatchNorm, nn.BatchNorm1d):
    """Momentum Batch Normalization of [N, C] or [N, C, L], for training with small batches (thesis ch. 2).

    Training normalizes with μ ← λμ + (1 − λ)μ_B and σ² ← λσ² + (1 − λ)σ²_B (2.9), differentiated through the batch's
    part (2.14). λ is `stat_momentum`, 0 at first; let a `MomentumScheduler` raise it. Evaluation normalizes with
    running statistics of decay τ = τ₀^(m/m₀) (2.13), and is then exactly `nn.BatchNorm1d`.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        affine: Learn γ and β.
        base_batch_size: m₀, the batch size whose noise a smaller batch is to have in the end.
        base_inference_decay: τ₀, the running statistics' decay at a batch of m₀.
        group_size: Normalize ghost groups of so many samples; the first group's statistics are the history, as data
            parallelism keeps its buffers. All samples enter the running statistics, with the decay τ₀^(N/m₀).
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = MomentumBatchNorm1d(3)
        >>> layer.stat_momentum = 0.5
        >>> _ = layer(torch.ones(4, 3) * torch.tensor([[0.0], [0.0], [2.0], [2.0]]))
        >>> layer.train_mean  # halfway from 0 to the batch's mean
        tensor([0.5000, 0.5000, 0.5000])
    """


class MomentumBatchNorm2d(MomentumBatchNorm, nn.BatchNorm2d):
    """`MomentumBatchNorm1d` of [N, C, H, W].

    Example:
        >>> MomentumBatchNorm2d(8)
        MomentumBatchNorm2d(8, eps=1e-05, affine=True, base_batch_size=32, base_inference_decay=0.85)
    """


class MomentumBatchNorm3d(MomentumBatchNorm, nn.BatchNorm3d):
    """`MomentumBatchNorm1d` of [N, C, D, H, W]."""
