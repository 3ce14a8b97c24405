"""Iterative Normalization whitens the channels of a batch by a few steps of Newton's iteration."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.norm.decorrelated import BatchWhitening
from wellcond.numerics.newton_schulz import newton_whitening
from wellcond.runtime.checks import check_positive_integer, checked


class IterNorm(BatchWhitening):
    """Iterative Normalization of inputs of any number of dimensions; use `IterNorm2d`."""

    @checked
    def __init__(
        self,
        num_features: int,
        channels_per_group: int = 64,
        steps: int = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_integer("steps", steps)
        super().__init__(
            num_features,
            channels_per_group,
            eps,
            momentum,
            affine,
            track_running_stats,
            group_size=group_size,
            synchronize=synchronize,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.steps = steps

    def whitening(self, covariance: Tensor) -> Tensor:
        """Return Newton's approximation of (Σ + εI)^(−1/2)."""
        return newton_whitening(covariance, self.eps, self.steps)

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        width = {"channels_per_group": self.channels_per_group}
        return {**width, "steps": self.steps, **super().described()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "running_wm" in state_dict:
            self._rename_authors(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _rename_authors(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Make of a checkpoint of the authors' code one of this: their name of W, their shapes [1, C, 1, 1]."""
        state_dict[prefix + "running_whitening"] = state_dict.pop(prefix + "running_wm")
        for name in ("weight", "bias", "running_mean"):
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].flatten()
        if self.running_var is not None and self.num_batches_tracked is not None:
            # They keep no variances, and do not count batches; any number but 0 says that there were some.
            mean = state_dict[prefix + "running_mean"]
            state_dict.setdefault(prefix + "running_var", self.own_or("running_var", 1.0, mean))
            state_dict.setdefault(prefix + "num_batches_tracked", torch.ones((), dtype=torch.int64))


class IterNorm2d(IterNorm, nn.BatchNorm2d):
    """Partial whitening of groups of channels of [N, C, H, W] by matrix products alone (Huang et al., 2019).

    As `DecorrelatedBatchNorm2d`, but W is what T steps of Newton's iteration for (Σ + εI)^(−1/2) give, from I on. At
    T = 5 directions of much less variance than the largest stay smaller than 1: Σ of eigenvalues 1, 0.1, 0.01, 0.001
    leaves variances of 1, 0.99, 0.40, 0.05. This is intended: what small directions hold is mostly the batch's noise,
    and T bounds how much it is magnified. More steps whiten more; with some 20 the layer is a `DecorrelatedBatchNorm2d`
    without eigendecompositions.

    A group should see more values (N·H·W) than it has channels; with fewer its covariance is singular, which T and ε
    keep harmless. Evaluation uses the running mean and the running average of the batches' W.

    `load_state_dict` takes checkpoints of the authors' code (`running_wm`, weights of shape [1, C, 1, 1]), given the
    same width of groups. They hold no variances, so that `running_var` stays what it was until training goes on.

    Args:
        num_features: C.
        channels_per_group: The most channels that are whitened together. The width of the groups is the largest divisor
            of C not above it, and then the attribute of this name. The authors halve the bound until it divides C,
            which is the same for powers of two.
        steps: T.
        eps: ε, added to the covariance's diagonal.
        momentum: Weight of a new batch in the running statistics; None for equal weights of all batches.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics; without, evaluation uses the batch's own.
        group_size: Whiten ghost groups of so many samples, in the batch's order; None for the batch as a whole.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = IterNorm2d(96)
        >>> layer(torch.randn(8, 96, 6, 6)).shape
        torch.Size([8, 96, 6, 6])
        >>> layer
        IterNorm2d(96, channels_per_group=48, steps=5, eps=1e-05, momentum=0.1, affine=True)
    """
