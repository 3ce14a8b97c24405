"""EvalNorm (Singh and Shrivastava, 2019): evaluation mixes an instance's own statistics into the running ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import BatchStatistics
from wellcond.nn.norm.instance import InstanceInference
from wellcond.numerics.moments import spread_samples
from wellcond.runtime.checks import checked


def mixed_moments(
    instance: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor],
    shares: tuple[Tensor | float, Tensor | float],
    elements: int | None,
) -> tuple[Tensor, Tensor]:
    """Return f_μ = αμ_s + (1 − α)μ and f_σ = βσ²_s + (1 − β)σ² + β(1 − β)(d − v), with d = (μ_s − μ)².

    v is the part of d that a rest of finitely many values explains. With β = 1/m the rest has n = hw(m − 1) independent
    values, whose biased variance is (n − 1)/n σ² on average, and whose mean strays by σ²/n from μ (3.7, its inverted
    factor put right). In (3.6) that is −(1 − β)²σ²/n = −β(1 − β)σ²/hw: v = σ²/hw.

    Args:
        instance: μ_s and σ²_s, biased, shape [N, C].
        running: μ and σ², unbiased, shape [C].
        shares: α and β.
        elements: hw, the positions of an instance; None takes the rest for the population, v = 0.
    """
    (mean, var), (long_mean, long_var), (alpha, beta) = instance, running, shares
    distance = (mean - long_mean).square()
    if elements is not None:
        distance = distance - long_var / elements
    return torch.lerp(long_mean, mean, alpha), torch.lerp(long_var, var, beta) + beta * (1 - beta) * distance


class EvalNorm(InstanceInference):
    """EvalNorm of inputs of any number of dimensions; use `EvalNorm1d`, `2d` or `3d`."""

    mean_mixture: Tensor
    var_mixture: Tensor

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        learn: bool = True,
        mixture_lr: float = 0.05,
        *,
        mixture: float | None = None,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < mixture_lr < 2:
            raise ValueError(f"mixture_lr must lie between 0 and 2, got {mixture_lr!r}")
        if mixture is not None and not 0 <= mixture <= 1:
            raise ValueError(f"mixture must lie between 0 and 1, got {mixture!r}")
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
        self.learn = learn
        self.mixture_lr = mixture_lr
        self.mixture = mixture
        # α and β. 0 is batch normalization's evaluation.
        first = torch.full((), self._first_mixture, dtype=torch.float32, device=device)
        self.register_buffer("mean_mixture", first)
        self.register_buffer("var_mixture", first.clone())

    @property
    def _first_mixture(self) -> float:
        """What α and β are before anything is learned: those chosen, or none."""
        return 0.0 if self.mixture is None else float(self.mixture)

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize as batch normalization, and move α and β."""
        batch = self.observe(input, with_instances=self.mixture is None)
        self.track(batch.moments)
        # A rank without samples takes part: the others wait for its sums.
        if self.updates and self.mixture is None:
            self._learn(batch)
        own = batch.moments
        return normalize(
            input, own.mean, own.var, self.weight, self.bias, self.eps, own, 1.0, batch.sizes, batch.all_reduce
        )

    def _learn(self, batch: BatchStatistics) -> None:
        """Descend the gradient of Σ (f_μ − μ_B)²/σ² + ((f_σ − σ²_B)/σ²)², each step relative to the curvature."""
        assert batch.instances is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        with torch.no_grad():
            if not self.learn:
                # Averaged, so that one short batch at the end does not decide.
                share = torch.ones_like(self.mean_mixture) / batch.samples
                newest = torch.as_tensor(self.factor(), dtype=share.dtype, device=share.device)
                for buffer in (self.mean_mixture, self.var_mixture):
                    buffer.copy_(torch.where(buffer > 0, torch.lerp(buffer, share, newest), share))
                return
            mean, var = batch.instances[:2]
            own_mean, own_var = (spread_samples(part, batch.sizes) for part in batch.moments[:2])
            long_mean, long_var = self.running_mean.to(mean.dtype), self.running_var.to(mean.dtype)
            scale = long_var + self.eps
            of_mean = (mean - long_mean) / scale.sqrt()
            error_mean = (own_mean - long_mean) / scale.sqrt() - self.mean_mixture * of_mean
            distance = (mean - long_mean).square()
            mixture = self.var_mixture
            predicted = long_var + mixture * (var - long_var) + mixture * (1 - mixture) * distance
            of_var = (var - long_var + (1 - 2 * mixture) * distance) / scale
            error_var = (own_var - predicted) / scale
            sums = torch.stack(
                [
                    (error_mean * of_mean).sum(),
                    of_mean.square().sum(),
                    (error_var * of_var).sum(),
                    of_var.square().sum(),
                ]
            )
            if batch.all_reduce is not None:
                sums = batch.all_reduce(sums)
            rate = self.mixture_lr if self.momentum is not None else self.factor()
            for buffer, slope, curvature in ((self.mean_mixture, *sums[:2]), (self.var_mixture, *sums[2:])):
                step = torch.where(curvature > 0, slope / curvature.clamp_min(torch.finfo(slope.dtype).tiny), 0.0)
                buffer.add_((rate * step.nan_to_num(0.0, 0.0, 0.0)).to(buffer.dtype)).clamp_(0.0, 1.0)

    def predict(self, mean: Tensor, var: Tensor, elements: int) -> tuple[Tensor, Tensor]:
        """Mix the instance's statistics and the running ones: `mixed_moments`, the finite rest where 1/m is fixed."""
        assert self.running_mean is not None
        assert self.running_var is not None
        running = self.running_mean.to(mean.dtype), self.running_var.to(mean.dtype)
        shares = self.mean_mixture.to(mean.dtype), self.var_mixture.to(mean.dtype)
        whole = self.learn or self.mixture is not None
        return mixed_moments((mean, var), running, shares, None if whole else elements)

    def reset_running_stats(self) -> None:
        """Forget all statistics."""
        super().reset_running_stats()
        if "mean_mixture" in self._buffers:
            self.mean_mixture.fill_(self._first_mixture)
            self.var_mixture.fill_(self._first_mixture)

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics."""
        yield from super().statistics()
        for name in ("mean_mixture", "var_mixture"):
            yield name, torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        if self.mixture is not None:
            return super().described() | {"mixture": self.mixture}
        return super().described() | {"learn": self.learn} | ({"mixture_lr": self.mixture_lr} if self.learn else {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A plain BatchNorm's checkpoint has no mixture: evaluation is then batch normalization's.
        for name in ("mean_mixture", "var_mixture"):
            if prefix + name not in state_dict and prefix + "running_mean" in state_dict:
                like = state_dict[prefix + "running_mean"]
                first = torch.full_like(getattr(self, name), self._first_mixture, device=like.device)
                state_dict[prefix + name] = first
        super()._load_from_state_dict(state_dict, prefix, *rest)


class EvalNorm1d(EvalNorm, nn.BatchNorm1d):
    """Batch normalization of [N, C] or [N, C, L] that is evaluated with a mixture of statistics.

    Training is batch normalization. Evaluation normalizes an instance with f_μ = αμ_s + (1 − α)μ and
    f_σ = βσ²_s + (1 − β)σ² + β(1 − β)(μ_s − μ)², μ and σ² the running statistics. α and β, one pair for the layer, are
    learned by gradient descent on the squared differences to the training batches' statistics, in units of σ², each
    step divided by the batch's curvature so that one rate suits every layer (EvalNorm, Singh and Shrivastava, 2019,
    whose code is not public; thesis 3.6–3.7).

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights, also of the steps of α and β.
        affine: Learn γ and β.
        learn: Learn α and β. False: α = β = 1/m, m the training batch or group (3.5), averaged like the statistics;
            f_σ is then β(1 − β)σ²/hw less, hw the positions of an instance, since the rest of a batch is finite (3.7):
            what independent values have on average.
        mixture_lr: Rate of α's and β's descent: 1 would fit each batch alone.
        mixture: α = β of your own choice, and nothing is learned: inference with example weighing (Summers and
            Dinneen, 2020), whose weight is tuned on validation data; also for networks that are trained already.
        group_size: Train in ghost groups of so many samples.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = EvalNorm1d(3, learn=False)
        >>> _ = layer(torch.randn(4, 3, 8))
        >>> layer.mean_mixture
        tensor(0.2500)
    """


class EvalNorm2d(EvalNorm, nn.BatchNorm2d):
    """`EvalNorm1d` of [N, C, H, W]."""


class EvalNorm3d(EvalNorm, nn.BatchNorm3d):
    """`EvalNorm1d` of [N, C, D, H, W]."""
