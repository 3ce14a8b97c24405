"""Cross-Iteration Batch Normalization (Yao et al., 2021): statistics of recent batches, as the weights are now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.nn.functional.live import live_moments, normalize_with
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.compensation import Handover, Slopes, moved_moments, slopes_of
from wellcond.nn.norm.history import PastStatistics, before_update
from wellcond.nn.norm.outline import PrecedingLayer, find_before
from wellcond.nn.norm.window import empty_where_missing, filled, replace_oldest
from wellcond.numerics.moments import Moments, ghost_sizes, spread_samples
from wellcond.runtime.checks import check_positive_integer, checked
from wellcond.runtime.ranks import Ranks
from wellcond.runtime.texts import quoted_names

_MOMENTS = ("past_mean", "past_var")
_SLOPES = ("past_mean_at", "past_var_at", "past_mean_slope", "past_var_slope")
_ADVICE = "Name them: connect_cross_iteration(model, predecessors={layer: the layer before it})"


class _Recent(NamedTuple):
    """The past batches' statistics, as they would be with the weights of now.

    Attributes:
        mean: Shape [C, window − 1].
        var: Likewise, biased.
        used: Which of them count, as ones and zeros, shape [window − 1].
    """

    mean: Tensor
    var: Tensor
    used: Tensor


class CrossIterationBatchNorm(StatisticsNorm):
    """Cross-Iteration Batch Normalization of any number of dimensions; use `CrossIterationBatchNorm1d`, `2d`, `3d`."""

    past_mean: Tensor
    past_var: Tensor
    past_mean_at: Tensor | None  # what the slopes give for the weights that each batch had
    past_var_at: Tensor | None
    past_mean_slope: Tensor | None  # ∂μ/∂θ, the same for all channels of a group of a convolution
    past_var_slope: Tensor | None
    batches_seen: Tensor

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        window: int = 8,
        burn_in: int = 0,
        compensate: bool = True,
        *,
        group_size: int | None = None,
        synchronize: bool | dist.ProcessGroup = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_integer("window", window)
        if burn_in < 0:
            raise ValueError(f"burn_in must not be negative, got {burn_in!r}")
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
        self.burn_in = burn_in
        self.compensate = compensate
        assert self.running_var is not None
        for name in _MOMENTS:  # [C, window − 1]: the newest batch is none of the past.
            self.register_buffer(name, torch.zeros_like(self.running_var).unsqueeze(1).repeat(1, window - 1))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=device))
        for name in _SLOPES:  # Last: `torch.export` counts buffers up to the first that is None.
            self.register_buffer(name, None)
        self._past = PastStatistics()
        # What `connect_cross_iteration` says: what the layer before hands over, and this one's name.
        self._handover: Handover | None = None
        self._name = ""

    @property
    def connected(self) -> bool:
        """Whether the layer knows the one before it."""
        return self._handover is not None

    def connect(self, name: str, before: PrecedingLayer | None) -> None:
        """Say which layer comes before; `connect_cross_iteration` does this.

        Args:
            name: Of this layer.
            before: The layer before; None for none. What was kept of past batches stays if it fits.
        """
        self._name = name
        if before is None or not self.compensate:
            self._handover = None
            return
        self._handover = Handover.between(before.layer, self)
        shapes = slopes_of(before.layer, self.window - 1)
        if self.past_mean_slope is not None and self.past_mean_slope.shape == shapes[0]:
            return
        self.past_mean_slope, self.past_var_slope = (self.past_var.new_zeros(shape) for shape in shapes)
        self.past_mean_at, self.past_var_at = torch.zeros_like(self.past_mean), torch.zeros_like(self.past_var)
        self.batches_seen.zero_()

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize with the statistics of this batch and of the past ones."""
        taken = self._take()
        instances, features = live_moments(input)
        self._check_enough(input)
        batch, _ = self.merged(instances)
        own = Moments(batch.mean.detach(), batch.var.detach(), batch.elements)
        with torch.no_grad():
            recent = _Recent(*self._past.of(self, own, lambda _: self._recent(own.mean.dtype, taken)))
            self._keep(own, input, taken)
        self.track(own)
        mean, var = _across(batch, recent)
        sizes = ghost_sizes(input.shape[0], self.group_size)
        mean, var = spread_samples(mean, sizes), spread_samples(var, sizes)
        return normalize_with(features, mean, var, self.weight, self.bias, self.eps)

    def _take(self) -> Slopes | None:
        """Return what the layer before has handed over."""
        if not self.compensate:
            return None
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "CrossIterationBatchNorm does not run in nn.DataParallel, whose replicas share what is handed over"
            )
        if self._handover is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know the layer before it, whose weights its past statistics depend "
                "on: call connect_cross_iteration(model) before training, or make it with compensate=False"
            )
        taken = self._handover.take()
        if taken is None and not self.recomputing:
            raise RuntimeError(
                f"{self._name!r}: the layer before it has not run in this forward pass, as `connect_cross_iteration` "
                "saw it (called by its forward, with its input as the first argument): connect again, or make this "
                "layer with compensate=False"
            )
        return taken

    def _recent(self, dtype: torch.dtype, taken: Slopes | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the past batches' statistics to a first order in the weight, and which of them count."""
        used = filled(self.past_mean, self.batches_seen) * (self.batches_seen >= self.burn_in)
        mean, var = self.past_mean, self.past_var
        if taken is not None and self.past_mean_slope is not None:
            assert self.past_var_slope is not None
            assert self.past_mean_at is not None
            assert self.past_var_at is not None
            at = self.past_mean_at, self.past_var_at
            mean, var = moved_moments((mean, var), at, taken.along(self.past_mean_slope, self.past_var_slope))
        mean, var, used = (before_update(each, dtype).clone() for each in (mean, var, used))
        return mean, var, used

    def _keep(self, own: Moments, input: Tensor, taken: Slopes | None) -> None:
        """Keep a batch's statistics, of ghost groups the first one's, and their slopes."""
        if not self.updates or (not isinstance(own.elements, Tensor) and own.elements == 0):
            return
        sizes = ghost_sizes(input.shape[0], self.group_size)
        mean, var = (own.mean, own.var) if sizes is None else (own.mean[0], own.var[0])
        newest = {"past_mean": mean, "past_var": var}
        if taken is not None and self.window > 1:
            first = len(input) if sizes is None else sizes[0]
            ranks = None if self.synchronize is False else Ranks(self.synchronize)
            slopes = taken.measured(input[:first], mean, ranks)
            at = taken.along(*(slope.unsqueeze(1) for slope in slopes))
            newest |= dict(zip(_SLOPES, (*(each.squeeze(1) for each in at), *slopes), strict=True))
        for name, value in newest.items():
            replace_oldest(getattr(self, name), self.batches_seen, value)
        self.batches_seen.add_(1)

    def reset_running_stats(self) -> None:
        """Forget all statistics."""
        super().reset_running_stats()
        for name in (*_MOMENTS, *_SLOPES, "batches_seen"):
            if self._buffers.get(name) is not None:
                getattr(self, name).zero_()

    def statistics(self) -> Iterator[tuple[str, torch.dtype]]:
        """Name the buffers that hold statistics."""
        yield from super().statistics()
        for name in (*_MOMENTS, *_SLOPES):
            yield name, torch.float32

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        arguments = super().described() | {"window": self.window}
        if self.burn_in:
            arguments["burn_in"] = self.burn_in
        return arguments | ({} if self.compensate else {"compensate": False})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = [name for name in (*_MOMENTS, *_SLOPES, "batches_seen") if self._buffers.get(name) is not None]
        empty_where_missing(self, names, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _across(batch: Moments, recent: _Recent) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of this batch, [C] or [groups, C], and the past ones together.

    μ̄ = Σ μ_τ/k and σ̄² = Σ max(q_τ, μ_τ²)/k − μ̄², as a mean of variances and a variance of means: nothing cancels.
    """
    count = 1 + recent.used.sum()
    mean = (batch.mean + (recent.used * recent.mean).sum(1)) / count
    off = recent.used * (recent.mean - mean.unsqueeze(-1)).square()
    spread = (batch.mean - mean).square() + off.sum(-1)
    return mean, (batch.var + (recent.used * recent.var).sum(1) + spread) / count


@checked
def connect_cross_iteration(model: nn.Module, predecessors: Mapping[str, str] | None = None) -> dict[str, str]:
    """Let each `CrossIterationBatchNorm*` of a model know the layer before it, whose weights its statistics depend on.

    The layer is found in a symbolic trace (`torch.fx`) of the model; modules without such a layer inside are taken
    whole. It must be an `nn.Linear` or `nn.Conv1d/2d/3d` itself, called once in a forward pass, whose output is what is
    normalized. A forward hook hands its input and weight over. `convert_norm(model, to="cbn")` calls this. Connect
    again after modules of the model have been replaced.

    Args:
        model: With at least one such layer that compensates.
        predecessors: For each layer's name, the name of the layer before it; for models that cannot be traced.

    Returns:
        For each layer's name, the name of the layer before it; in the model's order.

    Raises:
        TypeError: If `model` is no module, or cannot be traced.
        ValueError: If it has no such layer, one comes after something else, or `predecessors` names other layers.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), CrossIterationBatchNorm2d(4), nn.ReLU())
        >>> connect_cross_iteration(model)
        {'1': '0'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = _compensating(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no CrossIterationBatchNorm1d, 2d or 3d that compensates")
    found = find_before(model, layers, _ADVICE) if predecessors is None else _given(model, layers, predecessors)
    wrong = [f"{name!r} {reason}" for name, reason in found.items() if isinstance(reason, str)]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}: past statistics can be compensated for the weights of the layer right before alone "
            "(compensate=False takes them as they are)"
        )
    connected: dict[str, str] = {}
    for name, before in found.items():
        assert isinstance(before, PrecedingLayer)
        layers[name].connect(name, before)
        connected[name] = before.name
    return connected


def connect_compensating(model: nn.Module) -> None:
    """Connect the layers of a model that compensate, if there are any."""
    if _compensating(model):
        connect_cross_iteration(model)


def _compensating(model: nn.Module) -> dict[str, CrossIterationBatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CrossIterationBatchNorm) and module.compensate
    }


def disconnect_cross_iteration(model: nn.Module) -> None:
    """Take the hooks away whose normalization is another one by now, or none of the model."""
    modules = set(model.modules())
    for module in modules:
        Handover.keep_only(
            module,
            lambda norm: norm in modules and isinstance(norm, CrossIterationBatchNorm) and norm.compensate,
        )


def not_after_a_layer(model: nn.Module, norms: Mapping[str, nn.Module], options: Mapping[str, Any]) -> dict[str, str]:
    """Return why normalizations cannot become ones that compensate, by name.

    Args:
        model: That they are in.
        norms: By name.
        options: Of the conversion.
    """
    if not options.get("compensate", True):
        return {}
    return {name: why for name, why in find_before(model, norms, _ADVICE).items() if isinstance(why, str)}


def _given(
    model: nn.Module, layers: Mapping[str, CrossIterationBatchNorm], predecessors: Mapping[str, str]
) -> dict[str, PrecedingLayer | str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if set(predecessors) != set(layers):
        names = quoted_names(layers)
        raise ValueError(f"predecessors must name a layer for each of {names}, got {list(predecessors)}")
    unknown = [name for name in predecessors.values() if name not in modules]
    if unknown:
        raise ValueError(f"predecessors must be modules of the model, got {unknown[0]!r}")
    return {
        name: PrecedingLayer.checked(before, modules[before], layers[name]) for name, before in predecessors.items()
    }


class CrossIterationBatchNorm1d(CrossIterationBatchNorm, nn.BatchNorm1d):
    """Cross-Iteration Batch Normalization of [N, C] or [N, C, L], for small batches (Yao et al., CVPR 2021).

    Training normalizes with the statistics of the last `window` batches together. Those of a batch that was seen with
    the weight θ_τ are what they would be with the weight θ of now, to the first order in the layer before:

        μ_τ(θ) ≈ μ_τ + ∂μ_τ/∂θ·(θ − θ_τ),    q_τ(θ) ≈ q_τ + ∂q_τ/∂θ·(θ − θ_τ),    q = E[x²]
        μ̄ = Σ μ_τ(θ)/k,    σ̄² = Σ max(q_τ(θ), μ_τ(θ)²)/k − μ̄²

    The gradient passes through this batch's part, the past is constant. Evaluation is exactly `nn.BatchNorm1d`, with
    running statistics of the batches as they come.

    `connect_cross_iteration` finds the layer before, and `convert_norm(model, to="cbn")` calls it; untold, training
    refuses. The derivatives cost about one weight gradient of that layer in each pass (of ghost groups: of the first
    group alone), and the window one float32 copy of its weight for each past batch. These are buffers, so a
    checkpoint holds them, and data parallelism sends rank 0's with all others.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights.
        affine: Learn γ and β.
        window: k, the batches whose statistics are joined, this one among them.
        burn_in: Batches at the start that are normalized by themselves: weights move fast then.
        compensate: Follow the weights. False takes past statistics as they were, and needs no layer before.
        group_size: Normalize ghost groups of so many samples; the first group's statistics are the window's.
        synchronize: Take the batch over all ranks (True), over a process group, or over this process alone (False).
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = CrossIterationBatchNorm1d(1, affine=False, window=2, compensate=False)
        >>> _ = layer(torch.tensor([[0.0], [2.0]]))
        >>> layer(torch.tensor([[4.0], [6.0]])).flatten()  # of 0, 2, 4 and 6
        tensor([0.4472, 1.3416])
    """


class CrossIterationBatchNorm2d(CrossIterationBatchNorm, nn.BatchNorm2d):
    """`CrossIterationBatchNorm1d` of [N, C, H, W].

    Example:
        >>> CrossIterationBatchNorm2d(8)
        CrossIterationBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, window=8)
    """


class CrossIterationBatchNorm3d(CrossIterationBatchNorm, nn.BatchNorm3d):
    """`CrossIterationBatchNorm1d` of [N, C, D, H, W]."""
