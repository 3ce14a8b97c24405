"""Switchable Normalization: each layer learns the shares of instance, layer and batch statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.functional.fusion import Unfusible
from wellcond.nn.functional.live import Carried, live_moments, normalize_with
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.numerics.moments import Moments, merge_moments, positions, unbiased
from wellcond.runtime.checks import checked

NORMALIZERS = ("in", "ln", "bn")
"""Instance, layer and batch normalization, in the order of the logits."""


class SwitchableNorm(Unfusible, StatisticsNorm):
    """Switchable Normalization of inputs of any number of dimensions; use `SwitchableNorm1d`, `2d` or `3d`."""

    tracks_batch_moments = False
    mean_logits: nn.Parameter
    var_logits: nn.Parameter | None

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        normalizers: Sequence[str] = NORMALIZERS,
        shared_logits: bool = False,
        unbiased: bool = False,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(normalizers, str) or not set(normalizers) <= set(NORMALIZERS) or len(set(normalizers)) < 2:
            raise ValueError(f"normalizers must be at least two of {', '.join(NORMALIZERS)}, got {normalizers!r}")
        with_batch = "bn" in normalizers
        if not with_batch and (group_size is not None or synchronize is not False):
            raise ValueError("group_size and synchronize say what the batch is, but 'bn' is not in normalizers")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats and with_batch,
            group_size=group_size,
            synchronize=synchronize,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.normalizers = tuple(name for name in NORMALIZERS if name in normalizers)
        self.shared_logits = shared_logits
        self.unbiased = unbiased
        logits = torch.ones(len(self.normalizers), device=device, dtype=dtype)
        self.mean_logits = nn.Parameter(logits)
        self.register_parameter("var_logits", None if shared_logits else nn.Parameter(logits.clone()))
        self._add_state()

    def _add_state(self) -> None:
        """Add what a subclass keeps beside the logits."""

    @property
    def mean_ratios(self) -> dict[str, float]:
        """The share of each normalizer in the mean."""
        return dict(zip(self.normalizers, self.ratios()[0].tolist(), strict=True))

    @property
    def var_ratios(self) -> dict[str, float]:
        """The share of each normalizer in the variance."""
        return dict(zip(self.normalizers, self.ratios()[1].tolist(), strict=True))

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Return the shares w of the means and w' of the variances, in the order of `normalizers`, of sum 1."""
        if self.var_logits is None:
            (both,) = self._shares(self.mean_logits.unsqueeze(0)).unbind()
            return both, both
        mean, var = self._shares(torch.stack([self.mean_logits, self.var_logits])).unbind()
        return mean, var

    def _shares(self, logits: Tensor) -> Tensor:
        """Return the shares that rows of logits give."""
        return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _used(self, shares: tuple[Tensor, Tensor]) -> None:
        """Learn the shares that a pass uses."""

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize with the mixture of the sample's and the batch's statistics, and keep the batch's."""
        if "bn" not in self.normalizers:
            return self._normalize(*self._instances(input), None)
        self._check_enough(input)
        instances, features = self._instances(input)
        batch, spread = self.merged(instances)
        self.track(self._as_tracked(batch, instances))
        return self._normalize(instances, features, self._own_var(spread, instances))

    def normalize_with_estimates(self, input: Tensor) -> Tensor:
        """Normalize with the mixture of the sample's own statistics and the running ones."""
        assert self.running_mean is not None
        assert self.running_var is not None
        instances, features = self._instances(input)
        dtype = instances.mean.dtype
        return self._normalize(instances, features, Moments(self.running_mean.to(dtype), self.running_var.to(dtype), 0))

    def _instances(self, input: Tensor) -> tuple[Moments, Carried]:
        """Return each instance's moments, with their graph, and the features."""
        if "bn" not in self.normalizers and positions(input) * input.shape[1] == 1:
            raise ValueError(
                "expected more than 1 value per instance: there is nothing to normalize one by, "
                f"got input size {list(input.shape)}"
            )
        instances, features = live_moments(input)
        if not self.unbiased:
            return instances, features
        count = positions(input)
        if count > 1:
            return Moments(instances.mean, instances.var * (count / (count - 1)), count), features
        if "in" in self.normalizers:
            raise ValueError(
                "unbiased=True needs more than 1 position: one has no unbiased variance; the authors' layer for them "
                f"is normalizers=('ln', 'bn'), got {list(input.shape)}"
            )
        if input.shape[1] == 1:
            raise ValueError(
                "unbiased=True needs more than 1 value per sample: one has no unbiased variance, "
                f"got {list(input.shape)}"
            )
        return instances, features

    def _own_var(self, whole: Moments, instances: Moments) -> Moments:
        """Return a layer's or a batch's moments as they normalize.

        Of instances of one position, which have no variance, the authors take the unbiased variance itself.
        """
        if self.unbiased and instances.elements == 1:
            return Moments(whole.mean, unbiased(whole), whole.elements)
        return whole

    def _as_tracked(self, batch: Moments, instances: Moments) -> Moments:
        """Return what the running statistics take in, which is made unbiased there: that which normalizes."""
        mean, var, count = batch.mean.detach(), batch.var.detach(), batch.elements
        if not self.unbiased or instances.elements == 1:
            return Moments(mean, var, count)
        return Moments(mean, var * ((count - 1) / count), count)

    def _normalize(self, instances: Moments, features: Carried, batch: Moments | None) -> Tensor:
        """Normalize with Σ w μ and Σ w' σ² of the instance, of the layer and of the batch."""
        own = {"in": instances}
        if "ln" in self.normalizers:
            own["ln"] = self._own_var(merge_moments(instances, dim=1, keepdim=True), instances)
        if batch is not None:
            own["bn"] = batch
        shares = self.ratios()
        self._used(shares)
        of_mean, of_var = (part.to(instances.mean.dtype) for part in shares)
        mean = _mixed(of_mean, [own[name].mean for name in self.normalizers])
        var = _mixed(of_var, [own[name].var for name in self.normalizers])
        return normalize_with(features, mean, var, self.weight, self.bias, self.eps)

    def reset_parameters(self) -> None:
        """Reset γ, β, running statistics, and the shares to equal ones."""
        super().reset_parameters()
        for name in ("mean_logits", "var_logits"):
            if self._parameters.get(name) is not None:
                nn.init.ones_(self.get_parameter(name))

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        arguments = super().described()
        if self.normalizers != NORMALIZERS:
            arguments["normalizers"] = self.normalizers
        for name in ("shared_logits", "unbiased"):
            if getattr(self, name):
                arguments[name] = True
        return arguments

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rename_authors(state_dict, prefix, self.num_features)
        known = [state_dict[prefix + name] for name in ("weight", "running_mean") if prefix + name in state_dict]
        if known:
            # A plain BatchNorm's checkpoint says nothing about shares.
            for name in ("mean_logits", "var_logits"):
                if self._parameters.get(name) is not None and prefix + name not in state_dict:
                    state_dict[prefix + name] = self.own_or(name, 1.0, known[0])
        given = state_dict.get(prefix + "mean_logits")
        if given is not None and given.numel() != len(self.normalizers):
            error_msgs.append(
                f"{prefix}mean_logits are of {given.numel()} normalizers, those of this layer are {self.normalizers}; "
                'the authors\' layers have ("in", "ln", "bn"), without batch normalization ("in", "ln"), '
                'and for [N, C] ("ln", "bn")'
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _mixed(shares: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return Σ w_z·part_z."""
    first, *others = shares.unbind()
    total = first * parts[0]
    for share, part in zip(others, parts[1:], strict=True):
        total = torch.addcmul(total, share, part)
    return total


def rename_authors(state_dict: dict[str, Any], prefix: str, channels: int) -> None:
    """Make of a checkpoint of the authors' code one of this: their names of the logits, their shapes [1, C, 1, 1]."""
    if prefix + "mean_weight" not in state_dict:
        return
    for name in ("mean", "var"):
        state_dict[f"{prefix}{name}_logits"] = state_dict.pop(f"{prefix}{name}_weight")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if prefix + name in state_dict and state_dict[prefix + name].numel() == channels:
            state_dict[prefix + name] = state_dict[prefix + name].reshape(channels)
    if prefix + "running_mean" in state_dict:
        # They do not count batches; any number but 0 says that there were some.
        state_dict.setdefault(prefix + "num_batches_tracked", torch.ones((), dtype=torch.int64))


class SwitchableNorm1d(SwitchableNorm, nn.BatchNorm1d):
    """Switchable Normalization of [N, C] or [N, C, L] (Luo et al., 2018; slides, part 3).

    y = γ(x − Σ w_z μ_z)/√(Σ w'_z σ²_z + ε) + β over z ∈ {IN, LN, BN}: the statistics of the channel of the instance, of
    the instance, and of the channel over the batch. The shares w = softmax(`mean_logits`), w' = softmax(`var_logits`)
    are learned, one triple a layer, from equal ones on. All three statistics come from one pass over the input. In
    evaluation IN and LN are the sample's own, BN the running statistics; after training `wellcond.calibrate(...,
    what="bn")` makes these the average over batches, which the authors found better. The logits are parameters as
    others, so weight decay pulls the shares towards equal ones: leave them out of it as γ and β (`switch_logits`).

    The authors' code differs: their instance variance is unbiased (so that a 1×1 map gives NaN), and with it the other
    two are neither biased nor unbiased, nor is the running one corrected. ``unbiased=True`` is that; instances of one
    position are then refused. Their layer for [N, C] switches between the layer and the batch alone, with the unbiased
    variances of both: ``normalizers=("ln", "bn"), unbiased=True``. Their running variance starts at 0, here at 1, their
    `momentum` weighs the old value, here as in torch the new one. `load_state_dict` takes their checkpoints (weights of
    shape [1, C, 1, 1]); those with `using_moving_average=False` hold sums over an unknown number of batches: calibrate
    after loading.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights of all batches.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics; without, evaluation uses the batch's own.
        normalizers: Which of ``"in"``, ``"ln"``, ``"bn"`` to switch between, at least two. Without ``"bn"`` nothing
            depends on the batch, and there are no running statistics.
        shared_logits: Let the same shares serve means and variances (w' = w).
        unbiased: Take the instances' unbiased variances, as the authors' code; of [N, C], those of layer and batch.
        group_size: Take the batch statistics over ghost groups of so many samples.
        synchronize: Take them over all ranks (True; "SyncSN"), over a process group, or over this process alone.
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = SwitchableNorm1d(3)
        >>> layer(torch.randn(4, 3, 5)).shape
        torch.Size([4, 3, 5])
        >>> {name: round(share, 2) for name, share in layer.mean_ratios.items()}
        {'in': 0.33, 'ln': 0.33, 'bn': 0.33}
    """


class SwitchableNorm2d(SwitchableNorm, nn.BatchNorm2d):
    """`SwitchableNorm1d` of [N, C, H, W].

    Example:
        >>> SwitchableNorm2d(8, normalizers=("in", "ln"))
        SwitchableNorm2d(8, eps=1e-05, momentum=0.1, affine=True, track_running_stats=False, normalizers=('in', 'ln'))
    """


class SwitchableNorm3d(SwitchableNorm, nn.BatchNorm3d):
    """`SwitchableNorm1d` of [N, C, D, H, W]."""


@checked
def switch_logits(model: nn.Module) -> list[nn.Parameter]:
    """Return the logits of a model's switchable normalizations, for a parameter group of their own.

    The authors train those of Sparse Switchable Normalization with a tenth of the learning rate and without weight
    decay; for all of them weight decay is a pull towards equal shares.

    Args:
        model: Any model.

    Returns:
        The parameters, each once; empty if there are none.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), SwitchableNorm2d(8))
        >>> logits = switch_logits(model)
        >>> others = [p for p in model.parameters() if all(p is not each for each in logits)]
        >>> groups = [{"params": others}, {"params": logits, "lr": 0.01, "weight_decay": 0.0}]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=1e-4)
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SwitchableNorm)]
    found = [logits for layer in layers for logits in (layer.mean_logits, layer.var_logits) if logits is not None]
    return list(dict.fromkeys(found))
