"""Population normalization and gamma decay, which together approximate what batch normalization does (slides)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.history import PastStatistics, before_update
from wellcond.numerics.moments import Moments, statistics_dtype
from wellcond.runtime.checks import checked


class PopulationNorm(StatisticsNorm):
    """Population normalization of inputs of any number of dimensions; use `PopulationNorm1d`, `2d` or `3d`."""

    # A population is averaged far longer than a moving average that is only evaluated with.
    inherited_arguments = ("eps",)

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
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
        self._past = PastStatistics()

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize with the running statistics, this batch among them."""
        batch = self.observe(input)
        own = batch.moments
        mean, var, share = self._past.of(self, own, self._population)
        self.track(own)
        return normalize(input, mean, var, self.weight, self.bias, self.eps, own, share, batch.sizes, batch.all_reduce)

    def _population(self, own: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Return the running statistics with this batch among them, and the batch's weight in them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        dtype = own.mean.dtype
        factor = self._weight_of(before_update(self.num_batches_tracked, torch.int64) + 1, dtype)
        mean = torch.lerp(before_update(self.running_mean, dtype), own.mean, factor)
        # The batch's own variance enters biased, as it normalizes; the average of the past is unbiased.
        return mean, torch.lerp(before_update(self.running_var, dtype), own.var, factor), factor

    def factor(self) -> float | Tensor:
        """Return the weight of the newest batch: equal weights until that would be less than `momentum`."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        return self._weight_of(self.num_batches_tracked, self.running_mean.dtype)

    def _weight_of(self, batches: Tensor, dtype: torch.dtype) -> Tensor:
        equal = batches.to(dtype).clamp_min(1).reciprocal()
        return equal if self.momentum is None else equal.clamp_min(self.momentum)


class PopulationNorm1d(PopulationNorm, nn.BatchNorm1d):
    """Normalization of [N, C] or [N, C, L] with the statistics of the whole data, by a long average (slides).

    Training normalizes as evaluation does, with running statistics; the batch has the weight `momentum` in them, or
    1/(number of batches) while that is larger, and the gradient passes through the statistics with that weight. So the
    first batch is normalized as by batch normalization, and noise fades as the average grows. `wellcond.calibrate`
    (``what="bn"``) replaces the average by exact statistics of the data.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights of all batches.
        affine: Learn γ and β.
        group_size: Take statistics in ghost groups of so many samples.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer, x = PopulationNorm1d(3), torch.randn(8, 3, 4)
        >>> torch.allclose(layer(x), nn.BatchNorm1d(3)(x), atol=1e-5)  # the first batch
        True
    """


class PopulationNorm2d(PopulationNorm, nn.BatchNorm2d):
    """`PopulationNorm1d` of [N, C, H, W]."""


class PopulationNorm3d(PopulationNorm, nn.BatchNorm3d):
    """`PopulationNorm1d` of [N, C, D, H, W]."""


@checked
def gamma_decay(
    model: nn.Module,
    coefficient: float | Callable[[str, nn.Module], float | Tensor] = 1e-4,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> Tensor:
    """Return Σ ζγ² over the scales of the model's batch normalizations, to be added to the loss.

    With `PopulationNorm*` layers this stands for the regularization that batch normalization's noise is:
    E[L(BN)] ≈ L(PN) + ζγ² (slides). `wellcond.theory.gamma_decay_coefficient` gives ζ from the batch size and the
    Fisher information of γ.

    Args:
        model: Any model with `nn.BatchNorm*` layers or those of this library that stand in for them.
        coefficient: ζ: a number, or a function of (qualified name, layer) that returns a number or a tensor [C].
        where: A predicate of (qualified name, layer) that says which layers; all by default.

    Returns:
        A scalar, differentiable in the scales.

    Raises:
        ValueError: If the coefficient is negative or no layer has a scale.

    Example:
        >>> gamma_decay(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), 0.1)
        tensor(0.3000, grad_fn=<SumBackward0>)
    """
    penalties = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or module.weight is None or (where and not where(name, module)):
            continue
        zeta = coefficient(name, module) if callable(coefficient) else coefficient
        if not isinstance(zeta, Tensor) and not zeta >= 0:
            raise ValueError(f"coefficient must not be negative, got {zeta!r} for {name!r}")
        penalties.append((zeta * module.weight.to(statistics_dtype(module.weight.dtype)).square()).sum())
    if not penalties:
        raise ValueError("gamma_decay found no batch normalization with a scale in the model")
    return torch.stack([penalty.to(penalties[0]) for penalty in penalties]).sum()
