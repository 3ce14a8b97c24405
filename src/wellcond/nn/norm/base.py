"""The base of the layers that stand in for `nn.BatchNorm*`: it takes a batch's statistics and keeps running ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.buffers import KeptStatistics
from wellcond.numerics.moments import (
    Moments,
    ghost_moments,
    ghost_sizes,
    instance_and_ghost_moments,
    merge_samples,
    merge_unequal,
    positions,
    spread_samples,
    unbiased,
)
from wellcond.runtime.checks import LARGEST_SIZE, check_positive_integer
from wellcond.runtime.ranks import Ranks


class BatchStatistics(NamedTuple):
    """The statistics of a training batch that a layer normalizes with.

    Attributes:
        moments: Of each channel over the batch, [C], or over each ghost group, [groups, C].
        sizes: Samples of each group; None for one group of all.
        samples: m, how many samples are behind one set of statistics; over several ranks a scalar tensor.
        all_reduce: Sums over the ranks that share the batch; None where each has its own.
        instances: Moments of each instance, [N, C], where the layer asked for them.
    """

    moments: Moments
    sizes: tuple[int, ...] | None
    samples: int | Tensor
    all_reduce: Callable[[Tensor], Tensor] | None
    instances: Moments | None


class StatisticsNorm(KeptStatistics, _BatchNorm):
    """Base of the layers that normalize with batch statistics in training, and keep estimates of them for evaluation.

    Subclasses say how a training batch is normalized (`normalize_batch`) and, where it is not as in batch
    normalization, how evaluation is done (`normalize_with_estimates`).

    Running statistics, their names and their meaning are those of `nn.BatchNorm*`: `momentum` weighs the new value,
    None averages all batches equally, `running_var` is unbiased. All statistics stay in float32 or wider when the
    module is cast to half precision. A forward pass that activation checkpointing repeats uses the same statistics as
    the first one and updates nothing.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics, in [0, 1]; None for equal weights of all batches.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics; without, evaluation uses the batch's own.
        group_size: Normalize ghost groups of so many samples, in the batch's order; None for the batch as a whole.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters.

    Raises:
        ValueError: If an argument is out of its range, or group_size and synchronize contradict each other.
    """

    # Whether the running statistics take in a batch's plain mean and variance, and nothing else.
    tracks_batch_moments: ClassVar[bool] = True
    # Arguments that `convert_norm` takes over from a batch normalization of another kind.
    inherited_arguments: ClassVar[tuple[str, ...]] = ("eps", "momentum")
    # Arguments that follow from the model that a layer is in: no options of `convert_norm`.
    decided_by_model: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        num_features: int,
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
        check_positive_integer("num_features", num_features, LARGEST_SIZE)
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps!r}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1] or be None, got {momentum!r}")
        if group_size is not None:
            check_positive_integer("group_size", group_size)
            if synchronize is not False:
                raise ValueError("group_size and synchronize contradict each other: groups lie within a rank's batch")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # Older versions of torch have no such argument.
            self.register_parameter("bias", None)
        self.group_size = group_size
        self.synchronize = synchronize
        self._widen_statistics()

    def forward(self, input: Tensor) -> Tensor:
        """Normalize.

        Args:
            input: Shape [N, C, *positions] (or [N, C] for the 1d layers), any floating-point dtype and memory format.

        Returns:
            The same shape, dtype and memory format.

        Raises:
            ValueError: If the shape does not fit, or a training batch (or group) has one value per channel.
        """
        if isinstance(input, Proxy):
            # A leaf of symbolic traces, as the layers that it stands in for are.
            path = input.tracer.path_of_module(self)
            return cast(Tensor, input.tracer.create_proxy("call_module", path, (input,), {}))
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if input.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got input of size {list(input.shape)}")
        if input.numel() == 0 and (not self.uses_batch or self.synchronize is False):
            return self._affine_of_nothing(input)
        if self.uses_batch:
            return self.normalize_batch(input)
        return self.normalize_with_estimates(input)

    @property
    def uses_batch(self) -> bool:
        """Whether the next forward pass normalizes with the batch's own statistics."""
        return self.training or self.running_mean is None

    @property
    def updates(self) -> bool:
        """Whether the next forward pass takes its batch into the statistics that are kept.

        Not if `track_running_stats` was set to False, as statistics are frozen, nor in a pass that is repeated.
        """
        return self.training and self.track_running_stats and self.running_mean is not None and not self.recomputing

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize a training batch with its own statistics, and take them into the running ones."""
        batch = self.observe(input)
        self.track(batch.moments)
        return normalize(
            input,
            batch.moments.mean,
            batch.moments.var,
            self.weight,
            self.bias,
            self.eps,
            batch=batch.moments,
            sizes=batch.sizes,
            all_reduce=batch.all_reduce,
        )

    def normalize_with_estimates(self, input: Tensor) -> Tensor:
        """Normalize with the running statistics, as `nn.BatchNorm*` in evaluation."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self._weight(), self._bias(), False, 0.0, self.eps
        )

    def observe(self, input: Tensor, with_instances: bool = False) -> BatchStatistics:
        """Return the batch's moments, without a graph.

        Args:
            input: Shape [N, C, *positions].
            with_instances: Return each instance's moments, too; the pass over the input is the same.
        """
        sizes = ghost_sizes(input.shape[0], self.group_size)
        self._check_enough(input)
        instances = all_reduce = None
        samples: int | Tensor = input.shape[0] if sizes is None else sizes[0]
        with torch.no_grad():
            if with_instances:
                instances, moments = instance_and_ghost_moments(input, sizes)
            else:
                moments = ghost_moments(input, sizes)
            if self.synchronize is not False:
                ranks = Ranks(self.synchronize)
                if ranks.size > 1:
                    moments = _merge_over_ranks(moments, ranks)
                    all_reduce = ranks.total
                    samples = torch.as_tensor(moments.elements).squeeze() / max(positions(input), 1)
        return BatchStatistics(moments, sizes, samples, all_reduce, instances)

    def merged(self, instances: Moments) -> tuple[Moments, Moments]:
        """Return the batch's moments, with the graph that its instances' have.

        Args:
            instances: Shape [N, C], from `live_moments`.

        Returns:
            Of the batch over all ranks that share it, [C], or of each ghost group, [groups, C]; and the same so that it
            broadcasts to [N, C].
        """
        sizes = ghost_sizes(instances.mean.shape[0], self.group_size)
        batch = merge_samples(instances, sizes)
        if self.synchronize is not False:
            ranks = Ranks(self.synchronize)
            batch = batch if ranks.size == 1 else _merge_over_ranks(batch, ranks)
        spread = Moments(spread_samples(batch.mean, sizes), spread_samples(batch.var, sizes), batch.elements)
        return batch, spread

    def track(self, moments: Moments, factor: float | Tensor | None = None) -> None:
        """Take a batch's moments into the running statistics, those of ghost groups as their average.

        Args:
            moments: Shape [C] or [groups, C].
            factor: Weight of the new value; None for what `momentum` says.
        """
        empty = not isinstance(moments.elements, Tensor) and moments.elements == 0
        if not self.updates or empty:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            factor = self.factor() if factor is None else factor
            mean, var = moments.mean, unbiased(moments)
            if mean.dim() == 2:
                mean, var = mean.mean(0), var.mean(0)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            self.running_var.lerp_(var.to(self.running_var.dtype), factor)

    def factor(self) -> float | Tensor:
        """Return the weight of the newest batch in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        return self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics, each with the narrowest dtype that it may have."""
        for name in ("running_mean", "running_var"):
            yield name, torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        arguments: dict[str, object] = {"eps": self.eps, "momentum": self.momentum, "affine": self.affine}
        if self.affine and self.bias is None:
            arguments["bias"] = False
        if not self.track_running_stats:
            arguments["track_running_stats"] = False
        if self.group_size is not None:
            arguments["group_size"] = self.group_size
        if self.synchronize is not False:
            arguments["synchronize"] = True if self.synchronize is True else "<process group>"
        return arguments

    def own_arguments(self, names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the layer was made with, to make another one like it.

        Args:
            names: Of the constructor's arguments.
            options: What the other one is given instead.

        Returns:
            Arguments by name, over which the options go.
        """
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def extra_repr(self) -> str:
        """Say what the layer was made with."""
        return ", ".join([str(self.num_features), *(f"{name}={value}" for name, value in self.described().items())])

    def _check_enough(self, input: Tensor) -> None:
        if self.synchronize is not False:
            return
        sizes = ghost_sizes(input.shape[0], self.group_size)
        smallest = input.shape[0] if sizes is None else min(sizes)
        if smallest * positions(input) == 1:
            where = "" if sizes is None else f" in a group of {smallest} sample"
            raise ValueError(
                f"expected more than 1 value per channel when training{where}, got input size {list(input.shape)}"
            )

    def _affine_of_nothing(self, input: Tensor) -> Tensor:
        """Return an empty batch with γ and β in its graph, so that their gradients are zeros, not missing."""
        output = input.clone()
        shape = (1, -1) + (1,) * (input.dim() - 2)
        if self.weight is not None:
            output = output * self.weight.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    def _weight(self) -> Tensor | None:
        """Return γ in the statistics' dtype."""
        return self.weight if self.weight is None or self.running_mean is None else self.weight.to(self.running_mean)

    def _bias(self) -> Tensor | None:
        """Return β in the statistics' dtype."""
        return self.bias if self.bias is None or self.running_mean is None else self.bias.to(self.running_mean)


def _merge_over_ranks(moments: Moments, ranks: Ranks) -> Moments:
    """Return the moments of all ranks' batches together; an empty batch counts for nothing."""
    count = torch.full((1,), float(moments.elements), dtype=moments.mean.dtype, device=moments.mean.device)
    gathered = ranks.differentiable_gather(torch.cat([moments.mean, moments.var, count]))
    mean, var = gathered[:, :-1].chunk(2, dim=1)
    return merge_unequal(Moments(mean, var, gathered[:, -1:].detach()))
