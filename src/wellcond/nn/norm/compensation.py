"""Derivatives of the statistics of a layer's outputs along its weight, and the hook that hands its inputs over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from wellcond.layouts import ConvLayout, layout_of
from wellcond.nn.functional.batch_norm_kernels import over
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.ranks import Ranks


class Slopes(NamedTuple):
    """One pass through the layer before, from which the statistics' derivatives come.

    Attributes:
        layer: An `nn.Linear` or `nn.Conv1d/2d/3d`.
        inputs: Of the pass, without their graph.
        weight: θ, that it computed with.
        bias: Likewise; None without.
    """

    layer: nn.Module
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None

    def along(self, mean_slope: Tensor, var_slope: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∂μ/∂θ·θ + the bias, and ∂σ²/∂θ·θ.

        Args:
            mean_slope: ∂μ/∂θ of past batches, [groups, entries, inputs of a unit].
            var_slope: ∂σ²/∂θ, [C, entries, inputs of a unit].

        Returns:
            Shape [C, entries] both.
        """
        with without_autocast(mean_slope.device):
            rows = self.weight.flatten(1).to(mean_slope.dtype)
            of_groups = rows.unflatten(0, (len(mean_slope), -1))
            mean = (of_groups @ mean_slope.transpose(1, 2)).flatten(0, 1)
            if self.bias is not None:
                mean = mean + self.bias.to(mean.dtype).unsqueeze(1)
            return mean, (var_slope @ rows.unsqueeze(2)).squeeze(2)

    def measured(self, outputs: Tensor, mean: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
        """Return ∂μ/∂θ and ∂σ²/∂θ of a batch.

        μ = θ·(the average patch of the inputs), and ∂σ²/∂θ is 2(x − μ)/n in the place of a gradient of the outputs.

        Args:
            outputs: x, of the pass's first samples: of those alone.
            mean: μ, shape [C].
            ranks: That share the batch; None for this process alone.

        Returns:
            Shapes [groups, inputs of a unit] and [C, inputs of a unit].
        """
        count = torch.full((), outputs.numel() // outputs.shape[1], dtype=mean.dtype, device=mean.device)
        inputs = self.inputs[: len(outputs)].to(mean.dtype)
        with without_autocast(mean.device):
            centred = outputs.detach().to(mean.dtype) - over(mean, outputs)
            groups = cast(int, getattr(self.layer, "groups", 1))
            ones = torch.ones_like(centred[:, :1]).expand(-1, groups, *centred.shape[2:])
            sums = [self._weight_gradient(inputs, ones), 2 * self._weight_gradient(inputs, centred)]
        if ranks is not None:
            sums, count = [ranks.total(each) for each in sums], ranks.total(count)
        return sums[0] / count, sums[1] / count

    def _weight_gradient(self, inputs: Tensor, grad: Tensor) -> Tensor:
        """Return ∂L/∂θ of a gradient of the outputs, [rows of θ, inputs of a unit], as many rows as that has."""
        rows = grad.shape[1]
        if inputs.numel() == 0:
            return inputs.new_zeros(rows, self.weight[0].numel())
        if isinstance(self.layer, nn.Linear):
            return grad.t() @ inputs
        conv = cast(nn.Conv2d, self.layer)
        layout = layout_of(conv)
        assert isinstance(layout, ConvLayout)
        axes = len(conv.kernel_size)
        # Padded beforehand, in whatever way: here is no padding left.
        gradient: Tensor = torch.ops.aten.convolution_backward(
            grad.contiguous(),
            layout.padded(conv, inputs),
            inputs.new_empty(rows, *self.weight.shape[1:]),
            None,
            conv.stride,
            [0] * axes,
            conv.dilation,
            False,
            [0] * axes,
            conv.groups,
            [False, True, False],
        )[1]
        return gradient.flatten(1)


def slopes_of(layer: nn.Module, entries: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of ∂μ/∂θ and ∂σ²/∂θ of so many batches.

    >>> slopes_of(nn.Conv2d(4, 6, 3, groups=2), 7)
    ((2, 7, 18), (6, 7, 18))
    """
    weight = cast(Tensor, layer.weight)
    inputs = math.prod(weight.shape[1:])
    return (cast(int, getattr(layer, "groups", 1)), entries, inputs), (len(weight), entries, inputs)


def moved_moments(
    moments: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return statistics after the weight has moved: μ_τ(θ), and max(q_τ(θ), μ_τ(θ)²) − μ_τ(θ)².

    q_τ(θ) − μ_τ(θ)² with both to the first order is σ² + ∂σ²/∂θ·Δθ − (∂μ/∂θ·Δθ)²: no difference of squares.

    Args:
        moments: μ_τ and σ²_τ, as they were.
        at: ∂μ/∂θ·θ_τ and ∂σ²/∂θ·θ_τ, of the weight that there was.
        now: ∂μ/∂θ·θ and ∂σ²/∂θ·θ.

    Example:
        >>> moved_moments((torch.tensor(1.0), torch.tensor(2.0)), (0.0, 4.0), (0.5, 5.0))
        (tensor(1.5000), tensor(2.7500))
    """
    moved = now[0] - at[0]
    return moments[0] + moved, (moments[1] + (now[1] - at[1]) - moved * moved).clamp_min(0.0)


class Handover:
    """A forward hook of the layer before a normalization: it hands over the pass's inputs and weight, once.

    Args:
        norm: The normalization.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self._taken: Slopes | None = None

    @classmethod
    def between(cls, layer: nn.Module, norm: nn.Module) -> Handover:
        """Return the hook between two layers, a new one unless there is one already."""
        for hook in layer._forward_hooks.values():
            if isinstance(hook, Handover) and hook.norm is norm:
                return hook
        hook = cls(norm)
        layer.register_forward_hook(hook)
        return hook

    @staticmethod
    def keep_only(layer: nn.Module, wanted: Callable[[nn.Module], bool]) -> None:
        """Take those hooks of a layer away whose normalization is not wanted."""
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, Handover) and not wanted(hook.norm):
                del layer._forward_hooks[key]

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the normalization will take in this pass."""
        self._taken = None
        if args and self.norm.training and output.dim() == args[0].dim() and output.dim() > 1:
            bias = cast("Tensor | None", layer.bias)
            weight = cast(Tensor, layer.weight)
            self._taken = Slopes(layer, args[0].detach(), weight.detach(), None if bias is None else bias.detach())

    def take(self) -> Slopes | None:
        """Return what was handed over, and let it go."""
        taken, self._taken = self._taken, None
        return taken

    def __getstate__(self) -> dict[str, Any]:
        return {"norm": self.norm, "_taken": None}
