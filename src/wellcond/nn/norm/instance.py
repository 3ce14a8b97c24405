"""The base of BSR and EvalNorm: evaluation predicts statistics for each instance from the instance's own."""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond.nn.functional.fusion import Unfusible
from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.numerics.moments import instance_moments, positions, statistics_dtype
from wellcond.runtime.tracing import is_recorded


class InstanceInference(Unfusible, StatisticsNorm):
    """Base of the layers that train as batch normalization, and in evaluation predict the batch's statistics."""

    def predict(self, mean: Tensor, var: Tensor, elements: int) -> tuple[Tensor, Tensor]:
        """Predict the statistics of the training batches that each instance could have been in.

        Args:
            mean: μ_s, of each instance and channel, shape [N, C].
            var: σ²_s, likewise.
            elements: hw: how many positions they were taken over.

        Returns:
            f_μ and f_σ, shape [N, C]; f_σ is not negative.
        """
        raise NotImplementedError

    def normalize_with_estimates(self, input: Tensor) -> Tensor:
        """Normalize each instance with the statistics predicted for it."""
        if input.requires_grad or is_recorded():
            return self._formula(input)
        moments = instance_moments(input)
        with torch.no_grad():
            mean, var = self.predict(moments.mean, moments.var, positions(input))
        sizes = (1,) * input.shape[0] if input.shape[0] else None
        if sizes is None or len(sizes) == 1:
            mean, var, sizes = mean.sum(0), var.sum(0), None
        return normalize(input, mean, var, self.weight, self.bias, self.eps, sizes=sizes)

    def _formula(self, input: Tensor) -> Tensor:
        """Normalize by plain operations: differentiable through the instance's statistics, and exportable."""
        wide = input.to(statistics_dtype(input.dtype))
        if positions(input) == 1:
            mean = wide.flatten(1)
            var = torch.zeros_like(mean)
        else:
            var, mean = torch.var_mean(wide, tuple(range(2, input.dim())), correction=0)
        mean, var = self.predict(mean, var, positions(input))
        scale = torch.rsqrt(var + self.eps)
        weight, bias = self._weight(), self._bias()
        scale = scale if weight is None else scale * weight
        shape = mean.shape + (1,) * (input.dim() - 2)
        output = (wide - mean.reshape(shape)) * scale.reshape(shape)
        if bias is not None:
            output = output + bias.reshape((1, -1) + (1,) * (input.dim() - 2))
        return output.to(input.dtype)
