"""Instance-Batch Normalization: instance normalization of some channels, batch normalization of the others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.functional.live import live_moments, normalize_with
from wellcond.nn.norm.base import StatisticsNorm

_ORDERS = ("instance_first", "batch_first")


class InstanceBatchNorm2d(StatisticsNorm, nn.BatchNorm2d):
    """Instance normalization of a part of the channels and batch normalization of the rest (Pan et al., ECCV 2018).

    The layer of IBN-Net: instance normalization takes out appearance (style, contrast), batch normalization keeps what
    discriminates. `ibn_a` puts it into known networks.

    All tensors have size C, as those of the `nn.BatchNorm2d` that it stands in for: γ and β are one tensor each for
    both parts, and running statistics are kept of the instance-normalized channels, too. Those are not used for
    evaluation, which takes such a channel's statistics from each sample as training does; they are what conversion back
    to batch normalization needs. An input of one position has no instance statistics: its instance-normalized channels
    become β. The authors' checkpoints, with the two parts' tensors under ``IN.`` and ``BN.``, and those of a plain
    `nn.BatchNorm2d` can be loaded.

    Args:
        num_features: C.
        instance_fraction: Of the channels to normalize by instance, in [0, 1]; 0 is `nn.BatchNorm2d`, 1 is
            `nn.InstanceNorm2d` with γ and β.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics; without, evaluation uses the batch's own.
        order: Which part comes first, and is rounded down. ``"instance_first"``: the first ⌊C·fraction⌋ channels are
            normalized by instance, as in the authors' ResNets. ``"batch_first"``: the first ⌊C·(1 − fraction)⌋ channels
            are normalized by batch, as in their DenseNets.
        group_size: Take the batch's part of the statistics in ghost groups of so many samples.
        synchronize: Take it over all ranks (True), over a process group, or over this process alone (False).
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = InstanceBatchNorm2d(4, instance_fraction=0.25)
        >>> y = layer(torch.randn(8, 4, 5, 5))
        >>> y[:, :1].mean((2, 3)).abs().max() < 1e-6, y[:, 1:].mean((0, 2, 3)).abs().max() < 1e-6
        (tensor(True), tensor(True))
    """

    def __init__(
        self,
        num_features: int,
        instance_fraction: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        order: str = "instance_first",
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_instance_fraction(instance_fraction)
        if order not in _ORDERS:
            raise ValueError(f"order must be 'instance_first' or 'batch_first', got {order!r}")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            group_size=group_size,
            synchronize=synchronize,
            device=device,
            dtype=dtype,
        )
        self.instance_fraction = instance_fraction
        self.order = order

    @property
    def instance_channels(self) -> int:
        """How many channels are normalized by instance."""
        # Multiplied and rounded as the authors do, so that their checkpoints fit.
        if self.order == "instance_first":
            return int(self.num_features * self.instance_fraction)
        return self.num_features - int(self.num_features * (1 - self.instance_fraction))

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize a training batch with its own statistics, and take them into the running ones."""
        if self.instance_channels == 0:
            return super().normalize_batch(input)
        self._check_enough(input)
        instances, features = live_moments(input)
        batch, spread = self.merged(instances)
        self.track(batch)
        mean, var = self._join(instances.mean, spread.mean), self._join(instances.var, spread.var)
        return normalize_with(features, mean, var, self.weight, self.bias, self.eps)

    def normalize_with_estimates(self, input: Tensor) -> Tensor:
        """Normalize each sample with its own statistics and the running ones."""
        if self.instance_channels == 0:
            return super().normalize_with_estimates(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        instances, features = live_moments(input)
        mean, var = self._join(instances.mean, self.running_mean), self._join(instances.var, self.running_var)
        return normalize_with(features, mean, var, self.weight, self.bias, self.eps)

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        arguments: dict[str, object] = {"instance_fraction": self.instance_fraction} | super().described()
        if self.order != "instance_first":
            arguments["order"] = self.order
        return arguments

    def _join(self, instances: Tensor, batch: Tensor) -> Tensor:
        """Return [N, C] of each instance's statistics [N, C] and those of batches, [N, C] or [C], each its channels."""
        batch = batch.to(instances.dtype).expand_as(instances)
        count = self.instance_channels
        if self.order == "instance_first":
            return torch.cat([instances[:, :count], batch[:, count:]], 1)
        rest = self.num_features - count
        return torch.cat([batch[:, :rest], instances[:, rest:]], 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if any(prefix + key in state_dict for key in ("IN.weight", "BN.weight", "BN.running_mean")):
            error = self._join_parts(state_dict, prefix)
            if error is not None:
                rest[-1].append(error)
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _join_parts(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Replace the entries of the authors' two layers by ours, or return what is wrong with them.

        Their instance normalization keeps no running statistics: it has those of a new layer.
        """
        parts = {"IN": self.instance_channels, "BN": self.num_features - self.instance_channels}
        if self.order == "batch_first":
            parts = dict(reversed(parts.items()))
        joined: dict[str, Tensor] = {}
        for name, initial in (("weight", None), ("bias", None), ("running_mean", 0.0), ("running_var", 1.0)):
            found: dict[str, Tensor] = {
                part: state_dict.pop(f"{prefix}{part}.{name}")
                for part in parts
                if f"{prefix}{part}.{name}" in state_dict
            }
            if not found:
                continue
            like = next(iter(found.values()))
            for part, channels in parts.items():
                if part not in found and (initial is not None or channels == 0):
                    found[part] = like.new_full((channels,), 0.0 if initial is None else initial)
            sizes = {part: found[part].numel() if part in found else 0 for part in parts}
            if sizes != parts:
                return (
                    f"{prefix}{{IN,BN}}.{name}: the checkpoint has {sizes['IN']} instance- and {sizes['BN']} "
                    f"batch-normalized channels, the layer {parts['IN']} and {parts['BN']} (order={self.order!r})"
                )
            joined[name] = torch.cat([found[part] for part in parts])
        counter = state_dict.pop(f"{prefix}BN.num_batches_tracked", None)
        if counter is not None:
            joined["num_batches_tracked"] = counter
        state_dict.update({prefix + name: tensor for name, tensor in joined.items()})
        return None


def check_instance_fraction(value: object) -> None:
    """Raise a ValueError unless ``value`` is a number in [0, 1].

    >>> check_instance_fraction(1.5)
    Traceback (most recent call last):
        ...
    ValueError: instance_fraction must lie in [0, 1], got 1.5
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"instance_fraction must lie in [0, 1], got {value!r}")
