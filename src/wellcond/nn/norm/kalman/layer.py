"""Kalman Normalization filters a micro-batch's statistics with a prediction from the layers before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wellcond.nn.functional.live import live_moments, normalize_with
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.history import PastStatistics
from wellcond.nn.norm.kalman.graph import Read, Statistics, StatisticsGraph, propagate
from wellcond.numerics.moments import Moments, ghost_sizes, merge_samples, spread_samples
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import check_positive_integer, checked, checks_itself

__all__ = ["KalmanBatchNorm2d", "filter_moments", "propagate"]

# A prediction whose variance is on average so many times the observed one is of no use, in the authors' code too.
_IMPLAUSIBLE = 100.0
# R at the start: on the small side, since what is normalized with more variance than it has fades from layer to layer.
_FIRST_NOISE = 0.1
_LEARNED = ("transition", "transition_bias", "log_noise", "gain_logit")


def filter_moments(
    mean: Tensor, var: Tensor, predicted_mean: Tensor, predicted_var: Tensor, gain: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Correct predicted statistics by observed ones: the update step of a Kalman filter with gain q.

    μ = μ' + q·(z − μ') and Σ = Σ' + q·(C − Σ') + (1 − q)·q·(z − μ')², the mean and variance of the mixture of the
    prediction (μ', Σ') and the observation (z, C) with weights 1 − q and q. As in the authors' code, the observation
    stays as it is if Σ'/C is 100 or more on average over all entries.

    Args:
        mean: z, any shape.
        var: C, the same shape, biased.
        predicted_mean: μ', the same shape.
        predicted_var: Σ', the same shape.
        gain: q, in [0, 1].

    Returns:
        μ and Σ.

    Example:
        >>> one = torch.ones(1)
        >>> filter_moments(4 * one, 2 * one, 0 * one, one, gain=0.25)
        (tensor([1.]), tensor([4.2500]))
    """
    off = mean - predicted_mean
    filtered_mean = predicted_mean + gain * off
    filtered_var = predicted_var + gain * (var - predicted_var) + (1 - gain) * gain * off.square()
    plausible = (predicted_var.detach() / var.detach()).mean() < _IMPLAUSIBLE
    return torch.where(plausible, filtered_mean, mean), torch.where(plausible, filtered_var, var)


class KalmanBatchNorm2d(StatisticsNorm, nn.BatchNorm2d):
    """Kalman Normalization of [N, C, H, W], for micro-batches of 1 to 4 samples (Wang et al., NeurIPS 2018).

    The statistics z, C of a micro-batch are filtered with a prediction from the filtered statistics of the layers
    before, and the features normalized with the result, differentiated through all of it:

        predict   μ' = E μ_before + b,      Σ' = E² Σ_before + R   (E² elementwise: variances only, no covariances)
        update    μ = μ' + q·(z − μ'),      Σ = Σ' + q·(C − Σ') + (1 − q)·q·(z − μ')²

    `connect_kalman` finds out which layers come before, and `convert_norm(model, to="kn")` calls it. A layer that none
    comes before, and one by itself, uses z and C as they are: it is `GhostBatchNorm2d` (in the authors'
    code no gradient passes through the statistics that it hands on; here it does). So does every layer for a pass in
    which Σ'/C is 100 or more on average, as in the authors' code: with few samples and positions, where C may happen to
    be small, that is often.

    With `learned`, E, b, R > 0 and one gain q for the layer are parameters (`transition`, `transition_bias`,
    `log_noise` = log R, `gain_logit`), as in the slides. They start at E = 0, b = 0, R = 0.1 and q = 0.6: E = 0, since
    what a normalized layer hands on has the mean β and the variance γ² whatever its own statistics were, and since the
    gradients of E and b do not vanish there; R small, since a prediction of more variance than there is makes features
    fade from layer to layer, while one of less enlarges them by no more than 1/√q.

    Without, as in the authors' code, q is the constant `gain` = 1 − p, and μ', Σ' are the statistics of what the
    network's own activations and convolutions make of a Gaussian sample with the statistics before: one map of noise
    for each micro-batch, new in each pass. Gradients pass through that, too.

    The running statistics take in the average over the micro-batches of the filtered statistics, with n/(n − 1) on the
    variance as in `nn.BatchNorm2d` (the authors take the first micro-batch only, and biased). Evaluation is exactly
    `nn.BatchNorm2d`; it looks at no prediction.

    In activation checkpointing, use `use_reentrant=False`: the other kind has no gradient from one checkpointed
    segment's statistics to another's. `nn.DataParallel` is refused; `DistributedDataParallel` filters on each rank.

    Args:
        num_features: C.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights of all batches.
        affine: Learn γ and β.
        learned: Learn E, R, b and q (True), or push noise through the network's own layers (False).
        gain: q, in (0, 1), or its start if it is learned; None for 0.6 if it is learned, else for the 0.1 that the
            authors take for micro-batches (0.95 for large batches).
        group_size: Samples of a micro-batch; None for the batch as a whole. A remainder of more than half a micro-batch
            is one of its own; a smaller one joins the last.
        predecessor_features: How many statistics the prediction is made of, the columns of E; None until the layer is
            connected, and always if not `learned`.
        bias: Learn β where γ is learned, as of `nn.BatchNorm*`.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = KalmanBatchNorm2d(8, group_size=2)
        >>> layer
        KalmanBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, group_size=2, learned=True, gain=0.6)
        >>> layer(torch.randn(4, 8, 5, 5))[:2].mean((0, 2, 3)).abs().max() < 1e-6
        tensor(True)
    """

    tracks_batch_moments = False
    decided_by_model = frozenset({"predecessor_features"})
    transition: nn.Parameter | None  # E, [C, predecessor_features]
    transition_bias: nn.Parameter | None  # b, [C]
    log_noise: nn.Parameter | None  # log R, [C]
    gain_logit: nn.Parameter | None  # log(q/(1 − q)), []

    @checked
    @checks_itself("gain")
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        learned: bool = True,
        gain: float | None = None,
        group_size: int | None = None,
        predecessor_features: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if gain is None:
            gain = 0.6 if learned else 0.1
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 < gain < 1:
            raise ValueError(f"gain must lie between 0 and 1, or be None, got {gain!r}")
        if predecessor_features is not None:
            check_positive_integer("predecessor_features", predecessor_features)
            if not learned:
                raise ValueError("predecessor_features is the width of a learned transition: learned=False has none")
        super().__init__(
            num_features, eps, momentum, affine, group_size=group_size, bias=bias, device=device, dtype=dtype
        )
        self.learned = learned
        self.gain = gain
        self.predecessor_features = predecessor_features
        self._past = PastStatistics()
        # What `connect_kalman` says of the model: one object for all of its layers, and this one's name in that.
        self._graph: StatisticsGraph | None = None
        self._name = ""
        for name in _LEARNED:
            self.register_parameter(name, None)
        if predecessor_features is not None:
            self._make_transition(predecessor_features, device, dtype)

    def connect(self, graph: StatisticsGraph | None, name: str, predecessor_features: int | None) -> None:
        """Say which layers come before; `connect_kalman` does this.

        Args:
            graph: Of the model; None to be a layer by itself.
            name: Of this layer in it.
            predecessor_features: Columns of E; None for no learned prediction. What E has learned stays if it fits.
        """
        self._graph, self._name = graph, name
        if predecessor_features == self.predecessor_features:
            return
        self.predecessor_features = predecessor_features
        for parameter in _LEARNED:
            self.register_parameter(parameter, None)
        if predecessor_features is not None:
            like = self.running_mean if self.weight is None else self.weight
            assert like is not None
            self._make_transition(predecessor_features, like.device, like.dtype)

    def own_arguments(self, names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the layer was made with; of a layer that changes its form, not the other form's gain."""
        arguments = super().own_arguments(names, options)
        if options.get("learned", self.learned) != self.learned:
            del arguments["gain"]
        elif self.learned:
            arguments["predecessor_features"] = self.predecessor_features
        return arguments

    @property
    def connected(self) -> bool:
        """Whether the layer knows the model that it is in."""
        return self._graph is not None

    def normalize_batch(self, input: Tensor) -> Tensor:
        """Normalize with the filtered statistics of each micro-batch, and hand these on."""
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "KalmanBatchNorm2d does not run in nn.DataParallel, whose replicas share one forward pass"
            )
        graph, repeated = self._graph, self.recomputing
        if graph is None and self.predecessor_features is not None:
            raise RuntimeError(
                "KalmanBatchNorm2d has predecessor_features but no predecessor: "
                "call connect_kalman(model) before training"
            )
        sizes = ghost_sizes(input.shape[0], self.group_size)
        self._check_enough(input)
        instances, features = live_moments(input)
        each = (input.shape[0],) if sizes is None else sizes
        own = merge_samples(instances, each)
        mean, var = own.mean, own.var
        if graph is not None and not repeated:
            graph.enter(self._name)
        if graph is not None and self._name in graph.priors:
            predicted = self._predict(graph, own, Statistics(mean, var, each, tuple(input.shape[2:])))
            mean, var = filter_moments(mean, var, *predicted, self._gain(mean.dtype))
        if graph is not None and not repeated:
            graph.publish(self._name, Statistics(mean, var, each, tuple(input.shape[2:])))
        self.track(Moments(mean.detach(), var.detach(), own.elements))
        if sizes is None:
            mean, var = mean[0], var[0]
        mean, var = spread_samples(mean, sizes), spread_samples(var, sizes)
        return normalize_with(features, mean, var, self.weight, self.bias, self.eps)

    def normalize_with_estimates(self, input: Tensor) -> Tensor:
        """Normalize with the running statistics."""
        if self._graph is not None:
            self._graph.skip(self._name)
        return super().normalize_with_estimates(input)

    def _predict(self, graph: StatisticsGraph, own: Moments, like: Statistics) -> tuple[Tensor, Tensor]:
        """Return μ' and Σ'."""
        key = Moments(own.mean.detach(), own.var.detach(), own.elements)
        if self.recomputing:
            before = graph.repeat(self._name, like, self._read_before(key))
        else:
            before, read = graph.predict(self._name, like)
            if self.training:
                kept = {index: _leaf(value) for index, value in read.items()}
                self._past.remember(key, cast("tuple[Tensor, ...]", (torch.is_grad_enabled(), kept)))
        if not self.learned:
            return before.mean, before.var
        assert self.transition is not None
        assert self.transition_bias is not None
        assert self.log_noise is not None
        dtype = like.mean.dtype
        transition = self.transition.to(dtype)
        with without_autocast(like.mean.device):
            mean = before.mean @ transition.t() + self.transition_bias.to(dtype)
            var = before.var @ transition.square().t() + self.log_noise.to(dtype).exp()
        return mean, var

    def _read_before(self, key: Moments) -> Read:
        """Return what the forward pass that is repeated now has read of other layers."""
        found = cast("tuple[bool, Read] | None", self._past.recall(key))
        if found is None:
            raise RuntimeError(
                f"{self._name!r} does not know the forward pass that is repeated inside this backward pass: activation "
                "checkpointing must repeat one in training mode, with the same micro-batches"
            )
        with_graph, read = found
        if not with_graph and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self._name!r}: activation checkpointing must have use_reentrant=False here, since there is no "
                "gradient between the statistics of reentrant checkpoints"
            )
        return read

    def _gain(self, dtype: torch.dtype) -> float | Tensor:
        """Return q."""
        return self.gain if self.gain_logit is None else self.gain_logit.to(dtype).sigmoid()

    def reset_parameters(self) -> None:
        """Reset γ, β, the running statistics, and E, b, R and q."""
        super().reset_parameters()
        if getattr(self, "transition", None) is not None:
            self._reset_transition()

    def _make_transition(self, features: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        shapes = ((self.num_features, features), (self.num_features,), (self.num_features,), ())
        for name, shape in zip(_LEARNED, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._reset_transition()

    def _reset_transition(self) -> None:
        assert self.transition is not None
        assert self.transition_bias is not None
        assert self.log_noise is not None
        assert self.gain_logit is not None
        with torch.no_grad():
            self.transition.zero_()
            self.transition_bias.zero_()
            self.log_noise.fill_(math.log(_FIRST_NOISE))
            self.gain_logit.fill_(math.log(self.gain / (1.0 - self.gain)))

    def described(self) -> dict[str, object]:
        """Return the arguments that `repr` shows."""
        arguments = super().described() | {"learned": self.learned, "gain": self.gain}
        if self.predecessor_features is not None:
            arguments["predecessor_features"] = self.predecessor_features
        return arguments

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A plain BatchNorm's checkpoint has no transition: this one's stays as it is.
        if not any(prefix + name in state_dict for name in _LEARNED):
            starts = (0.0, 0.0, math.log(_FIRST_NOISE), math.log(self.gain / (1.0 - self.gain)))
            for name, start in zip(_LEARNED, starts, strict=True):
                if self._parameters[name] is not None and prefix + "running_mean" in state_dict:
                    state_dict[prefix + name] = self.own_or(name, start, state_dict[prefix + "running_mean"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _leaf(value: Statistics) -> Statistics:
    """Return statistics without their graph, for which autograd saves what it has saved for those with it."""
    mean, var = (
        tensor.detach().requires_grad_(tensor.requires_grad and torch.is_grad_enabled())
        for tensor in (value.mean, value.var)
    )
    return value._replace(mean=mean, var=var)
